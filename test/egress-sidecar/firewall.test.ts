/** Names, leases and policy changes against a kernel whose moments the test decides. */
import t from 'tap'
import { compilePolicy } from '#policies/compile.ts'
import { createFirewall } from '../../egress-sidecar/firewall.ts'
import { createAddressJudge } from '../../egress-sidecar/judge.ts'
import { NftError } from '../../egress-sidecar/nft.ts'
import { fakeNft } from './fake-nft.ts'
import { allow, place, setting, setUp, turn } from './played-firewall.ts'

t.test('an answer waits for the kernel, and so does the second answer with the same address', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  nft.hold()
  const told: string[] = []
  const first = Promise.resolve(firewall.open('a.example', [], ['198.51.100.1'], 60, rules)).then((result) => told.push(`first ${result}`))
  const second = Promise.resolve(firewall.open('b.example', [], ['198.51.100.1'], 60, rules)).then((result) => told.push(`second ${result}`))
  await turn()
  t.same(told, [], 'nobody is told before')
  nft.confirm()
  await Promise.all([first, second])
  t.same(told, ['first open', 'second open'])
  t.equal(nft.transactions.length, 2, 'the policy, and one element for both')
})

t.test('what comes in while nft works goes out in one command', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  nft.hold()
  const opened = Array.from({ length: 500 }, (_, i) => firewall.open('a.example', [], [`198.18.${i >> 8}.${i & 255}`], 60, rules))
  await turn()
  nft.confirm()
  await turn()
  t.equal(nft.waiting, 1)
  nft.confirm()
  t.same(new Set(await Promise.all(opened)), new Set(['open']))
  t.equal(nft.transactions.length, 3, 'policy, the first, all the others')
})

t.test('without a confirmation the address is not told, and is tried anew', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  nft.hold()
  const opened = firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  await turn()
  nft.confirm(new Error('no space'))
  t.equal(await opened, 'failed')
  const again = firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  await turn()
  nft.confirm()
  t.equal(await again, 'open')
})

t.test('leases: not extended while they cover the answer, extended when they do not, never shortened', async (t) => {
  const rules = allow('*.example')
  let time = 0
  const { nft, firewall } = await setUp(rules, () => time)
  await firewall.open('a.example', [], ['198.51.100.1'], 120, rules)
  await firewall.open('a.example', [], ['198.51.100.1'], 120, rules)
  t.equal(nft.transactions.length, 2, 'nothing to do')
  await firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  t.equal(nft.transactions.length, 2, 'a shorter lease changes nothing')
  time = 45_000
  await firewall.open('a.example', [], ['198.51.100.1'], 120, rules)
  t.match(nft.transactions[2], /^add element .* \{ 198\.51\.100\.1 \}; delete element .*; add element .* \{ 198\.51\.100\.1 timeout 120s \}$/, 'refreshed on kernels that keep the old expiry, too')
})

t.test('a new policy keeps what it still allows and shuts the rest', async (t) => {
  const wide = allow('*.example', '*.other')
  const { nft, firewall } = await setUp(wide)
  await firewall.open('a.example', [], ['198.51.100.1'], 60, wide)
  await firewall.open('b.other', [], ['198.51.100.2', '2001:db8::2'], 60, wide)
  await firewall.open('c.other', [], ['198.51.100.1'], 60, wide)
  const narrow = allow('*.example')
  await firewall.replace(narrow)
  t.equal(firewall.rules, narrow)
  const change = nft.transactions.at(-2) ?? ''
  t.match(change, /add element inet opensandbox shut_v4 \{ 198\.51\.100\.2 \}/)
  t.match(change, /add element inet opensandbox shut_v6 \{ 2001:db8::2 \}/)
  t.match(change, /ip daddr @shut_v4 goto denied.*ip6 daddr @shut_v6 goto denied.*ip daddr @dyn_allow_v4/, 'and the rules look at the ban first')
  t.notMatch(change, /198\.51\.100\.1 /, 'another name still leads there')
  t.notMatch(change, /flush set inet opensandbox dyn|delete set inet opensandbox dyn/)
  t.match(nft.transactions.at(-1), /delete element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.2 \}.*delete element inet opensandbox dyn_allow_v6 \{ 2001:db8::2 \}.*flush set inet opensandbox shut_v4/, 'deleted when no packet can renew it any more')
})

t.test('a deny rule for an address shuts it, whatever name led there', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  await firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  await firewall.replace(compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.example' }, { action: 'deny', target: '198.51.100.0/24' }] }))
  t.match(nft.transactions.at(-2), /add element inet opensandbox shut_v4 \{ 198\.51\.100\.1 \}/)
})

t.test('a name that denies an alias shuts what was reached by it', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  await firewall.open('a.example', ['cdn.other'], ['198.51.100.1'], 60, rules)
  await firewall.open('b.example', ['cdn.other'], ['198.51.100.2'], 60, rules)
  await firewall.open('c.example', [], ['198.51.100.2'], 60, rules)
  await firewall.open('d.example', [], ['198.51.100.3'], 60, rules)
  await firewall.open('d.example', ['cdn.other'], ['198.51.100.3'], 60, rules)
  await firewall.replace(compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.example' }, { action: 'deny', target: 'cdn.other' }] }))
  t.match(nft.transactions.at(-2), /add element inet opensandbox shut_v4 \{ 198\.51\.100\.1, 198\.51\.100\.3 \}/, 'not what another name leads to as well; the last way counts')
})

t.test('sixteen names are remembered of an address: it stays open while one of them is allowed', async (t) => {
  const rules = allow('*.example')
  const names = Array.from({ length: 20 }, (_, i) => `n${i}.example`)
  const rows: { why: string; asked: string[]; allowed: string[]; shut: boolean }[] = [
    { why: 'twenty, the last sixteen are denied', asked: names, allowed: names.slice(0, 4), shut: true },
    { why: 'twenty, the last alone is allowed', asked: names, allowed: names.slice(19), shut: false },
    { why: 'twenty, the oldest of the last sixteen is allowed', asked: names, allowed: names.slice(4, 5), shut: false },
    { why: 'twenty, the one before it is allowed', asked: names, allowed: names.slice(3, 4), shut: true },
    { why: 'sixteen, the first is allowed', asked: names.slice(0, 16), allowed: names.slice(0, 1), shut: false },
    { why: 'a name that comes again is no further one', asked: [...names.slice(0, 16), ...names.slice(1, 16), 'n15.example'], allowed: names.slice(0, 1), shut: false },
    { why: 'one that was forgotten and comes again is the last', asked: [...names, 'n0.example'], allowed: names.slice(0, 1), shut: false },
  ]
  for (const { why, asked, allowed, shut } of rows) {
    const { nft, firewall } = await setUp(rules)
    for (const name of asked) await firewall.open(name, [], ['198.51.100.1', '198.51.100.2'], 60, rules)
    await firewall.open('other.example', [], ['198.51.100.3'], 60, rules)
    const before = nft.transactions.length
    await firewall.replace(allow(...allowed, 'other.example'))
    t.same([.../add element inet opensandbox shut_v4 \{ ([^}]+) \}/.exec(nft.transactions[before] ?? '') ?? []].slice(1), shut ? ['198.51.100.1, 198.51.100.2'] : [], why)
    t.equal(firewall.learned, shut ? 1 : 3, why)
  }
})

t.test('names of one address without end: the last sixteen are remembered, and judged', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  const names = Array.from({ length: 5000 }, (_, i) => `n${i}.example`)
  for (const name of names) await firewall.open(name, [], ['198.51.100.1'], 60, rules)
  t.equal(nft.transactions.length, 2, 'opened once')
  const judged: string[] = []
  class Asked extends Map<string, number> {
    override get(name: string): number | undefined {
      judged.push(name)
      return super.get(name)
    }
  }
  const narrow = allow('*.other')
  await firewall.replace({ ...narrow, exact: new Asked(narrow.exact) })
  t.same(judged, names.slice(-16))
  t.equal(firewall.learned, 0)
})

t.test('a lookup that was judged under the old policy opens nothing under the new one', async (t) => {
  const old = allow('*.example')
  const { nft, firewall } = await setUp(old)
  nft.hold()
  const replaced = firewall.replace(allow('*.other'))
  await turn()
  const during = firewall.open('a.example', [], ['198.51.100.1'], 60, old)
  await turn()
  t.equal(nft.waiting, 1, 'the change is on its way, the address waits behind it')
  nft.confirm()
  t.equal(await during, 'stale')
  await replaced
  t.equal(await firewall.open('a.example', [], ['198.51.100.1'], 60, old), 'stale', 'and later, too')
  t.notMatch(nft.transactions.join('\n'), /198\.51\.100\.1 timeout/)
  t.equal(firewall.learned, 0, 'and nobody says that it was learned')
})

t.test('what waits behind a policy change: an address that the kernel has stays in the table, a new one does not', async (t) => {
  const rules = allow('*.example')
  let time = 0
  const { nft, firewall } = await setUp(rules, () => time)
  await firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  time = 50_000
  nft.hold()
  const both = allow('*.example', '*.other')
  const replaced = firewall.replace(both)
  await turn()
  const renewed = firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  const twice = [60, 120].map((seconds) => firewall.open('b.example', [], ['198.51.100.2'], seconds, rules))
  await turn()
  nft.confirm()
  t.same(await Promise.all([renewed, ...twice]), ['stale', 'stale', 'stale'])
  await replaced
  t.equal(firewall.learned, 1)
  const again = firewall.open('b.example', [], ['198.51.100.1', '198.51.100.2'], 60, both)
  await turn()
  nft.confirm()
  t.equal(await again, 'open')
  t.match(nft.transactions.at(-1), /delete element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.1 \}; add element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.1 timeout 60s, 198\.51\.100\.2 timeout 60s \}/, 'the one is renewed, the other is new')
})

t.test('a lookup that the kernel already took is judged again, and the new policy shuts it', async (t) => {
  const old = allow('*.example')
  const { nft, firewall } = await setUp(old)
  nft.hold()
  const opening = firewall.open('a.example', [], ['198.51.100.1'], 60, old)
  await turn()
  const replaced = firewall.replace(allow('*.other'))
  await turn()
  t.equal(nft.waiting, 1, 'the policy waits for what is on its way')
  for (let transaction = 0; transaction < 3; transaction++) {
    nft.confirm()
    await turn()
  }
  await replaced
  t.ok(['open', 'stale'].includes(await opening))
  t.match(nft.transactions.filter((text) => text.includes('flush chain')).at(-1), /add element inet opensandbox shut_v4 \{ 198\.51\.100\.1 \}/)
})

t.test('a policy that the kernel refuses changes nothing', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  nft.hold()
  const replaced = firewall.replace(allow('*.other'))
  await turn()
  nft.confirm(new Error('Invalid argument'))
  await t.rejects(replaced, /Invalid argument/)
  t.equal(firewall.rules, rules)
  const opened = firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  await turn()
  nft.confirm()
  t.equal(await opened, 'open')
})

t.test('a policy that the kernel refuses leaves what was learned to be asked anew', async (t) => {
  const rules = allow('*.example', '*.other')
  const { nft, firewall } = await setUp(rules)
  await firewall.open('a.other', [], ['198.51.100.1'], 60, rules)
  nft.hold()
  const replaced = firewall.replace(allow('*.example'))
  await turn()
  nft.confirm(new Error('No buffer space available'))
  await t.rejects(replaced, /No buffer space/)
  const other = firewall.open('b.other', [], ['198.51.100.2'], 60, rules)
  await turn()
  nft.confirm()
  t.equal(await other, 'open')
  t.notMatch(nft.transactions.at(-1), /198\.51\.100\.1/, 'the next answer takes nothing away that is still allowed')
  const again = firewall.open('a.other', [], ['198.51.100.1'], 60, rules)
  await turn()
  t.equal(nft.waiting, 1, 'whether the kernel has it is not taken for granted')
  nft.confirm()
  t.equal(await again, 'open')
})

t.test('bans that went ahead of a policy which the kernel then refused are lifted with its refusal', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  for (let i = 0; i < 10_000; i += 1000) await firewall.open('a.example', [], Array.from({ length: 1000 }, (_, k) => place(i + k)), 60, rules)
  nft.hold()
  const before = nft.transactions.length
  const replaced = firewall.replace(allow('*.other'))
  await turn()
  nft.confirm()
  await turn()
  nft.confirm(new Error('Cannot allocate memory'))
  await turn()
  nft.confirm()
  await t.rejects(replaced, /Cannot allocate/)
  const [ahead, policy, lifted, ...more] = nft.transactions.slice(before)
  t.match(ahead, /^add element inet opensandbox shut_v4/)
  t.match(policy, /flush chain/)
  t.equal(lifted, 'flush set inet opensandbox shut_v4; flush set inet opensandbox shut_v6', 'and nothing that is still allowed is deleted')
  t.same(more, [])
  t.equal(firewall.learned, 10_000)
})

t.test('a policy that the kernel may have all the same is taken back', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall, lost } = await setUp(rules)
  await firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  const enforced = nft.transactions[0] as string
  nft.hold()
  const before = nft.transactions.length
  const replaced = firewall.replace(allow('*.other', '203.0.113.0/24'))
  await turn()
  nft.confirm(new NftError('nft did not confirm within 30000 ms', 'unknown'))
  await turn()
  nft.confirm()
  await turn()
  nft.confirm()
  await t.rejects(replaced, /did not confirm/)
  const [wanted, again, lifted, ...more] = nft.transactions.slice(before)
  t.match(wanted, /203\.0\.113\.0/)
  const but = (text: string | undefined): string | undefined => text?.replaceAll(/ct mark (set )?\S+/g, 'ct mark')
  t.equal(but(again), but(enforced), 'the old policy as a whole')
  t.not(again, enforced, 'under a number of its own: what the new one let in is not taken for established')
  t.match(lifted, /^flush set inet opensandbox shut_v4/, 'and what it may have banned is free again')
  t.same([more, lost], [[], []])
  t.equal(firewall.rules, rules)
})

t.test('taken back with what the change before it shut, whose ban is not lifted yet', async (t) => {
  const rules = allow('*.example', '*.other')
  const { nft, firewall } = await setUp(rules)
  await firewall.open('a.other', [], ['198.51.100.1'], 60, rules)
  nft.hold()
  const narrowed = firewall.replace(allow('*.example'))
  for (const error of [undefined, new NftError('nft ended', 'unknown')]) {
    await turn()
    nft.confirm(error)
  }
  await narrowed
  const widened = firewall.replace(allow('*.other'))
  await turn()
  nft.confirm(new NftError('nft ended', 'unknown'))
  const before = nft.transactions.length
  for (let i = 0; i < 4; i++) {
    await turn()
    nft.confirm()
  }
  await t.rejects(widened, /nft ended/)
  const again = nft.transactions.slice(before).join('\n')
  t.match(again, /add element inet opensandbox shut_v4 \{ 198\.51\.100\.1 \}[^]*ip daddr @shut_v4 goto denied/, 'it stays banned')
  t.match(again, /delete element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.1 \}/, 'until it is deleted')
})

t.test('where that fails, too, nobody can say what the kernel lets out', async (t) => {
  for (const [outcome, gone] of [['unknown', true], ['refused', false]] as const) {
    const { nft, firewall, lost } = await setUp(allow('*.example'))
    nft.hold()
    const replaced = firewall.replace(allow('*.other'))
    for (let transaction = 0; transaction < 3; transaction++) {
      await turn()
      nft.confirm(new NftError('nft ended', outcome))
    }
    await t.rejects(replaced, /nft ended/)
    t.same(lost, gone ? ['nft ended'] : [], outcome)
  }
})

t.test('ways with many aliases are judged once for all the addresses of an answer', async (t) => {
  const rules = allow('*.example')
  const { firewall } = await setUp(rules)
  const aliases = Array.from({ length: 16 }, (_, i) => `${`${i % 10}.`.repeat(120)}example`)
  for (let i = 0; i < 8; i++) await firewall.open(`n${i}.example`, [...aliases], Array.from({ length: 4000 }, (_, k) => place(i * 4000 + k)), 60, rules)
  const begun = performance.now()
  await firewall.replace(allow('*.example', '*.other'))
  const took = performance.now() - begun
  t.equal(firewall.learned, 32_000)
  t.ok(took < 2000, `${took.toFixed(0)} ms`)
})

t.test('connections of a sidecar that was here before are not taken for ours', async (t) => {
  const nft = fakeNft()
  await createFirewall(allow('*.example'), { nft, setting, mayOpen: createAddressJudge([]), now: () => 0, firstGeneration: 0x1234567, lost: () => undefined })
  t.match(nft.transactions[0], /ct mark 0x1234567 ct state established/)
})
