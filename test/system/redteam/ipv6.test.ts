/**
 * IPv6. Our own network carries none, so here each sandbox gets a second link with an IPv6 address and a default route, straight into
 * the tests' internet: once on an operator's network that has IPv6, once on our own, where it was off and somebody turned it on.
 */
import { execa } from 'execa'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import { ignoreGone, namePrefix, ownerLabel } from '#test/support/leftovers.ts'
import { netns } from '#test/support/internet-layout.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'
import { asks, attack, fire, reaches, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'ipv6')
t.setTimeout(200_000)

/** Answers to AAAA questions that are another address in disguise, or nobody's business, and a second of each for whoever goes by number. */
const disguises: readonly [why: string, named: string, number: string][] = [
  ['unique local', 'fd66::7', 'fd66::8'],
  ['NAT64', '64:ff9b::a42:708', '64:ff9b::a42:709'],
  ['local NAT64', '64:ff9b:1::a42:708', '64:ff9b:1::a42:709'],
  ['6to4', '2002:a42:708::1', '2002:a42:709::1'],
  ['Teredo', '2001:0:4136:e378:8000:63bf:3fff:fdd2', '2001:0:4136:e378:8000:63bf:3fff:fdd1'],
]
const zones = {
  'allowed.example': { a: ['198.51.100.10'], aaaa: ['2001:db8::10'] },
  ...Object.fromEntries(disguises.map(([, address], i) => [`six${i}.wild.example`, { aaaa: [address] }])),
  'mapped.wild.example': { aaaa: ['::ffff:10.66.7.8'] },
  '*.leak.example': { a: ['198.51.100.66'] },
}
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'allowed.example' }, { action: 'allow', target: '*.wild.example' }] }

const open = 'a sandbox without a policy'
let last = 0
const place = (): string => `2001:db8:66::${(++last).toString(16)}`

const rows: Row<typeof open>[] = [
  reaches('TCP', open, (to) => ['tcp', to, '443'], place()),
  reaches('UDP', open, (to) => ['udp', to, '443'], place()),
  reaches('UDP-Lite', open, (to) => ['protocol', '136', '2', to, '443'], place()),
  reaches('ICMPv6 echo with data', open, (to) => ['ping', to], place()),
  reaches('the address of an allowed name that nobody asked for', open, (to) => ['tcp', to, '80'], '2001:db8::10'),
  asks('a resolver', open, (name) => ['ask', name, '2001:db8::53']),
  asks('a resolver, TCP', open, (name) => ['ask', name, '2001:db8::53', '53', 'tcp']),
  reaches('DNS over TLS', open, (to) => ['tcp', to, '853'], '2001:4860:4860::8888'),
  reaches('DNS over HTTPS', open, (to) => ['tcp', to, '443'], '2606:4700:4700::1111'),
  reaches('DNS over QUIC', open, (to) => ['udp', to, '853'], place()),
  ...disguises.map(([why, , address]) => reaches(`${why}, by number`, open, () => ['udp', address, '80'], address)),
  ...disguises.map(([why, address], i) => reaches(`${why}, behind an allowed name`, open, () => ['steps', 'ask', `six${i}.wild.example`, '127.0.0.11', '53', 'udp', '28', ';', 'udp', address, '80'], address)),
  reaches('v4-mapped, behind an allowed name', open, () => ['steps', 'ask', 'mapped.wild.example', '127.0.0.11', '53', 'udp', '28', ';', 'udp', '::ffff:10.66.7.8', '80'], '10.66.7.8'),
  reaches('multicast DNS', open, (to) => ['group', to, '5353', 'six0'], 'ff02::fb'),
  reaches('LLMNR', open, (to) => ['group', to, '5355', 'six0'], 'ff02::1:3'),
  reaches('every node of the link', open, (to) => ['group', to, '9', 'six0'], 'ff02::1'),
]

t.test('IPv6', async (t) => {
  await using internet = await startInternet({ zones, claims: ['10.66.0.0/16'] })
  await using network = await createSixNetwork()
  await internet.fence(network.bridge)
  await using stack = await startStack({ internet, config: { docker: { network_mode: network.name }, egress: { disable_ipv6: false } } })
  await using without = await startStack({ internet })
  const entrypoint = ['sleep', '600']
  const free = await stack.create({ entrypoint })
  const ready = await stack.create({ entrypoint, networkPolicy })
  const late = await without.create({ networkPolicy })
  t.match((await ready.run(['cat', '/proc/net/if_inet6'])).stdout, /^0{31}1 /m, 'one of them has an IPv6 loopback from the start')
  t.equal((await late.run(['cat', '/proc/net/if_inet6'])).stdout, '', 'the other has no IPv6 at all')
  for (const [index, container] of [free.main, ready.main, late.main].entries()) await giveLink(container, index)
  const guarded = new Map([['a sandbox that has IPv6', ready.main], ['a sandbox that was given it later', late.main]])
  await attack(t, { internet, places: { [open]: free.main }, guarded }, rows)

  await internet.forget()
  const said = await fire(ready.main, [['steps', 'ask', 'allowed.example', '127.0.0.11', '53', 'udp', '28', ';', 'tcp', '2001:db8::10', '443']])
  t.ok((await internet.flows()).some(({ to, protocol }) => to === '2001:db8::10' && protocol === 'tcp'), 'an allowed name connects over IPv6 where there is some', { said })
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** A link of its own from a container's namespace into the tests' internet, as a host with IPv6 would give it. */
async function giveLink(container: string, index: number): Promise<void> {
  const { State } = await docker.getContainer(container).inspect()
  const pid = String(State.Pid)
  const [ours, theirs] = [`fd5a:1171:${index}::1`, `fd5a:1171:${index}::2`]
  await execa`ip link add six-${index} netns ${netns} type veth peer name six0 netns ${pid}`
  await execa({ input: `address add ${ours}/64 dev six-${index} nodad\nlink set six-${index} up\n` })`ip -n ${netns} -batch -`
  const inside = ['nsenter', '-t', pid, '-n']
  for (const key of ['all', 'default', 'six0']) await execa`${inside} sysctl -qw net.ipv6.conf.${key}.disable_ipv6=0 net.ipv6.conf.${key}.accept_dad=0`
  await execa({ input: `address add ${theirs}/64 dev six0 nodad\nlink set six0 up\nroute replace default via ${ours}\n` })`${inside} ip -batch -`
}

/** A network of an operator who has IPv6. */
async function createSixNetwork(): Promise<AsyncDisposable & { readonly name: string; readonly bridge: string }> {
  const [name, bridge] = [`${namePrefix}${process.pid}-six`, `spt-six${process.pid % 10_000}`]
  const Labels = { [ownerLabel]: String(process.pid) }
  const network = await docker.createNetwork({ Name: name, Driver: 'bridge', EnableIPv6: true, IPAM: { Config: [{ Subnet: 'fd5a:1172::/64' }] }, Options: { 'com.docker.network.bridge.name': bridge }, Labels })
  return { name, bridge, [Symbol.asyncDispose]: async () => void (await network.remove().catch(ignoreGone)) }
}
