/**
 * Rules to nft statements. Pure. One table of our own, `inet opensandbox`, IPv4 and IPv6 alike:
 *
 *   api_in, api_out (prerouting, output, -300)    a table of connections that somebody fills does not keep the policy's owner out
 *   arrive  (prerouting, -150)                    marks connections that somebody outside began
 *   nat     (output, -110, before Docker's own)   port 53 of the namespace goes to our listener
 *   egress  (output, 0, drop)                     what leaves: deny sets, then learned addresses, then allow sets
 *   inside                                        what stays in the namespace
 *   sockets                                       nobody speaks to the sidecar's sockets from inside, or in their name
 *   exempt                                        the sidecar's own way to its resolvers
 *   denied                                        says no at once instead of letting the client wait
 *   forward (forward, 0, drop)                    nobody routes through the namespace
 *   leave   (postrouting, 0)                      the loopback's own addresses never go out of another device
 *
 * Learned addresses live in `dyn_allow_v4/v6`, which survive every replacement of the rules; those that a new policy takes away are in
 * `shut_v4/v6` until no packet can renew them any more. `alive` is empty when the sidecar has given no sign of life, and its way out is closed.
 * Addresses and networks have sets of their own: nft reads every plain interval set back before each command (8 ms with 4,096
 * elements), hash sets and concatenated ones it does not (0.35 ms); hence `addr . protocol` for networks.
 */
import { NetworkTable, readNetwork, type Network } from '#policies/address.ts'
import type { Rules } from '#policies/compile.ts'

export type Upstream = { readonly address: string; readonly port: number }

/** How the kernel tells the sidecar's packets from everybody else's: the text of an nft match; null: by their source ports. */
export type Exemption = { readonly match: string | null; readonly protocols: readonly ('udp' | 'tcp')[] }

export type RulesetInput = {
  readonly rules: Rules
  readonly filter: boolean
  /** Is there an IPv6 loopback to redirect to? Otherwise IPv6 is refused. */
  readonly ipv6: boolean
  readonly exemption: Exemption
  readonly upstreams: readonly Upstream[]
  /** Source ports of the sockets that ask them, by the upstream's family: what holds a port for IPv4 does not hold it for IPv6. */
  readonly held: HeldPorts
  /** Resolvers the sandbox may ask directly on port 53. */
  readonly openResolvers: readonly string[]
  readonly doh: DohBlock
  /** Does the sidecar go to a place that `controlStatements` names? */
  readonly control: boolean
  /** Of the policy API; 0: nobody knows it. */
  readonly apiPort: number
  /** Connections seen under this policy carry it, 1 to 2^31-1: an idle one outlives its address's lease, but not its policy. */
  readonly generation: number
}

export type HeldPorts = { readonly [family in '4' | '6']: readonly number[] }

/** Off; every TCP and UDP 443; or only 443 of these. */
export type DohBlock = { readonly everywhere: boolean; readonly addresses: readonly string[] }

export const dnsPort = 15353
/**
 * New connections to the policy API from inside, and what they may say: requests in a row on one connection cost as much as connections. A request
 * may be as short as 25 bytes and takes some kilobytes of memory until it is answered, so what may come at once is little.
 */
const knocks = { perSecond: 100, burst: 64 } as const
const talk = { kilobytesPerSecond: 256, burst: 128 } as const
/** Seconds. Leases of learned addresses are TTL + 60 within these bounds; a packet to the address renews to the longest. */
export const lease = { least: 60, most: 360, grace: 60 } as const

export function leaseSeconds(ttl: number): number {
  return Math.min(Math.max(ttl + lease.grace, lease.least), lease.most)
}

/** More than the learned table ever holds (`firewall.ts`). */
const learnedSetSize = 65536

/**
 * Connections that came from outside, told by their first packet and not by the direction in the kernel's table: root in the sandbox can
 * make the namespace forget a flow (its table overflows) that the NAT of the host still knows, and what the other side then sends looks
 * as if it had begun the flow. Beyond every generation.
 */
const inbound = '0x80000000'
const repliesToOutside = `meta l4proto tcp ct state established ct direction reply ct mark ${inbound} accept`

/**
 * Anybody may bind an IPv6 socket to an address that is not there (IPV6_FREEBIND), and a `connect` that fails writes such a source on the IPv4
 * datagram that its socket holds back (UDP_CORK): our own sockets would take it for the resolver's answer. Not TCP: the resets of `denied` come from
 * afar, too. Dropped: an error message would go to that source.
 */
const foreignSource = 'meta l4proto { udp, udplite } fib saddr type != local'
/** Who has knocked at the policy API from outside lately; longer than its longest request, and than it keeps an idle connection. */
const apiPeers = { seconds: 60, most: 4096 } as const
/**
 * What the policy API says to the outside, of whose connections the kernel keeps no table: to those only who knocked, for somebody else may have the port
 * on another address, or have had it before.
 */
const apiAnswers = (port: number): string[] => families.map((f) => `oif != "lo" tcp sport ${port} tcp flags & (fin | syn | rst | ack) != syn ${f.ip} daddr . tcp dport @api_peers_v${f.n}`)
const stays = 'oif "lo" goto inside'
const whileAlive = 'meta l4proto @alive'
const leaving = ['oif != "lo" ip daddr 127.0.0.0/8 drop', 'oif != "lo" ip6 daddr ::1 drop']

const table = 'inet opensandbox'
/** Where `openStatements` puts addresses. */
export const learnedSets = [`set ${table} dyn_allow_v4`, `set ${table} dyn_allow_v6`] as const
/** Packets that were told no since the start, whatever policies came and went. */
export const deniedCounter = `counter ${table} denied`
const chains = ['nat', 'egress', 'sockets', 'exempt', 'denied'] as const
const dockerResolver = '127.0.0.11'

const families = [
  { n: '4', ip: 'ip', type: 'ipv4_addr', loopback: '127.0.0.0/8' },
  { n: '6', ip: 'ip6', type: 'ipv6_addr', loopback: '::1' },
] as const
type Family = (typeof families)[number]

/**
 * Everything refused but the loopback and replies to connections from outside (health probes). The first thing that runs.
 * @param apiPort of the policy API; 0: nobody knows it
 */
export function bootStatements(apiPort: number): string[] {
  return [
    `add table ${table}`, `delete table ${table}`, `add table ${table}`,
    `add ${deniedCounter}`,
    `add chain ${table} exempt`,
    `add chain ${table} sockets`,
    `add chain ${table} denied`,
    `add chain ${table} inside`,
    // The queue of connections that wait to be taken is one for all: whoever floods it from inside keeps the policy's owner out.
    ...(apiPort === 0 ? [] : [`add rule ${table} inside tcp dport ${apiPort} tcp flags & (fin | syn | rst | ack) == syn limit rate over ${knocks.perSecond}/second burst ${knocks.burst} packets drop`, `add rule ${table} inside tcp dport ${apiPort} limit rate over ${talk.kilobytesPerSecond} kbytes/second burst ${talk.burst} kbytes drop`]),
    `add rule ${table} inside accept`,
    `add chain ${table} nat { type nat hook output priority -110; policy accept; }`,
    `add chain ${table} egress { type filter hook output priority 0; policy drop; }`,
    ...families.map((f) => `add set ${table} dyn_allow_v${f.n} { type ${f.type}; flags dynamic,timeout; timeout ${lease.most}s; size ${learnedSetSize}; }`),
    ...families.map((f) => `add set ${table} shut_v${f.n} { type ${f.type}; }`),
    ...families.flatMap((f) => ['allow', 'deny'].flatMap((action) => addSets(action, f))),
    ...families.map((f) => `add set ${table} doh_block_v${f.n} { type ${f.type} . inet_proto; flags interval; }`),
    ...families.map((f) => `add set ${table} control_v${f.n} { type ${f.type} . inet_proto . inet_service; }`),
    `add set ${table} alive { type inet_proto; flags timeout; }`,
    `add chain ${table} forward { type filter hook forward priority 0; policy drop; }`,
    `add chain ${table} leave { type filter hook postrouting priority 0; policy accept; }`,
    // A socket bound to a device sends even packets for the loopback there, also those that a redirect sends to it.
    ...leaving.map((rule) => `add rule ${table} leave ${rule}`),
    `add chain ${table} arrive { type filter hook prerouting priority -150; policy accept; }`,
    `add rule ${table} arrive tcp flags & (fin | syn | rst | ack) == syn iif != "lo" ct state new ct mark set ${inbound}`,
    ...(apiPort === 0 ? [] : untrackedStatements(apiPort)),
    `add rule ${table} egress ${repliesToOutside}`,
    `add rule ${table} egress ${foreignSource} drop`,
    `add rule ${table} egress ${stays}`,
  ]
}

/** A table of connections that somebody has filled keeps the policy's owner out, unless his are not in it. Beyond `most` peers they are. */
function untrackedStatements(apiPort: number): string[] {
  const knocking = `iif != "lo" tcp dport ${apiPort}`
  return [
    ...families.map((f) => `add set ${table} api_peers_v${f.n} { type ${f.type} . inet_service; flags dynamic,timeout; timeout ${apiPeers.seconds}s; size ${apiPeers.most}; }`),
    `add chain ${table} api_in { type filter hook prerouting priority -300; policy accept; }`,
    `add chain ${table} api_out { type filter hook output priority -300; policy accept; }`,
    ...families.flatMap((f) => [
      `add rule ${table} api_in ${knocking} tcp flags & (fin | syn | rst | ack) == syn update @api_peers_v${f.n} { ${f.ip} saddr . tcp sport } notrack accept`,
      `add rule ${table} api_in ${knocking} ${f.ip} saddr . tcp sport @api_peers_v${f.n} notrack`,
    ]),
    ...apiAnswers(apiPort).flatMap((rule) => [`add rule ${table} api_out ${rule} notrack`, `add rule ${table} egress ${rule} accept`]),
  ]
}

/** The whole policy in one transaction. Learned addresses stay; `shut` are those that `banStatements` shuts until `forgetStatements`. */
export function policyStatements(input: RulesetInput, shut: readonly string[] = []): string[] {
  const { rules } = input
  const lists = { allow4: rules.allow4, allow6: rules.allow6, deny4: rules.deny4, deny6: rules.deny6 }
  return [
    ...chains.map((chain) => `flush chain ${table} ${chain}`),
    ...families.flatMap((f) => [...['allow', 'deny'].flatMap((action) => resetSets(action, f, lists[`${action as 'allow' | 'deny'}${f.n}`])), ...resetDoh(f, input.doh.addresses)]),
    ...natRules(input).map((rule) => `add rule ${table} nat ${rule}`),
    ...socketRules(input).map((rule) => `add rule ${table} sockets ${rule}`),
    ...exemptRules(input).map((rule) => `add rule ${table} exempt ${rule}`),
    ...deniedRules.map((rule) => `add rule ${table} denied ${rule}`),
    ...(input.filter ? filterRules(input, shut) : nameOnlyRules()).map((rule) => `add rule ${table} egress ${rule}`),
    `add chain ${table} egress { policy ${input.filter && rules.defaultAction === 'deny' ? 'drop' : 'accept'}; }`,
  ]
}

/** Takes the sidecar's own way out away and leaves every other rule: for the end of the process. */
export function closeStatements(): string[] {
  return [`flush chain ${table} exempt`, `flush set ${table} alive`]
}

/** Seconds. Whoever dies without a word leaves a way out that closes by itself, and a table that the next one may take. */
export const heartbeat = { every: 5, lasts: 30 } as const

/** Says that the sidecar lives. */
export function aliveStatements(): string[] {
  // Kernels before 6.12 keep the old expiry of an element that is there already.
  return [...['add', 'delete'].map((verb) => `${verb} element ${table} alive { udp, tcp }`), `add element ${table} alive { udp timeout ${heartbeat.lasts}s, tcp timeout ${heartbeat.lasts}s }`]
}

/** Fails where no sidecar lives. */
export const askAliveStatement = `get element ${table} alive { udp }`

/** Lets the sidecar itself, nobody else, go to one TCP port of one address: the only such place from now on. */
export function controlStatements(address: string, port: number): string[] {
  return [...families.map((f) => `flush set ${table} control_v${f.n}`), ...addElements(`control_v${familyOf(address).n}`, [`${address} . tcp . ${port}`])]
}

/** Opens addresses for `seconds`. An address that is known already is deleted in the same transaction: kernels before 6.12 keep the old expiry otherwise. */
export function openStatements(elements: ReadonlyMap<string, number>, known: ReadonlySet<string>): string[] {
  const statements: string[] = []
  for (const f of families) {
    const mine = [...elements].filter(([address]) => familyOf(address) === f)
    const again = mine.filter(([address]) => known.has(address))
    if (again.length > 0) {
      statements.push(`add element ${table} dyn_allow_v${f.n} { ${again.map(([address]) => address).join(', ')} }`)
      statements.push(`delete element ${table} dyn_allow_v${f.n} { ${again.map(([address]) => address).join(', ')} }`)
    }
    if (mine.length > 0) statements.push(`add element ${table} dyn_allow_v${f.n} { ${mine.map(([address, seconds]) => `${address} timeout ${seconds}s`).join(', ')} }`)
  }
  return statements
}

/** Shuts addresses by name, whoever renews them meanwhile, under rules that were written with them in mind. */
export function banStatements(addresses: readonly string[]): string[] {
  return families.flatMap((f) => addElements(`shut_v${f.n}`, addresses.filter((address) => familyOf(address) === f)))
}

/** Lifts all bans. */
export function unbanStatements(): string[] {
  return families.map((f) => `flush set ${table} shut_v${f.n}`)
}

/** Deletes learned addresses, whether or not they have expired by now: deleting a missing element would fail. */
export function forgetStatements(addresses: readonly string[]): string[] {
  return families.flatMap((f) => {
    const mine = addresses.filter((address) => familyOf(address) === f)
    return mine.length === 0 ? [] : ['add', 'delete'].map((verb) => `${verb} element ${table} dyn_allow_v${f.n} { ${mine.join(', ')} }`)
  })
}

/** @param listed what nft prints of `deniedCounter` */
export function readDenied(listed: string): number | null {
  const packets = /packets (\d+)/.exec(listed)?.[1]
  return packets === undefined ? null : Number(packets)
}

/** What `checks.ts` reads the installed rules back with. */
export const listStatements = [`list chain ${table} nat`, `list chain ${table} egress`]

function familyOf(address: string): Family {
  return address.includes(':') ? families[1] : families[0]
}

function addSets(action: string, f: Family): string[] {
  return [
    `add set ${table} ${action}_v${f.n} { type ${f.type}; }`,
    `add set ${table} ${action}_net_v${f.n} { type ${f.type} . inet_proto; flags interval; }`,
  ]
}

// Deleting a set of networks and making it anew is seven times as fast as emptying it.
function resetSets(action: string, f: Family, list: readonly string[]): string[] {
  const addresses = list.filter((text) => !text.includes('/'))
  const networks = outermost(list.filter((text) => text.includes('/')))
  return [
    `delete set ${table} ${action}_v${f.n}`, `delete set ${table} ${action}_net_v${f.n}`,
    ...addSets(action, f),
    ...addElements(`${action}_v${f.n}`, addresses),
    ...addElements(`${action}_net_v${f.n}`, networks.map((network) => `${network} . 0-255`)),
  ]
}

function resetDoh(f: Family, list: readonly string[]): string[] {
  const mine = outermost(list.filter((text) => familyOf(text) === f).map((text) => (text.includes('/') ? text : `${text}/${f.n === '4' ? 32 : 128}`)))
  return [
    `delete set ${table} doh_block_v${f.n}`,
    `add set ${table} doh_block_v${f.n} { type ${f.type} . inet_proto; flags interval; }`,
    ...addElements(`doh_block_v${f.n}`, mine.map((network) => `${network} . 0-255`)),
  ]
}

function addElements(set: string, elements: readonly string[]): string[] {
  return elements.length === 0 ? [] : [`add element ${table} ${set} { ${elements.join(', ')} }`]
}

/** Without the networks that lie inside another of the list: concatenated sets refuse overlaps. */
function outermost(networks: readonly string[]): string[] {
  const kept = new NetworkTable()
  const prefix = (network: string): number => Number(network.slice(network.indexOf('/') + 1))
  return [...networks].sort((a, b) => prefix(a) - prefix(b)).filter((text) => {
    const inside = kept.find(text.slice(0, text.indexOf('/'))) !== undefined
    if (!inside) kept.add(readNetwork(text) as Network, 0)
    return !inside
  })
}

/**
 * A datagram may carry any address of the namespace as its source whatever its socket is bound to (IP_PKTINFO), and a connected socket leaves its
 * port free on all addresses but one. So somebody else could ask from our port and address: past the redirect, where our own question has made
 * a connection that the kernel knows; or before us, so that the kernel redirects our questions to ourselves and gives forged answers the
 * resolver's address. Dropped, not refused: the ICMP error would reach our socket.
 */
function socketRules({ held, exemption: { match } }: RulesetInput): string[] {
  const holding = families.filter((f) => held[f.n].length > 0)
  // A program may be given one of our ports on a loopback address, which leads to none of our sockets. Where ports are all there is, it cannot.
  const but = (f: Family, side: 'saddr' | 'daddr'): string => (match === null ? '' : `${f.ip} ${side} != ${f.loopback} `)
  // Whatever way it takes: a datagram for our own address may go out first, and the host send it back.
  const heard = holding.map((f) => `meta nfproto ipv${f.n} ${but(f, 'daddr')}udp dport ${portSet(held[f.n])} fib daddr type != unicast drop`)
  return match === null ? heard : [...heard, `${match} return`, ...holding.map((f) => `${but(f, 'saddr')}udp sport ${portSet(held[f.n])} drop`)]
}

const toSockets = 'meta l4proto udp jump sockets'

function portSet(ports: readonly number[]): string {
  return `{ ${ports.join(', ')} }`
}

function natRules({ exemption, upstreams, held, openResolvers, ipv6 }: RulesetInput): string[] {
  const own = upstreams.flatMap((u) => exemption.protocols.map((protocol) => `${toUpstream(exemption, held, u, protocol)} accept`))
  const others = families.filter((f) => held[f.n].length > 0).map((f) => `${f.ip} saddr != ${f.loopback} udp sport ${portSet(held[f.n])} drop`)
  const open = openResolvers.map((address) => `${familyOf(address).ip} daddr ${address} meta l4proto { tcp, udp } th dport 53 accept`)
  return [...own, ...others, ...open, `${ipv6 ? '' : 'meta nfproto ipv4 '}meta l4proto { tcp, udp } th dport 53 redirect to :${dnsPort}`]
}

function exemptRules({ exemption, upstreams, held, openResolvers, control }: RulesetInput): string[] {
  const own = upstreams.flatMap((u) => exemption.protocols.map((protocol) => `${toUpstream(exemption, held, u, protocol)} accept`))
  if (control && exemption.protocols.includes('tcp')) own.push(...families.map((f) => `${exemption.match} ${f.ip} daddr . meta l4proto . th dport @control_v${f.n} ${whileAlive} accept`))
  return [...own, ...openResolvers.map((address) => `${familyOf(address).ip} daddr ${address} meta l4proto { tcp, udp } th dport 53 accept`)]
}

function toUpstream({ match }: Exemption, held: HeldPorts, { address, port }: Upstream, protocol: 'udp' | 'tcp'): string {
  return `${match ?? `udp sport ${portSet(held[familyOf(address).n])}`} ${familyOf(address).ip} daddr ${address} ${protocol} dport ${port} ${whileAlive}`
}

// A reset or an ICMP error reaches the client within milliseconds; a silent drop costs it its whole timeout.
const deniedRules = ['counter name "denied"', 'meta l4proto tcp reject with tcp reset', 'reject with icmpx type admin-prohibited']

// Docker's resolver also listens on a random port of 127.0.0.11, which no redirect of port 53 sees.
const notDockerResolver = `ip daddr ${dockerResolver} goto denied`

const discovery = 'icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit }'

/** Whoever asks is redirected: only what is exempt still goes to this port. */
const notRedirected = 'th dport 53 meta l4proto { tcp, udp } goto denied'

/** Mode `dns`: names are filtered, addresses are not. */
function nameOnlyRules(): string[] {
  return [notDockerResolver, `${foreignSource} counter name "denied" drop`, toSockets, stays, 'jump exempt', notRedirected]
}

function filterRules({ rules, ipv6, doh, generation, upstreams, apiPort }: RulesetInput, shut: readonly string[]): string[] {
  // A resolver on another port than 53 is not redirected: an allowed name that leads to its address must not open it.
  const upstreamsClosed = upstreams.filter((u) => u.port !== 53).map((u) => `${familyOf(u.address).ip} daddr ${u.address} meta l4proto { tcp, udp } th dport ${u.port} goto denied`)
  const mark = `0x${generation.toString(16)}`
  const renew = (f: Family): string => `${f.ip} daddr @dyn_allow_v${f.n} update @dyn_allow_v${f.n} { ${f.ip} daddr timeout ${lease.most}s }`
  const list: string[] = [
    ...(apiPort === 0 ? [] : apiAnswers(apiPort).map((rule) => `${rule} accept`)),
    // Replies to connections from outside (the gateway, health probes), whatever the policy says about the caller's address.
    repliesToOutside,
    notDockerResolver,
    `${foreignSource} counter name "denied" drop`,
    toSockets,
    stays,
    // A connection that the sandbox began and that has this policy's mark went all the way down, and with the same addresses and ports it would
    // again. Not one that somebody else began: the mark may come from an error message about it, which has no ports.
    ...families.map((f) => `ct mark ${mark} ct direction original ct state established ${renew(f)} accept`),
    // A redirected question still has its first route's interface here, but our address.
    `ip daddr 127.0.0.1 meta l4proto { tcp, udp } th dport ${dnsPort} accept`,
  ]
  if (ipv6) {
    list.push(`ip6 daddr ::1 meta l4proto { tcp, udp } th dport ${dnsPort} accept`)
    // Without neighbour discovery (hop limit 255 keeps it on the link, RFC 4861 7.1.1) no IPv6 address is reachable at all.
    // The kernel's own has no user; others would send it to anybody, since only its receiver looks at the hop limit.
    list.push(`${discovery} meta skuid >= 0 goto denied`, `ip6 hoplimit 255 ${discovery} accept`)
  }
  list.push('jump exempt', notRedirected, ...upstreamsClosed)
  if (!ipv6) list.push('meta nfproto ipv6 goto denied')
  list.push('ct state invalid goto denied')
  // DNS over TLS and QUIC (RFC 7858, RFC 9250).
  list.push('th dport 853 meta l4proto { tcp, udp } goto denied')
  if (doh.everywhere) list.push('th dport 443 meta l4proto { tcp, udp } goto denied')
  else if (doh.addresses.length > 0) for (const f of families) list.push(`th dport 443 meta l4proto { tcp, udp } ${f.ip} daddr . meta l4proto @doh_block_v${f.n} goto denied`)
  // A new policy judges connections that are open already, too: a new deny cuts them. Hence no look into sets that are empty.
  for (const f of families) {
    const denied = rules[`deny${f.n}`]
    if (denied.some((text) => !text.includes('/'))) list.push(`${f.ip} daddr @deny_v${f.n} goto denied`)
    if (denied.some((text) => text.includes('/'))) list.push(`${f.ip} daddr . meta l4proto @deny_net_v${f.n} goto denied`)
  }
  for (const f of families) if (shut.some((address) => familyOf(address) === f)) list.push(`${f.ip} daddr @shut_v${f.n} goto denied`)
  for (const f of families) list.push(`${renew(f)} ct mark set ${mark} accept`)
  for (const f of families) list.push(`${f.ip} daddr @allow_v${f.n} accept`, `${f.ip} daddr . meta l4proto @allow_net_v${f.n} accept`)
  // A connection that was silent for longer than its address's lease may go on; a new handshake on the same ports may not.
  list.push(`ct mark ${mark} ct state established meta l4proto tcp tcp flags & (fin | syn | rst | ack) != syn accept`)
  if (rules.defaultAction === 'deny') list.push('goto denied')
  return list
}
