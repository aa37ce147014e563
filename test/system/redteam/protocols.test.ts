/**
 * Everything that is not plain TCP or UDP to an address: other transports, tunnels, fragments, odd socket options, source routes,
 * groups of receivers, and addresses that are another address in disguise.
 */
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { createNetwork } from '#test/support/containers.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'
import { arrivals, attack, fire, hold, ownPlace, reaches, resolver, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const zones = { 'allowed.example': { a: ['198.51.100.10'] } }
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'allowed.example' }, { action: 'allow', target: '198.51.100.20' }, { action: 'allow', target: '198.51.100.128/25' }] }

type Place = 'a sandbox without a policy' | 'a plain container'
const open = 'a sandbox without a policy'
/** Raw sockets: no sandbox of ours has them, so that the attack is shown with Docker's own capabilities. */
const plain = 'a plain container'
const datagram = '2'

const rows: Row<Place>[] = [
  reaches('TCP', open, (to) => ['tcp', to, '443']),
  reaches('UDP', open, (to) => ['udp', to, '443']),
  reaches('UDP to port 0 of nobody', open, (to) => ['udp', to, '9']),
  reaches('IPv4 inside an IPv6 socket, TCP', open, (to) => ['tcp', `::ffff:${to}`, '443']),
  reaches('IPv4 inside an IPv6 socket, UDP', open, (to) => ['udp', `::ffff:${to}`, '443']),
  reaches('UDP-Lite', open, (to) => ['protocol', '136', datagram, to, '443']),
  reaches('multipath TCP', open, (to) => ['protocol', '262', '1', to, '443']),
  reaches('ICMP echo with data', plain, (to) => ['ping', to]),
  reaches('fifty datagrams at once', open, (to) => ['flood', to, '443']),
  reaches('SO_DONTROUTE first, then routed', open, (to) => ['steps', 'option', 'dontroute', to, '443', ';', 'option', 'priority', to, '443']),
  reaches('bound to the loopback device', open, (to) => ['steps', 'option', 'device', to, '443', ';', 'udp', to, '443']),
  reaches('sent by the loopback interface (IP_UNICAST_IF)', open, (to) => ['steps', 'option', 'interface', to, '443', ';', 'udp', to, '443']),
  reaches('the loopback interface in ancillary data (IP_PKTINFO)', open, (to) => ['steps', 'option', 'packet-info', to, '443', ';', 'udp', to, '443']),
  reaches('from 127.0.0.1', open, (to) => ['steps', 'option', 'loopback-source', to, '443', ';', 'udp', to, '443']),
  reaches('a source route through the loopback', open, (to) => ['steps', 'routed', '127.0.0.1', to, '443', ';', 'udp', to, '443']),
  ...([['SCTP', '132'], ['DCCP', '33'], ['GRE without content', '47'], ['IPIP without content', '4'], ['ESP', '50'], ['IPv6 in IPv4', '41'], ['OSPF', '89'], ['a protocol that does not exist', '253'], ['UDP-Lite by hand', '136'], ['ICMP by hand', '1']] as const)
    .map(([why, number]) => reaches(why, plain, (to) => ['raw', number, to])),
  reaches('a packet in GRE', plain, (to) => ['tunnel', '47', to, '10.9.9.9']),
  reaches('a packet in IPIP', plain, (to) => ['tunnel', '4', to, '10.9.9.9']),
  reaches('a datagram in two pieces', plain, (to) => ['fragments', to, '443']),
  reaches('the pieces in the wrong order', plain, (to) => ['fragments', to, '443', 'backward']),
  reaches('pieces that the kernel may not join (IP_NODEFRAG)', plain, (to) => ['fragments', to, '443', 'apart']),
  reaches('an Ethernet frame', plain, (to) => ['frame', to, '443']),
]

t.test('other protocols', async (t) => {
  await using internet = await startInternet({ zones })
  await using network = await createNetwork('protocols')
  await internet.fence(network.bridge)
  await using stack = await startStack({ internet })
  const free = await stack.create()
  const guarded = await stack.create({ networkPolicy })
  const places = { [open]: free.main, [plain]: (await network.run({ HostConfig: { Dns: [resolver] } })).id }
  await attack(t, { internet, places, guarded: new Map([['a sandbox with a policy', guarded.main]]) }, rows)

  await t.test('packets made by hand, with NET_RAW', async (t) => {
    const joined = (await network.run({ HostConfig: { NetworkMode: `container:${guarded.sidecar}` } })).id
    const byHand = rows.filter(({ words }) => ['raw', 'tunnel', 'fragments'].includes(words[0] ?? ''))
    const aimed = (place: (i: number) => string): Row<Place>[] => byHand.map((row, i) => ({ ...row, words: row.words.map((word) => (word === row.address ? place(i) : word)), address: place(i) }))
    // At other places than before: of a protocol without ports the NAT of the host lets one container at a time send to an address.
    const elsewhere = byHand.map(() => ownPlace())
    await hold(t, internet, ['even inside the namespace, with NET_RAW', joined], aimed((i) => elsewhere[i]!))
    // The same packets to places that are allowed: it is the rules that held the others. Pieces that are not joined belong to no flow, and are refused everywhere.
    const allowed = aimed((i) => `198.51.100.${128 + i}`)
    await internet.forget()
    const said = await fire(joined, allowed.map(({ words }) => words))
    const seen = await arrivals(internet, allowed)
    for (const [i, row] of allowed.entries()) t.equal((seen[i] ?? 0) > 0, !row.words.includes('apart'), `${row.why}: ${row.words.includes('apart') ? 'does not even arrive' : 'arrives from there'} where the policy allows the place`, { said: said[i] })
  })

  await t.test('an allowed address opens no other', async (t) => {
    const to = ownPlace()
    await internet.forget()
    const said = await fire(guarded.main, [['udp', '198.51.100.20', '5000'], ['routed', '198.51.100.20', to, '443'], ['routed', to, '198.51.100.20', '443']])
    const flows = await internet.flows()
    t.ok(flows.some((flow) => flow.to === '198.51.100.20'), 'the allowed address is open')
    t.notOk(flows.some((flow) => flow.to === to), 'and no source route leads on from there', { said })
  })

  await t.test('kinds of sockets', async (t) => {
    // Linux has forty address families; what a sandbox may open must be one that the rules see, or one that leads nowhere.
    const probe = 'import socket,json\nfound=[]\nfor f in range(1,46):\n  for k in (1,2,3,4,5):\n    try: socket.socket(f,k).close()\n    except OSError: continue\n    found.append(f); break\nprint(json.dumps(found))'
    const known = new Map([[1, 'unix'], [2, 'inet'], [10, 'inet6'], [16, 'netlink'], [38, 'kernel crypto'], [40, 'vsock: see SECURITY.md']])
    const found = JSON.parse((await guarded.run(['python3', '-c', probe])).stdout) as number[]
    t.same(found.filter((number) => !known.has(number)), [], 'no address family beyond those that were looked at')
    t.notOk(found.includes(17), 'no packet sockets')
  })
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})
