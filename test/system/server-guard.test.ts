/**
 * The host guard's rules in the kernel, with packets: a small host of its own in a network namespace, two sandboxes on its
 * bridge and a place outside. Everything is first shown to connect without the rules, so that a refusal means the rules.
 */
import { execa } from 'execa'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { HostGuard, guardTable, guardText, type Guarded } from '../../server/host-guard.ts'
import { needs } from '#test/support/abilities.ts'

t.setTimeout(120_000)
await needs('root', 'nft', 'netns')

const name = `sp-test-${process.pid}-`
const [host, one, two, far] = ['host', 'one', 'two', 'far'].map((part) => name + part) as [string, string, string, string]
const guarded: Guarded = {
  bridge: 'guarded0', isolated: true, subnets: ['10.77.0.0/24'],
  resolvers: [{ address: '10.88.0.53', port: 53 }], floor: ['169.254.0.0/16', '10.88.0.99'],
}

/** Runs a command in a namespace of the test. */
const inside = (netns: string, command: readonly string[], input?: string) => execa('ip', ['netns', 'exec', netns, ...command], input === undefined ? {} : { input })

/** A reply within 2 s to a TCP connection from one namespace; '' when there is none. */
async function reach(from: string, address: string, port: number): Promise<string> {
  const script = `import socket,sys\ns=socket.create_connection(("${address}",${port}),timeout=1)\nprint(s.recv(20).decode(),end="")`
  return (await execa('ip', ['netns', 'exec', from, 'python3', '-c', script], { reject: false })).stdout
}

/** A server on every address of a namespace that says who it is to whoever connects. */
function serve(netns: string, ports: readonly number[]): { stop(): Promise<void> } {
  const script = `
import socket,selectors
sel=selectors.DefaultSelector()
for p in ${JSON.stringify(ports)}:
  s=socket.create_server(("::",p),family=socket.AF_INET6,dualstack_ipv6=True)
  sel.register(s,selectors.EVENT_READ)
print("ready",flush=True)
while True:
  for k,_ in sel.select():
    c,_=k.fileobj.accept(); c.sendall(b"${netns}"); c.close()`
  const child = execa('ip', ['netns', 'exec', netns, 'python3', '-c', script], { reject: false })
  return { stop: async () => { child.kill('SIGKILL'); await child } }
}

t.before(async () => {
  for (const netns of [host, one, two, far]) await execa('ip', ['netns', 'add', netns])
  await inside(host, ['sh', '-ec', `
    ip link set lo up; sysctl -qw net.ipv4.ip_forward=1
    ip link add guarded0 type bridge; ip addr add 10.77.0.1/24 dev guarded0; ip -6 addr add fd77::1/64 dev guarded0 nodad; ip link set guarded0 up
    sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 || true
    for pair in one:10.77.0.2:fd77::2 two:10.77.0.3:fd77::3; do
      part=\${pair%%:*}; rest=\${pair#*:}; ip link add v$part type veth peer name eth0 netns ${name}$part; ip link set v$part master guarded0 up
      ip netns exec ${name}$part ip link set lo up; ip netns exec ${name}$part ip addr add \${rest%%:*}/24 dev eth0
      ip netns exec ${name}$part ip -6 addr add \${rest#*:}/64 dev eth0 nodad; ip netns exec ${name}$part ip link set eth0 up; ip netns exec ${name}$part ip route add default via 10.77.0.1
    done
    ip link add vfar type veth peer name eth0 netns ${far}; ip addr add 10.88.0.1/24 dev vfar; ip link set vfar up
    ip netns exec ${far} sh -ec 'ip link set lo up; ip addr add 10.88.0.9/24 dev eth0; ip addr add 10.88.0.53/32 dev eth0; ip addr add 10.88.0.99/32 dev eth0; ip addr add 169.254.169.254/32 dev eth0; ip link set eth0 up; ip route add default via 10.88.0.1'
    ip route add 10.88.0.53/32 dev vfar; ip route add 10.88.0.99/32 dev vfar; ip route add 169.254.169.254/32 dev vfar
    nft 'add table ip published; add chain ip published out { type nat hook postrouting priority 100; }; add rule ip published out ip saddr 10.77.0.0/24 ip daddr 10.77.0.0/24 masquerade; add chain ip published pre { type nat hook prerouting priority -100; }; add rule ip published pre tcp dport 4000 dnat to 10.77.0.3:80'
  `])
})
t.teardown(async () => { for (const netns of [one, two, far, host]) await execa('ip', ['netns', 'delete', netns], { reject: false }) })

t.test('what is meant for everybody on the link, br_netfilter off', async (t) => {
  // Of one only: the bridge speaks to its ports, too.
  const { address } = (JSON.parse((await inside(one, ['ip', '-j', 'link', 'show', 'eth0'])).stdout) as { address: string }[])[0]!
  await inside(two, ['nft', '-f', '-'], `table netdev watch {\n counter frames_ip { }\n counter frames_arp { }\n chain in {\n  type filter hook ingress device "eth0" priority 0; policy accept;\n  ether saddr ${address} ether type ip counter name frames_ip\n  ether saddr ${address} ether type arp counter name frames_arp\n }\n}\n`)
  const sends = `import socket
for option, place in ((None, ("224.0.0.251", 5353)), (socket.SO_BROADCAST, ("255.255.255.255", 67)), (socket.SO_BROADCAST, ("10.77.0.255", 67)), (socket.SO_DONTROUTE, ("198.51.100.200", 9))):
  s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
  s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
  if option: s.setsockopt(socket.SOL_SOCKET, option, 1)
  s.sendto(b"knock", place)
import time
time.sleep(0.3)`
  const heard = async (): Promise<number[]> => {
    await inside(two, ['nft', 'reset', 'counters'])
    await inside(one, ['python3', '-c', sends])
    const { stdout } = await inside(two, ['nft', 'list', 'counters'])
    return ['ip', 'arp'].map((kind) => Number(new RegExp(`counter frames_${kind} \\{\\s+packets (\\d+)`).exec(stdout)?.[1]))
  }
  const [ip = 0, arp = 0] = await heard()
  t.ok(ip >= 3 && arp >= 1, `without the rules a neighbour hears all of it: ${ip}, ${arp}`)
  await inside(host, ['nft', '-f', '-'], guardText(guarded))
  t.same(await heard(), [0, 0])
  await inside(host, ['nft', 'delete', 'table', 'bridge', guardTable])
  await inside(host, ['nft', 'delete', 'table', 'inet', guardTable])
})

t.test('what a sandbox reaches', async (t) => {
  const servers = [serve(host, [22, 53]), serve(two, [80]), serve(far, [53, 80])]
  t.teardown(() => Promise.all(servers.map((server) => server.stop())))
  const places: [why: string, address: string, port: number, answer: string, held: string][] = [
    ['a service of the host on the bridge', '10.77.0.1', 22, host, ''],
    ['the same by another address of the host', '10.88.0.1', 22, host, ''],
    ['the same by IPv6', 'fd77::1', 22, host, ''],
    ['a DNS server of the host that is no configured resolver', '10.77.0.1', 53, host, ''],
    ['a neighbour on the bridge, br_netfilter off', '10.77.0.3', 80, two, ''],
    ['a neighbour by its published port', '10.77.0.1', 4000, two, ''],
    ['a neighbour by its published port at another address', '10.88.0.1', 4000, two, ''],
    ['cloud metadata', '169.254.169.254', 80, far, ''],
    ['another address of the floor', '10.88.0.99', 80, far, ''],
    ['the configured resolver', '10.88.0.53', 53, far, far],
    ['another port of the resolver', '10.88.0.53', 80, far, far],
    ['an ordinary place', '10.88.0.9', 80, far, far],
  ]
  for (const [why, address, port, answer] of places) {
    t.equal(await until(() => reach(one, address, port)), answer, `without the rules: ${why}`)
  }
  const guard = new HostGuard(async (args, input) => (await inside(host, ['nft', ...args], input)).stdout, async () => (await inside(host, ['cat', '/proc/net/route'])).stdout)
  const subnets = async (): Promise<string> => /elements = (\{[^}]*\})/.exec((await inside(host, ['nft', 'list', 'set', 'bridge', guardTable, 'subnets'])).stdout)?.[1] ?? ''
  await guard.apply(guarded)
  // Of a server that was killed, whose network somebody removed: its addresses may be anybody's by now.
  await inside(host, ['nft', 'add', 'element', 'bridge', guardTable, 'subnets', '{ 10.79.0.0/16 }'])
  await guard.apply(guarded)
  t.equal(await subnets(), '{ 10.77.0.0/24 }', 'of networks that are gone nothing is kept')
  for (const [why, address, port, , held] of places) t.equal(await reach(one, address, port), held, `with the rules: ${why}`)
  t.equal(await reach(far, '10.88.0.1', 22), host, 'others reach the host as before')
  t.equal(await reach(host, '10.77.0.3', 80), two, 'the host reaches a sandbox')
  t.equal(await reach(far, '10.88.0.1', 4000), two, 'and published ports work from outside')

  t.test('another server adds its own', async (t) => {
    await guard.apply({ ...guarded, bridge: 'other0', subnets: ['10.78.0.0/24'], resolvers: [], floor: [] })
    const text = (await inside(host, ['nft', 'list', 'table', 'inet', guardTable])).stdout
    t.match(text, /"guarded0".*\n?.*"other0"|"other0".*\n?.*"guarded0"/)
    t.equal(await reach(one, '10.88.0.53', 53), far)
    t.equal(await reach(one, '10.77.0.1', 22), '')
    t.equal(await subnets(), '{ 10.77.0.0/24, 10.78.0.0/24 }', 'both isolate their own')
  })
  t.test('the tables go with the last bridge', async (t) => {
    await guard.release((bridge) => bridge === 'guarded0')
    t.notMatch((await inside(host, ['nft', 'list', 'table', 'inet', guardTable])).stdout, /other0/)
    t.equal(await subnets(), '{ 10.77.0.0/24 }')
    t.equal(await reach(one, '10.77.0.1', 22), '')
    await guard.release(() => false)
    t.notMatch((await inside(host, ['nft', 'list', 'tables'])).stdout, guardTable)
    await guard.release(() => false)
  })
})

/** The servers need a moment to listen. */
async function until(ask: () => Promise<string>): Promise<string> {
  for (let attempt = 0; attempt < 20; attempt++) {
    const answer = await ask()
    if (answer !== '') return answer
    await delay(100)
  }
  return ''
}
