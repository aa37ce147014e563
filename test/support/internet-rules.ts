/**
 * The kernel half of the tests' internet: counts every packet that arrives, whatever its address, protocol and port, before
 * anything else looks at it, and sends ports nobody listens on to the echo servers and foreign addresses to our own, so that
 * whatever gets here is also answered. Pure text and its reading.
 */
import { echoPort, httpPorts } from './internet-servers.ts'

/** Packets that arrived: `to` and `port` as the sender meant them. `port` is 0 for protocols without ports. */
export type Flow = { readonly from: string; readonly to: string; readonly protocol: string; readonly port: number; readonly packets: number; readonly bytes: number }

const sets = { flows4: 'ipv4_addr . ipv4_addr . inet_proto . inet_service', flows6: 'ipv6_addr . ipv6_addr . inet_proto . inet_service', other4: 'ipv4_addr . ipv4_addr . inet_proto', other6: 'ipv6_addr . ipv6_addr . inet_proto' }
export const setNames = Object.keys(sets)

/** The ruleset of the namespace. Neighbour discovery is the link's own business and not a leak. */
export function internetRules(): string {
  const tcpOwn = [53, ...httpPorts].join(', ')
  return `table inet internet {
${Object.entries(sets).map(([name, type]) => `  set ${name} { type ${type}; size 262144; flags dynamic; }`).join('\n')}
  counter arrived { }
  chain record {
    type filter hook prerouting priority -300; policy accept;
    iif "lo" accept
    icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-query, mld-listener-report, mld2-listener-report } accept
    counter name arrived
    meta nfproto ipv4 meta l4proto { tcp, udp } update @flows4 { ip saddr . ip daddr . meta l4proto . th dport counter } accept
    meta nfproto ipv6 meta l4proto { tcp, udp } update @flows6 { ip6 saddr . ip6 daddr . meta l4proto . th dport counter } accept
    meta nfproto ipv4 update @other4 { ip saddr . ip daddr . meta l4proto counter } accept
    meta nfproto ipv6 update @other6 { ip6 saddr . ip6 daddr . meta l4proto counter } accept
  }
  chain answer {
    type nat hook prerouting priority -100; policy accept;
    iif "lo" accept
    tcp dport != { ${tcpOwn} } redirect to :${echoPort}
    fib daddr type != local meta l4proto tcp redirect
    udp dport != 53 redirect to :${echoPort}
    udp dport 53 redirect to :53
  }
}
`
}

type ListedSet = { nftables: { set?: { elem?: { elem: { val: { concat: (string | number)[] }; counter: { packets: number; bytes: number } } }[] } }[] }

/** Reads one `nft -j list set`. */
export function readFlows(listed: string): Flow[] {
  const elements = (JSON.parse(listed) as ListedSet).nftables.flatMap((entry) => entry.set?.elem ?? [])
  return elements.map(({ elem }) => {
    const [from, to, protocol, port] = elem.val.concat
    return { from: String(from), to: String(to), protocol: String(protocol), port: Number(port ?? 0), ...elem.counter }
  })
}
