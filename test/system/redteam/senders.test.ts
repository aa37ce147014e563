/**
 * The kernel's many ways to send: data in the first packet, datagrams that are cut or finished late, memory that is not copied, io_uring, sockets from
 * elsewhere, options and extension headers in front of the ports, and what waits in the kernel while the policy changes.
 */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { packetsTo } from '#test/support/attack.ts'
import { createNetwork, exec } from '#test/support/containers.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox } from '#test/support/stack.ts'
import { createNamespaces, outside, policy, type Namespaces } from '../egress-namespaces.ts'
import { changePolicy } from './group.ts'
import { arrivals, reaches, resolver, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'ipv6', 'python3', 'sysctl')
t.setTimeout(200_000)

/** The arsenal's runner finds these tools, too. */
const program = (await Promise.all(['senders.py', 'arsenal.py'].map((file) => readFile(join(import.meta.dirname, file), 'utf8')))).join('\n')

const allowed = '198.51.100.20'
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: allowed }, { action: 'allow', target: '198.51.100.128/25' }] }
let last = 127
/** Allowed, and no other row's: what holds a packet to it is its port. */
const ownAllowedPlace = (): string => `198.51.100.${++last}`

type Place = 'a sandbox without a policy' | 'a container without seccomp'
const open = 'a sandbox without a policy'
/** On a network of its own that no guard watches, and with user namespaces, which Docker's profile lets nobody make. */
const loose = 'a container without seccomp'

const rows: Row<Place>[] = [
  reaches('TCP fast open: data in the first packet', open, (to) => ['fast_open', 'send', to, '443']),
  reaches('the same, connected first', open, (to) => ['fast_open', 'connect', to, '443']),
  reaches('one datagram that the kernel cuts into fifty (UDP_SEGMENT)', open, (to) => ['segmented', to, '443']),
  reaches('memory that is not copied, TCP (MSG_ZEROCOPY)', open, (to) => ['uncopied', 'tcp', to, '443']),
  reaches('memory that is not copied, UDP', open, (to) => ['uncopied', 'udp', to, '443']),
  reaches('pages of a file, UDP (sendfile)', open, (to) => ['uncopied', 'spliced', to, '443']),
  reaches('a datagram finished towards an allowed place (MSG_MORE)', open, (to) => ['corked', 'more', to, allowed, '443']),
  reaches('a datagram for an allowed place, held back until its socket is turned to another (UDP_CORK)', open, (to) => ['corked', 'turned', allowed, to, '443']),
  reaches('the same, for its own address at first: the way is the loopback', open, (to) => ['steps', 'corked', 'turned', 'own', to, '443', ';', 'udp', to, '443']),
  reaches("somebody else's address as source, written by a connect that fails", loose, (to) => ['foreign', '203.0.113.9', to, '443']),
  reaches('the same, towards an allowed place', loose, (to) => ['foreign', '203.0.113.9', to, '443'], ownAllowedPlace()),
  reaches('a socket that spoke to an allowed place, UDP', open, (to) => ['turned', 'again', allowed, to, '443']),
  reaches('the same, another place named for one datagram', open, (to) => ['turned', 'named', allowed, to, '443']),
  reaches('the same, TCP, disconnected by AF_UNSPEC', open, (to) => ['turned', 'stream', allowed, to, '443']),
  reaches('together with a datagram for an allowed place (sendmmsg)', open, (to) => ['together', allowed, to, '443']),
  reaches('with a time to leave at (SO_TXTIME)', open, (to) => ['timed', to, '443']),
  reaches('with a recorded route', open, (to) => ['with_options', 'route', to, '443']),
  reaches('with timestamps', open, (to) => ['with_options', 'time', to, '443']),
  reaches('behind forty bytes of IP options that say nothing', open, (to) => ['with_options', 'nothing', to, '443']),
  reaches('a socket for ESP in UDP (UDP_ENCAP)', open, (to) => ['encapsulated', to, '443']),
  reaches('an IPv6 socket that becomes IPv4, TCP (IPV6_ADDRFORM)', open, (to) => ['transformed', 'tcp', to, '443']),
  reaches('an IPv6 socket that becomes IPv4, UDP', open, (to) => ['transformed', 'udp', to, '443']),
  reaches('bound to the device that leads out, TCP', open, (to) => ['on_device', 'tcp', to, '443']),
  reaches('bound to the device that leads out, UDP', open, (to) => ['on_device', 'udp', to, '443']),
  reaches('an extended echo request', open, (to) => ['extended_echo', to]),
  reaches('io_uring: a datagram', open, (to) => ['uring', 'message', to, '443']),
  reaches('io_uring: memory that is not copied', open, (to) => ['uring', 'uncopied', to, '443']),
  reaches('io_uring: socket, connection and data', open, (to) => ['uring', 'all', to, '443']),
  reaches('io_uring: sent by a thread of the kernel', open, (to) => ['uring', 'polled', to, '443']),
  reaches('a socket of another process (SCM_RIGHTS)', open, (to) => ['passed', '0', to, '443']),
  reaches('the same, in a user namespace of its own', loose, (to) => ['passed', '0x10000000', to, '443']),
  reaches('the same, and in a network namespace of its own', loose, (to) => ['passed', '0x50000000', to, '443']),
  reaches('port 853 behind forty bytes of options', open, (to) => ['with_options', 'nothing', to, '853'], ownAllowedPlace()),
  reaches('port 853 in the first packet with data', open, (to) => ['fast_open', 'send', to, '853'], ownAllowedPlace()),
  reaches('port 853 in one datagram of fifty', open, (to) => ['segmented', to, '853'], ownAllowedPlace()),
  reaches('port 853 by io_uring', open, (to) => ['uring', 'message', to, '853'], ownAllowedPlace()),
]

t.test('ways to send', async (t) => {
  await using internet = await startInternet()
  await using network = await createNetwork('senders')
  await internet.fence(network.bridge)
  await using stack = await startStack({ internet })
  const free = await stack.create()
  const guarded = await stack.create({ networkPolicy })
  const unconfined = { SecurityOpt: ['seccomp=unconfined'] }
  const places = { [open]: free.main, [loose]: (await network.run({ HostConfig: { ...unconfined, Dns: [resolver] } })).id }
  const joined = (await network.run({ HostConfig: { ...unconfined, NetworkMode: `container:${guarded.sidecar}`, CapDrop: ['NET_RAW'] } })).id

  const known = [...(await tryOut(t, internet, [open, places[open]], rows)), ...(await tryOut(t, internet, [loose, places[loose]], rows))]
  for (const [where, container] of [['a sandbox with a policy', guarded.main], ['its namespace, without seccomp', joined]] as const) {
    const { said, seen } = await run(internet, container, known)
    for (const [i, { why }] of known.entries()) t.equal(seen[i], 0, `${why}: nothing arrives from ${where}`, { said: said[i] })
  }
  const foreign = known.filter(({ words }) => words[0] === 'foreign')
  const { said, seen } = await run(internet, free.main, foreign)
  for (const [i, { why }] of foreign.entries()) t.equal(seen[i], 0, `${why}: nothing arrives from a sandbox without a policy, which the host guards`, { said: said[i] })
  t.equal(foreign.length, 2)
  await t.test('what waits in the kernel when the policy changes', (t) => change(t, internet, guarded))
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** All rows that must first work in this place, each of which must arrive; those whose kernel or engine lacks the feature are left out by name. */
async function tryOut(t: Test, internet: Internet, [where, container]: readonly [Place, string], rows: readonly Row<Place>[]): Promise<Row<Place>[]> {
  const mine = rows.filter(({ first }) => first === where)
  const { said, seen } = await run(internet, container, mine)
  return mine.filter(({ why }, i) => {
    const here = !said[i]!.includes('not here')
    if (here) t.ok(seen[i]! > 0, `${why}: works from ${where}`, { said: said[i] })
    else t.comment(`${why}: ${said[i]}`)
    return here
  })
}

async function run(internet: Internet, container: string, rows: readonly Row[]): Promise<{ said: string[]; seen: number[] }> {
  await internet.forget()
  const said = await fire(container, rows.map(({ words }) => words))
  return { said, seen: await arrivals(internet, rows) }
}

async function fire(container: string, attempts: readonly (readonly string[])[]): Promise<string[]> {
  const { stdout, stderr, code } = await exec(container, ['python3', '-c', program, JSON.stringify(attempts)], 60)
  if (code !== 0) throw new Error(`the senders ended with ${code}: ${stderr}${stdout}`)
  return JSON.parse(stdout) as string[]
}

/** Begun while the places were allowed, and sent afterwards: half a datagram, a full buffer that leaves slowly, and what io_uring does by itself. */
async function change(t: Test, internet: Internet, guarded: Sandbox): Promise<void> {
  const seconds = 1.5
  const later = 'datagrams that io_uring sends later'
  for (const tightened of [false, true]) {
    const ways = ['a datagram that was begun', 'a full buffer of TCP', later].map((why) => [why, ownAllowedPlace()] as const)
    await changePolicy(guarded, 'POST', networkPolicy)
    await guarded.run(['rm', '-f', '/tmp/begun', '/tmp/over'])
    const running = fire(guarded.main, [['begun', String(seconds), ...ways.map(([, place]) => place), '443']])
    await eventually('the sends have begun', async () => ((await guarded.run(['test', '-e', '/tmp/begun'])).code === 0 ? true : undefined))
    if (tightened) await changePolicy(guarded, 'POST', {})
    await internet.forget()
    await guarded.run(['touch', '/tmp/over'])
    const said = await running
    const flows = await internet.flows()
    for (const [why, place] of ways) {
      if (why === later && said[0]!.includes('not here')) t.comment(said[0])
      else if (tightened) t.equal(packetsTo(flows, place), 0, `${why}: not one packet arrives any more`, { said })
      else t.ok(packetsTo(flows, place) > 0, `${why}: arrives while the policy stays`, { said })
    }
  }
}

/** Each by its word of `six`. */
const headers = ['hop-by-hop', 'options', 'ten-options', 'route-0', 'route-4', 'atomic', 'fragments', 'backward', 'late-port', 'AH', 'ESP', 'nothing', 'mobility', 'unknown', 'discovery', 'discovery-behind'] as const
/** Without ports in the first piece, or without anything behind the headers, a packet belongs to no flow; and discovery is the kernel's: refused everywhere. */
const flowless = ['late-port', 'nothing', 'discovery'] as const
/** Of a namespace from `createNamespaces`. */
const own6 = '2001:db8:53::2'

t.test('extension headers of IPv6', async (t) => {
  await using space = await createNamespaces()
  // As Docker sets it: everybody may ping.
  await space.run('sysctl', '-qw', 'net.ipv4.ping_group_range=0 2147483647')
  const arrived = await watch(space)
  const [free, held, opened] = [66, 67, 68].map((network) => (i: number) => `2001:db8:${network}::${(i + 1).toString(16)}`) as [Places, Places, Places]
  const before = await shoot(space, free)
  const reached = await arrived()
  for (const [i, why] of tries.entries()) t.ok(reached.has(free(i)), `${why}: arrives where there are no rules`, { said: before[i] })

  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('2001:db8:68::/64') })
  const said = { held: await shoot(space, held), opened: await shoot(space, opened) }
  const after = await arrived()
  for (const [i, why] of tries.entries()) t.notOk(after.has(held(i)), `${why}: nothing arrives from beside a sidecar`, { said: said.held[i] })
  for (const [i, why] of tries.entries()) {
    const belongs = !flowless.some((word) => why.startsWith(word))
    t.equal(after.has(opened(i)), belongs, `${why}: ${belongs ? 'arrives' : 'does not even arrive'} where the policy allows the place`, { said: said.opened[i] })
  }
})

type Places = (i: number) => string
/** What the kernel itself answers to an address that is not the namespace's. */
const answers = ['echo', 'reset', 'handshake'] as const
const tries = [...headers.map((word) => `${word}, with NET_RAW`), 'a segment route, without it', ...answers.map((word) => `${word}, answered to a foreign source`)]

async function shoot(space: Namespaces, place: Places): Promise<string[]> {
  const fireAs = async (capabilities: string, attempts: readonly (readonly string[])[]): Promise<string[]> =>
    JSON.parse(await space.run('setpriv', `--bounding-set=-all,${capabilities}`, '--inh-caps=-all', '--', 'python3', '-c', program, JSON.stringify(attempts))) as string[]
  const made = await fireAs('+net_bind_service,+net_raw', headers.map((word, i) => ['six', word, own6, place(i), outside.v6]))
  const plain = [['routed_six', place(headers.length), outside.v6], ...answers.map((word, i) => ['foreign_six', word, place(headers.length + 1 + i), own6])]
  return [...made, ...(await fireAs('+net_bind_service', plain))]
}

/** Places where anything arrived at the internet's end of the cable, before fragments are joined. */
async function watch(space: Namespaces): Promise<() => Promise<Set<string>>> {
  const rules = [
    'add table inet senders', 'add set inet senders seen { type ipv6_addr; flags dynamic; size 4096; }', 'add chain inet senders record { type filter hook prerouting priority -450; }',
    'add rule inet senders record iif up0 update @seen { ip6 daddr }',
  ].join('; ')
  await space.runOn('internet', 'sh', '-c', `nft '${rules}' && echo loaded`)
  return async () => {
    const listed = await space.runOn('internet', 'sh', '-c', 'nft -j list set inet senders seen')
    return new Set([...listed.join('').matchAll(/2001:db8:[0-9a-f:]+/g)].map(([address]) => address))
  }
}
