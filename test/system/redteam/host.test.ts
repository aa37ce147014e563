/**
 * The host guard's side: from a sandbox nothing new enters the host, by whatever address or name, and nothing crosses the link to a
 * neighbour, not even what is meant for everybody. Judged by packets that come up to the host's own input, and by frames that come
 * to the neighbour's interface.
 */
import { execa } from 'execa'
import ipaddr from 'ipaddr.js'
import { networkInterfaces } from 'node:os'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { createNetwork, docker } from '#test/support/containers.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'
import { fire, resolver } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const wild = { defaultAction: 'deny', egress: [{ action: 'allow', target: '*.wild.example' }] }
const kinds = { 'without a policy': undefined, 'that may go anywhere': { defaultAction: 'allow' }, 'that may go to names': wild, 'that may go nowhere': { defaultAction: 'deny' } }

t.test('the host', async (t) => {
  const own = ownAddresses()
  const names = Object.fromEntries(own.map((address, i) => [`host${i}.wild.example`, { a: [address] }]))
  await using internet = await startInternet({ zones: names })
  await using network = await createNetwork('hosts')
  await internet.fence(network.bridge)
  const plain = await network.run({ HostConfig: { Dns: [resolver] } })
  await using stack = await startStack({ internet, gateways: ['auto'] })
  const sandboxes = await Promise.all(Object.entries(kinds).map(async ([kind, networkPolicy]) => [kind, await stack.create(networkPolicy === undefined ? {} : { networkPolicy })] as const))
  await using watch = await watchHost([network.bridge, stack.bridge])
  const ports = { 'the lifecycle server': new URL(stack.api.url).port, 'the gateway': new URL(stack.gateways.get('auto')!.url).port, 'the Docker API': '2375', SSH: '22', 'a port that Docker would publish (a real one: ../neighbours.test.ts)': '32768' }

  const tries: [why: string, words: string[], sign: string][] = [...own, bridgeAddress(stack.bridge)].flatMap((address, i) => [
    ...Object.entries(ports).map(([what, port]) => [`${what} at ${address}`, ['tcp', address, port, 'GET / HTTP/1.0\r\nHost: x.sandbox.localhost\r\n\r\n'], `tcp ${address} ${port}`] as [string, string[], string]),
    [`DNS at ${address}`, ['udp', address, '53'], `udp ${address} 53`] as [string, string[], string],
    [`ping of ${address}`, ['ping', address], `icmp ${address}`] as [string, string[], string],
    ...(i < own.length ? [[`a name that leads to ${address}`, ['steps', 'ask', `host${i}.wild.example`, '127.0.0.11', ';', 'tcp', address, ports.SSH], `tcp ${address} ${ports.SSH}`] as [string, string[], string]] : []),
  ])
  await fire(plain.id, tries.map(([, words]) => words))
  const loose = await watch.take(network.bridge)
  for (const [why, , sign] of tries) t.ok(loose.has(sign), `${why}: comes to the host from a plain container`)
  for (const [kind, sandbox] of sandboxes) {
    const said = await fire(sandbox.main, tries.map(([, words]) => words))
    const seen = await watch.take(stack.bridge)
    for (const [i, [why, , sign]] of tries.entries()) t.notOk(seen.has(sign), `${why}: does not come to the host from a sandbox ${kind}`, { said: said[i] })
    t.equal(seen.size, 0, `nor does anything else from a sandbox ${kind}`, { seen: [...seen] })
  }
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

t.test('everybody on the link', async (t) => {
  await using internet = await startInternet()
  await using network = await createNetwork('link')
  await internet.fence(network.bridge)
  const [plain, target] = [await network.run(), await network.run()]
  await using stack = await startStack({ internet })
  const sandboxes = await Promise.all(Object.entries(kinds).map(async ([kind, networkPolicy]) => [kind, await stack.create(networkPolicy === undefined ? {} : { networkPolicy })] as const))
  const victim = await stack.create()
  const tries = (address: string, broadcast: string): [why: string, ...words: string[]][] => [
    ['multicast DNS', 'group', '224.0.0.251', '5353'],
    ['LLMNR', 'group', '224.0.0.252', '5355'],
    ['a group of the whole site, joined (IGMP)', 'group', '239.255.255.250', '1900'],
    ['limited broadcast', 'group', '255.255.255.255', '67'],
    ["the network's broadcast", 'group', broadcast, '9'],
    ['a neighbour by number, TCP', 'tcp', address, '8080'],
    ['a neighbour by number, UDP', 'udp', address, '9'],
    ['a neighbour by number, UDP-Lite', 'protocol', '136', '2', address, '9'],
    ['a ping of a neighbour', 'ping', address],
    ['ARP by hand', 'arp', address],
    ['ARP for a place beyond the network', 'off_link', '198.51.100.200', '9'],
  ]
  const near = await watchLink(target.id)
  for (const [why, ...words] of tries(target.address, await broadcastOf(target.id))) {
    const said = await fire(plain.id, [words])
    t.ok((await near.take(await hardware(plain.id))) > 0, `${why}: comes to a neighbour's interface between plain containers`, { said })
  }
  const far = await watchLink(victim.main)
  for (const [kind, sandbox] of sandboxes) {
    const rows = tries(victim.address, await broadcastOf(victim.main))
    const said = await fire(sandbox.main, rows.map(([, ...words]) => words))
    t.equal(await far.take(await hardware(sandbox.main)), 0, `${rows.map(([why]) => why).join('; ')}: no frame comes from a sandbox ${kind}`, { said })
    const { stdout } = await sandbox.run(['cat', '/proc/net/if_inet6'])
    t.notMatch(stdout, 'eth0', `a sandbox ${kind} has no IPv6 on the link, not even link-local`)
  }
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** The host's IPv4 addresses that a container can send to. */
function ownAddresses(): string[] {
  const all = Object.values(networkInterfaces()).flatMap((list) => list ?? [])
  return [...new Set(all.filter(({ family, internal }) => family === 'IPv4' && !internal).map(({ address }) => address))].slice(0, 4)
}

function bridgeAddress(bridge: string): string {
  return networkInterfaces()[bridge]?.find(({ family }) => family === 'IPv4')?.address ?? ''
}

/** Docker gives a network 65,536 addresses while it has such ranges, then 4,096. */
async function broadcastOf(container: string): Promise<string> {
  const { NetworkSettings } = await docker.getContainer(container).inspect()
  const { IPAddress, IPPrefixLen } = Object.values(NetworkSettings.Networks)[0]!
  return ipaddr.IPv4.broadcastAddressFromCIDR(`${IPAddress}/${IPPrefixLen}`).toString()
}

async function hardware(container: string): Promise<string> {
  const { State } = await docker.getContainer(container).inspect()
  const { stdout } = await execa`nsenter -t ${State.Pid} -n ip -j link show eth0`
  return (JSON.parse(stdout) as { address: string }[])[0]?.address ?? ''
}

type Listed = { nftables: { set?: { elem?: { elem: { val: string | { concat: (string | number)[] }; counter: { packets: number } } }[] } }[] }

function elements(listed: string): { val: string | { concat: (string | number)[] }; counter: { packets: number } }[] {
  return (JSON.parse(listed) as Listed).nftables.flatMap(({ set }) => set?.elem ?? []).map(({ elem }) => elem)
}

/** Packets of new flows that come from a bridge up to the host's own input, behind every rule: `tcp 192.0.2.1 22`, `icmp 192.0.2.1`. */
async function watchHost(bridges: readonly string[]): Promise<AsyncDisposable & { take(bridge: string): Promise<Set<string>> }> {
  const table = `spt-${process.pid}`
  const kinds = { ports: ['inet_proto . ipv4_addr . inet_service', 'meta l4proto { tcp, udp }', 'meta l4proto . ip daddr . th dport'], others: ['inet_proto . ipv4_addr', 'meta l4proto != { tcp, udp }', 'meta l4proto . ip daddr'] }
  const each = <T>(write: (name: string, bridge: string, kind: string[]) => T): T[] => bridges.flatMap((bridge, i) => Object.entries(kinds).map(([name, kind]) => write(`${name}${i}`, bridge, kind)))
  const sets = each((name, _bridge, [type]) => ` set ${name} { type ${type}; size 65535; flags dynamic; }\n`).join('')
  const rules = each((name, bridge, [, match, key]) => `  iifname "${bridge}" ct state new ${match} update @${name} { ${key} counter }\n`).join('')
  await execa({ input: `table inet ${table} {\n${sets} chain in {\n  type filter hook input priority 300; policy accept;\n${rules} }\n}\n` })`nft -f -`
  return {
    async take(bridge) {
      const found = await Promise.all(Object.keys(kinds).map(async (name) => {
        const set = `${name}${bridges.indexOf(bridge)}`
        const { stdout } = await execa`nft -j list set inet ${table} ${set}`
        await execa`nft flush set inet ${table} ${set}`
        return elements(stdout).map(({ val }) => (typeof val === 'string' ? val : val.concat.join(' ')))
      }))
      return new Set(found.flat())
    },
    async [Symbol.asyncDispose]() {
      await execa`nft delete table inet ${table}`
    },
  }
}

/** Frames of any protocol that come to a container's interface, by their sender. */
async function watchLink(container: string): Promise<{ take(from: string): Promise<number> }> {
  const { State } = await docker.getContainer(container).inspect()
  const inside = ['nsenter', '-t', String(State.Pid), '-n']
  await execa({ input: 'table netdev watch {\n set from { type ether_addr; size 65535; flags dynamic; }\n chain in {\n  type filter hook ingress device "eth0" priority 0; policy accept;\n  update @from { ether saddr counter }\n }\n}\n' })`${inside} nft -f -`
  return {
    async take(from) {
      const { stdout } = await execa`${inside} nft -j list set netdev watch from`
      await execa`${inside} nft flush set netdev watch from`
      return elements(stdout).filter(({ val }) => val === from).reduce((sum, { counter }) => sum + counter.packets, 0)
    },
  }
}
