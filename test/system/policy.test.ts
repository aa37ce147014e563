/** A policy as users write them, in real sandboxes: which places connect, and which do not, judged by what arrived there. */
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attackTogether, packetsTo, questionsFor } from '#test/support/attack.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { startStack, type Sandbox } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const zones = {
  'one.example': { a: ['198.51.100.11'] },
  'two.example': { a: ['198.51.100.12'] },
  'a.wild.example': { a: ['198.51.100.13'] },
  'a.b.wild.example': { a: ['198.51.100.14'] },
  'wild.example': { a: ['198.51.100.15'] },
  'notwild.example': { a: ['198.51.100.16'] },
  'bad.wild.example': { a: ['198.51.100.17'] },
  'alias.wild.example': { cname: 'elsewhere.example' },
  'elsewhere.example': { a: ['198.51.100.18'] },
  'walled.wild.example': { a: ['198.18.9.9'] },
  'many.wild.example': { a: Array.from({ length: 25 }, (_, i) => `198.51.100.${200 + i}`) },
}
const networkPolicy = {
  defaultAction: 'deny',
  egress: [
    { action: 'allow', target: 'one.example' },
    { action: 'deny', target: 'bad.wild.example' },
    { action: 'allow', target: '*.wild.example' },
    { action: 'allow', target: '198.51.100.30' },
    { action: 'allow', target: '198.18.4.0/24' },
    { action: 'deny', target: '198.18.4.99' },
    { action: 'deny', target: '198.18.9.0/24' },
  ],
}

type Place = readonly [why: string, host: string, connects: boolean, address?: string]
/** In this order: an address learned from a name is open from then on. */
const places: readonly Place[] = [
  ['the address of an allowed name, before anybody asked', '198.51.100.11', false],
  ['a name', 'one.example', true, '198.51.100.11'],
  ['its address, now that it was learned', '198.51.100.11', true],
  ['a name in other letters', 'ONE.Example', true, '198.51.100.11'],
  ['a name nobody allowed', 'two.example', false, '198.51.100.12'],
  ['below a wildcard', 'a.wild.example', true, '198.51.100.13'],
  ['deep below a wildcard', 'a.b.wild.example', true, '198.51.100.14'],
  ['the name of the wildcard itself', 'wild.example', false, '198.51.100.15'],
  ['a name that only ends like it', 'notwild.example', false, '198.51.100.16'],
  ['denied by an earlier rule', 'bad.wild.example', false, '198.51.100.17'],
  ['an alias below the wildcard', 'alias.wild.example', true, '198.51.100.18'],
  ['an allowed name in a denied network', 'walled.wild.example', false, '198.18.9.9'],
  ['more addresses than a datagram holds', 'many.wild.example', true],
  ['an address', '198.51.100.30', true],
  ['the address beside it', '198.51.100.31', false],
  ['the first of a network', '198.18.4.0', true],
  ['the last of a network', '198.18.4.255', true],
  ['beside the network', '198.18.5.0', false],
  ['denied inside an allowed network', '198.18.4.99', false],
]

t.test('a policy that denies by default', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const open = await stack.create()
  const guarded = await stack.create({ networkPolicy })
  const everywhere = places.flatMap(([, host]) => triesFor(host))
  t.same(await attackTogether(open.main, everywhere), everywhere.map(() => 'ok'), 'without a policy every place answers', { everywhere })
  for (const place of places) await tryPlace(t, internet, guarded, place)
  await internet.forget()
  await attackTogether(guarded.main, triesFor('two.example'))
  t.equal(questionsFor(await internet.questions(), 'two.example'), 0, 'a denied name is never asked for outside')
  await t.test('no IPv6 at all', async (t) => {
    const addresses = await guarded.run(['cat', '/proc/net/if_inet6'])
    t.equal(addresses.stdout.trim(), '', 'no address, not even link-local')
  })
  t.equal(await internet.strays(), 0)
})

t.test('a policy that allows by default', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const guarded = await stack.create({ networkPolicy: { defaultAction: 'allow', egress: [{ action: 'deny', target: 'two.example' }, { action: 'deny', target: '198.18.4.0/24' }] } })
  const cases: Place[] = [
    ['a name nobody spoke of', 'one.example', true, '198.51.100.11'],
    ['a denied name', 'two.example', false, '198.51.100.12'],
    ['an address nobody spoke of', '198.51.100.30', true],
    ['an address in a denied network', '198.18.4.7', false],
  ]
  for (const place of cases) await tryPlace(t, internet, guarded, place)
  t.equal(await internet.strays(), 0)
})

t.test('policies that allow nothing', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  for (const empty of [{}, { defaultAction: 'deny' }, { egress: [] }]) {
    const guarded = await stack.create({ networkPolicy: empty })
    await internet.forget()
    const said = await attackTogether(guarded.main, ['one.example', '198.51.100.30'].flatMap(triesFor))
    t.notMatch(said, /ok/, `${JSON.stringify(empty)}: nothing answers`)
    t.same((await internet.flows()).filter((flow) => flow.to !== '198.51.100.53'), [], 'nothing arrived but what the sidecar itself asks')
    t.equal(questionsFor(await internet.questions(), 'one.example'), 0, 'nor did a question')
    await guarded.remove()
  }
  t.equal(await internet.strays(), 0)
})

const triesFor = (host: string): string[][] => ['tcp', 'udp'].map((protocol) => [protocol, host, '443'])

async function tryPlace(t: Test, internet: Internet, sandbox: Sandbox, [why, host, connects, address = host]: Place): Promise<void> {
  await internet.forget()
  const said = await attackTogether(sandbox.main, triesFor(host))
  t.same(said.map((word) => word === 'ok'), [connects, connects], `${host}: ${why}`, { said })
  if (!connects) t.equal(packetsTo(await internet.flows(), address), 0, `${host}: no packet arrived`)
}
