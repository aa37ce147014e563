/**
 * Keeps sandboxes off the host. Docker's own isolation leaves neighbours' published ports, every service of the host
 * and the cloud's metadata address open to a container; these rules close them, with or without a network policy.
 * Several servers may share the tables: chains are the same for all, what differs are set elements, and the tables stay
 * as long as a bridge they guard exists. The only file of the server that starts a program (`nft`).
 */
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { execa } from 'execa'
import ipaddr from 'ipaddr.js'
import type { Upstream } from './config.ts'

export type Guarded = {
  /** Bridge that sandboxes hang on; null while it does not exist. */
  readonly bridge: string | null
  /** Our own network: neighbours must not see each other. A named one may hold services that sandboxes shall reach. */
  readonly isolated: boolean
  /** IPv4 subnets of the isolated network. */
  readonly subnets: readonly string[]
  readonly resolvers: readonly Upstream[]
  readonly floor: readonly string[]
}

/** Runs nft; a seam for tests. @throws when it fails */
export type Nft = (args: readonly string[], input: string) => Promise<string>

export const runNft: Nft = async (args, input) => (await execa('nft', [...args], { input, timeout: 10_000, env: { HOME: '/nonexistent' } })).stdout

export const guardTable = 'sallyport_host'

/**
 * One transaction, safe to load again and again: sets grow, chains are replaced, counters are kept.
 * - prerouting, before any DNAT: a published port of a neighbour is still an address of the host here. A source that does not belong on its bridge
 *   needs no capability (IP_FREEBIND), and would go out as it is: NAT has rules for the bridge's own addresses only.
 * - input: the same for what arrives without NAT; fib types may be missing, this rule never is.
 * - forward: a handshake that comes back through the NAT of a sandbox's own flow (its namespace may have forgotten the flow, and would
 *   take it for a connection from outside, whose answers no policy holds); the floor by its original address and by the one after NAT;
 *   sandbox to sandbox; anything redirected.
 * - bridge: neighbours on one bridge, whose frames never come to the forward hook when br_netfilter is off. Whatever they are sent to: multicast
 *   and ARP for an address beyond the subnet reach every neighbour. What is for the gateway does not come to this hook.
 */
export function guardText(guarded: Guarded): string {
  const t = `inet ${guardTable}`
  const b = `bridge ${guardTable}`
  const bridge = guarded.bridge === null ? [] : [`"${guarded.bridge}"`]
  const v4 = guarded.floor.filter((net) => !net.includes(':'))
  const v6 = guarded.floor.filter((net) => net.includes(':'))
  const resolvers = (kind: 'ipv4' | 'ipv6'): string[] =>
    guarded.resolvers.filter((u) => ipaddr.parse(u.address).kind() === kind).flatMap((u) => ['udp', 'tcp'].map((proto) => `${u.address} . ${proto} . ${u.port}`))
  const chain = (table: string, name: string, hook: string, rules: string[]): string[] =>
    [`add chain ${table} ${name} { type filter hook ${hook}; policy accept; }`, `flush chain ${table} ${name}`, ...rules.map((rule) => `add rule ${table} ${name} ${rule}`)]
  const elements = (table: string, set: string, items: readonly string[]): string[] =>
    items.length === 0 ? [] : [`add element ${table} ${set} { ${items.join(', ')} }`]
  const toResolver = ['ip daddr . meta l4proto . th dport @resolvers4 accept', 'ip6 daddr . meta l4proto . th dport @resolvers6 accept']
  const foreign = ['meta nfproto ipv4', 'ip6 saddr != ::'].map((some) => `${some} fib saddr . iif oif missing counter name "foreign" drop`)
  return [
    `add table ${t}`,
    `add set ${t} bridges { type ifname; }`,
    `add set ${t} isolated { type ifname; }`,
    `add set ${t} floor4 { type ipv4_addr; flags interval; auto-merge; }`,
    `add set ${t} floor6 { type ipv6_addr; flags interval; auto-merge; }`,
    `add set ${t} resolvers4 { type ipv4_addr . inet_proto . inet_service; }`,
    `add set ${t} resolvers6 { type ipv6_addr . inet_proto . inet_service; }`,
    `add counter ${t} to_host`,
    `add counter ${t} to_floor`,
    `add counter ${t} to_neighbour`,
    `add counter ${t} turned`,
    `add counter ${t} foreign`,
    ...chain(t, 'prerouting', 'prerouting priority -150', [
      'iifname != @bridges accept', ...foreign, 'ct state established,related accept', ...toResolver, 'fib daddr type != unicast counter name "to_host" drop',
    ]),
    ...chain(t, 'input', 'input priority -10', [
      'iifname != @bridges accept', 'ct state established,related accept', ...toResolver, 'counter name "to_host" drop',
    ]),
    ...chain(t, 'forward', 'forward priority -10', [
      'oifname @bridges ct direction reply tcp flags & (syn | ack) == syn counter name "turned" drop',
      'iifname != @bridges accept', 'oifname @isolated counter name "to_neighbour" drop', 'ct state established,related accept', ...toResolver,
      'ct original ip daddr @floor4 counter name "to_floor" drop', 'ip daddr @floor4 counter name "to_floor" drop',
      'ct original ip6 daddr @floor6 counter name "to_floor" drop', 'ip6 daddr @floor6 counter name "to_floor" drop',
      'ct status dnat counter name "to_neighbour" drop',
    ]),
    ...elements(t, 'bridges', bridge),
    ...elements(t, 'isolated', guarded.isolated ? bridge : []),
    ...elements(t, 'floor4', v4),
    ...elements(t, 'floor6', v6),
    ...elements(t, 'resolvers4', resolvers('ipv4')),
    ...elements(t, 'resolvers6', resolvers('ipv6')),
    `add table ${b}`,
    `add set ${b} subnets { type ipv4_addr; flags interval; auto-merge; }`,
    `add counter ${b} to_neighbour`,
    ...chain(b, 'forward', 'forward priority -200', ['ip saddr @subnets counter name "to_neighbour" drop', 'arp saddr ip @subnets counter name "to_neighbour" drop']),
    ...elements(b, 'subnets', guarded.isolated ? guarded.subnets : []),
  ].join('\n') + '\n'
}

/** The kernel's IPv4 routes, as /proc/net/route writes them; a seam for tests. */
export type Routes = () => Promise<string>

export class HostGuard {
  readonly #nft: Nft
  readonly #routes: Routes
  constructor(nft: Nft = runNft, routes: Routes = () => readFile('/proc/net/route', 'utf8')) {
    this.#nft = nft
    this.#routes = routes
  }

  /** Loads the rules, or makes sure they are still there. @throws when the rights or nft are missing */
  async apply(guarded: Guarded): Promise<void> {
    await this.#nft(['-f', '-'], guardText(guarded))
    await this.#keepSubnets(guarded.isolated ? guarded.subnets : [])
  }

  /** Drops bridges that no longer exist and, with the last one, the tables: nobody's sandbox can need them. */
  async release(exists: (bridge: string) => boolean = bridgeExists): Promise<void> {
    const listed = await this.#nft(['list', 'set', 'inet', guardTable, 'bridges'], '').catch(() => null)
    if (listed === null) return
    const bridges = namesIn(listed)
    if (!bridges.some(exists)) {
      await this.#nft(['-f', '-'], `delete table inet ${guardTable}\ndelete table bridge ${guardTable}\n`)
      return
    }
    for (const bridge of bridges.filter((name) => !exists(name))) {
      for (const set of ['bridges', 'isolated']) await this.#nft(['-f', '-'], `delete element inet ${guardTable} ${set} { "${bridge}" }\n`).catch(() => undefined)
    }
    await this.#keepSubnets([])
  }

  /**
   * Of the addresses that neighbours may not use among themselves, those of networks that are: others become anybody's, also when the
   * server that guarded them was killed. Which those are, the routes of every server's isolated bridges tell.
   */
  async #keepSubnets(own: readonly string[]): Promise<void> {
    const isolated = new Set(namesIn(await this.#nft(['list', 'set', 'inet', guardTable, 'isolated'], '')))
    const subnets = [...new Set([...own, ...subnetsOf(await this.#routes(), isolated)])]
    const set = `bridge ${guardTable} subnets`
    await this.#nft(['-f', '-'], `flush set ${set}\n${subnets.length === 0 ? '' : `add element ${set} { ${subnets.join(', ')} }\n`}`)
  }
}

/** Names of interfaces in what `nft list set` prints. */
function namesIn(listed: string): string[] {
  return [.../elements = \{([^}]*)\}/.exec(listed)?.[1]?.matchAll(/"([^"]+)"/g) ?? []].map((match) => match[1] as string)
}

/** Interface, destination, gateway and, as eighth, mask; addresses in hexadecimal, last byte first. */
function subnetsOf(routes: string, bridges: ReadonlySet<string>): string[] {
  const bytes = (hex: string): number[] => [...Buffer.from(hex, 'hex')].reverse()
  return routes.split('\n').map((line) => line.trim().split(/\s+/)).filter(([bridge = '', , gateway]) => bridges.has(bridge) && gateway === '00000000').map((fields) => {
    const prefix = new ipaddr.IPv4(bytes(fields[7] ?? '')).prefixLengthFromSubnetMask() ?? 32
    return `${bytes(fields[1] ?? '').join('.')}/${prefix}`
  })
}

function bridgeExists(bridge: string): boolean {
  return existsSync(`/sys/class/net/${bridge}`)
}
