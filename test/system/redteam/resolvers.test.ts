/**
 * Other ways to have a name resolved, or to send data out in questions: other resolvers by every transport, the sidecar's own
 * upstream, Docker's resolver, and names on the link.
 */
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'
import { asks, attack, fire, ownName, reaches, resolver, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const zones = { 'allowed.example': { a: ['198.51.100.10'] }, 'resolver.wild.example': { a: [resolver] }, 'doh.wild.example': { a: ['8.8.4.4'] }, '*.leak.example': { a: ['198.51.100.66'], txt: ['secret'] } }
const policy = [{ action: 'allow', target: 'allowed.example' }, { action: 'allow', target: '*.wild.example' }]

const open = 'a sandbox without a policy'
const types = { TXT: '16', NULL: '10', MX: '15', ANY: '255', HTTPS: '65', AAAA: '28' }
const learned = ['ask', 'resolver.wild.example', '127.0.0.11', ';', 'sleep', '0.2', ';'] as const

const rows: Row<typeof open>[] = [
  asks('a name nobody allowed', open, (name) => ['ask', name, '127.0.0.11']),
  asks('the same over TCP', open, (name) => ['ask', name, '127.0.0.11', '53', 'tcp']),
  ...Object.entries(types).map(([type, kind]) => asks(`a question for ${type}`, open, (name) => ['ask', name, '127.0.0.11', '53', 'udp', kind])),
  asks('the longest name there is', open, (name) => ['ask', `${Array.from({ length: 3 }, (_, i) => String(i).repeat(63)).join('.')}.${name}`, '127.0.0.11']),
  asks("the sidecar's upstream", open, (name) => ['ask', name, resolver]),
  asks("the sidecar's upstream, TCP", open, (name) => ['ask', name, resolver, '53', 'tcp']),
  asks('a public resolver', open, (name) => ['ask', name, '8.8.8.8']),
  asks('a public resolver, TCP', open, (name) => ['ask', name, '8.8.8.8', '53', 'tcp']),
  asks('a server of the attacker', open, (name) => ['ask', name, '198.51.100.99']),
  asks('a resolver through an IPv6 socket', open, (name) => ['ask', name, '::ffff:8.8.8.8']),
  asks("Docker's resolver on its other port", open, (name) => ['embedded', name]),
  asks('the upstream behind an allowed name', open, (name) => ['steps', ...learned, 'ask', name, resolver, ';', 'ask', name, resolver, '53', 'tcp']),
  reaches('the upstream behind an allowed name, its other ports', open, () => ['steps', ...learned, 'udp', '198.51.100.54', '5353', ';', 'udp', resolver, '5353', ';', 'tcp', resolver, '443', ';', 'tcp', resolver, '853'], resolver),
  reaches('DNS over TLS, a public resolver', open, (to) => ['tcp', to, '853'], '1.1.1.1'),
  reaches('DNS over TLS, any server', open, (to) => ['tcp', to, '853']),
  reaches('DNS over QUIC, port 853', open, (to) => ['udp', to, '853']),
  reaches('DNS over QUIC, port 8853', open, (to) => ['udp', to, '8853']),
  reaches('DNS over DTLS to a public resolver', open, (to) => ['udp', to, '853'], '9.9.9.10'),
  reaches('DNS over HTTPS, a public resolver', open, (to) => ['tcp', to, '443'], '9.9.9.9'),
  reaches('DNS over HTTP/3, a public resolver', open, (to) => ['udp', to, '443'], '1.0.0.1'),
  reaches('DNS over HTTPS behind an allowed name', open, (to) => ['steps', 'ask', 'doh.wild.example', '127.0.0.11', ';', 'sleep', '0.2', ';', 'tcp', to, '443'], '8.8.4.4'),
  reaches('DNSCrypt', open, (to) => ['udp', to, '5443'], '208.67.222.222'),
]

t.test('other resolvers', async (t) => {
  await using internet = await startInternet({ zones, claims: ['8.8.8.8', '8.8.4.4', '1.1.1.1', '1.0.0.1', '9.9.9.9', '9.9.9.10', '208.67.222.222'] })
  await using stack = await startStack({ internet })
  const free = await stack.create()
  const guarded = await stack.create({ networkPolicy: { defaultAction: 'deny', egress: policy } })
  // Questions of the upstream's own protocol are the sidecar's: only what is not one counts for its address.
  const foreign = rows.filter(({ address }) => address !== resolver)
  await attack(t, { internet, places: { [open]: free.main }, guarded: new Map([['a sandbox with a policy', guarded.main]]) }, foreign)

  await seesDockersPort(t, guarded.main)
  const row = rows.find(({ address }) => address === resolver)!
  for (const [container, arrives] of [[free.main, true], [guarded.main, false]] as const) {
    await internet.forget()
    const said = await fire(container, [row.words])
    const ports = (await internet.flows()).filter(({ to, port }) => to === resolver && port !== 53).map(({ protocol, port }) => `${protocol} ${port}`)
    t.same(ports.sort(), arrives ? ['tcp 443', 'tcp 853', 'udp 5353'] : [], `${row.why}: ${arrives ? 'open without a policy' : 'closed'}`, { said })
  }

  await t.test('a policy that allows by default and denies names', async (t) => {
    const lax = await stack.create({ networkPolicy: { defaultAction: 'allow', egress: [{ action: 'deny', target: '*.leak.example' }] } })
    const questions = rows.filter(({ why, name }) => name !== undefined && !why.startsWith('the upstream behind'))
    await attack(t, { internet, places: { [open]: free.main }, guarded: new Map([['a sandbox that may go elsewhere', lax.main]]) }, questions)
    await seesDockersPort(t, lax.main)
    await internet.forget()
    await fire(lax.main, [['tcp', '198.18.9.1', '853'], ['udp', '198.18.9.2', '853'], ['tcp', '198.18.9.3', '443']])
    const places = (await internet.flows()).map(({ to }) => to)
    t.notOk(places.includes('198.18.9.1') || places.includes('198.18.9.2'), 'DNS over TLS and QUIC is closed under every policy')
    t.ok(places.includes('198.18.9.3'), 'while other places are open')
  })
  t.match((await guarded.run(['curl', '-sS', '-m', '5', 'http://allowed.example/still'])).stdout, 'GET /still', 'and the allowed name still connects')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** Without such a port the row would hold for want of anything to try. */
async function seesDockersPort(t: Test, container: string): Promise<void> {
  const [said] = await fire(container, [['embedded', ownName()]])
  t.ok(said !== undefined && said.split('; ').length >= 2, "Docker's resolver has another port there, by UDP and by TCP", { said })
}
