/** Names, leases and policy changes against a kernel whose moments the test decides. */
import t from 'tap'
import { compilePolicy, type Rules } from '#policies/compile.ts'
import type { NetworkRule } from '#policies/document.ts'
import { createFirewall } from '../../egress-sidecar/firewall.ts'
import { createAddressJudge } from '../../egress-sidecar/judge.ts'
import { fakeNft } from './fake-nft.ts'

const allow = (...targets: string[]): Rules => compilePolicy({ defaultAction: 'deny', egress: targets.map((target): NetworkRule => ({ action: 'allow', target })) })
const setting = { filter: true, ipv6: true, exemption: { match: 'meta mark 0x1ee7', protocols: ['udp', 'tcp'] as const }, upstreams: [{ address: '198.51.100.53', port: 53 }], openResolvers: [], doh: { everywhere: false, addresses: [] }, control: false }
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

async function setUp(rules: Rules, now = (): number => 0) {
  const nft = fakeNft()
  const firewall = await createFirewall(rules, { nft, setting, mayOpen: createAddressJudge([]), now })
  return { nft, firewall }
}

t.test('an answer waits for the kernel, and so does the second answer with the same address', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  nft.hold()
  const told: string[] = []
  const first = firewall.open('a.example', ['198.51.100.1'], 60, rules).then((result) => told.push(`first ${result}`))
  const second = firewall.open('b.example', ['198.51.100.1'], 60, rules).then((result) => told.push(`second ${result}`))
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
  const opened = Array.from({ length: 500 }, (_, i) => firewall.open('a.example', [`198.18.${i >> 8}.${i & 255}`], 60, rules))
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
  const opened = firewall.open('a.example', ['198.51.100.1'], 60, rules)
  await turn()
  nft.confirm(new Error('no space'))
  t.equal(await opened, 'failed')
  const again = firewall.open('a.example', ['198.51.100.1'], 60, rules)
  await turn()
  nft.confirm()
  t.equal(await again, 'open')
})

t.test('leases: not extended while they cover the answer, extended when they do not, never shortened', async (t) => {
  const rules = allow('*.example')
  let time = 0
  const { nft, firewall } = await setUp(rules, () => time)
  await firewall.open('a.example', ['198.51.100.1'], 120, rules)
  await firewall.open('a.example', ['198.51.100.1'], 120, rules)
  t.equal(nft.transactions.length, 2, 'nothing to do')
  await firewall.open('a.example', ['198.51.100.1'], 60, rules)
  t.equal(nft.transactions.length, 2, 'a shorter lease changes nothing')
  time = 45_000
  await firewall.open('a.example', ['198.51.100.1'], 120, rules)
  t.match(nft.transactions[2], /^add element .* \{ 198\.51\.100\.1 \}; delete element .*; add element .* \{ 198\.51\.100\.1 timeout 120s \}$/, 'refreshed on kernels that keep the old expiry, too')
})

t.test('a new policy keeps what it still allows and shuts the rest', async (t) => {
  const wide = allow('*.example', '*.other')
  const { nft, firewall } = await setUp(wide)
  await firewall.open('a.example', ['198.51.100.1'], 60, wide)
  await firewall.open('b.other', ['198.51.100.2', '2001:db8::2'], 60, wide)
  await firewall.open('c.other', ['198.51.100.1'], 60, wide)
  const narrow = allow('*.example')
  await firewall.replace(narrow)
  t.equal(firewall.rules, narrow)
  const change = nft.transactions.at(-2) ?? ''
  t.match(change, /delete element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.2 \}/)
  t.match(change, /delete element inet opensandbox dyn_allow_v6 \{ 2001:db8::2 \}/)
  t.notMatch(change, /198\.51\.100\.1 /, 'another name still leads there')
  t.notMatch(change, /flush set inet opensandbox dyn|delete set inet opensandbox dyn/)
  t.match(nft.transactions.at(-1), /delete element .*198\.51\.100\.2/, 'once more, for the packet that renewed it meanwhile')
})

t.test('a deny rule for an address shuts it, whatever name led there', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  await firewall.open('a.example', ['198.51.100.1'], 60, rules)
  await firewall.replace(compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.example' }, { action: 'deny', target: '198.51.100.0/24' }] }))
  t.match(nft.transactions.at(-2), /delete element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.1 \}/)
})

t.test('a lookup that was judged under the old policy opens nothing under the new one', async (t) => {
  const old = allow('*.example')
  const { nft, firewall } = await setUp(old)
  nft.hold()
  const replaced = firewall.replace(allow('*.other'))
  await turn()
  const during = firewall.open('a.example', ['198.51.100.1'], 60, old)
  await turn()
  t.equal(nft.waiting, 1, 'the change is on its way, the address waits behind it')
  nft.confirm()
  t.equal(await during, 'stale')
  await replaced
  t.equal(await firewall.open('a.example', ['198.51.100.1'], 60, old), 'stale', 'and later, too')
  t.notMatch(nft.transactions.join('\n'), /198\.51\.100\.1 timeout/)
})

t.test('a lookup that the kernel already took is judged again, and the new policy shuts it', async (t) => {
  const old = allow('*.example')
  const { nft, firewall } = await setUp(old)
  nft.hold()
  const opening = firewall.open('a.example', ['198.51.100.1'], 60, old)
  await turn()
  const replaced = firewall.replace(allow('*.other'))
  await turn()
  nft.confirm()
  nft.confirm()
  await turn()
  nft.confirm()
  await replaced
  t.ok(['open', 'stale'].includes(await opening))
  t.match(nft.transactions.filter((text) => text.includes('flush chain')).at(-1), /delete element inet opensandbox dyn_allow_v4 \{ 198\.51\.100\.1 \}/)
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
  const opened = firewall.open('a.example', ['198.51.100.1'], 60, rules)
  await turn()
  nft.confirm()
  t.equal(await opened, 'open')
})

t.test('the table of learned addresses is bounded: the one learned longest ago is shut', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  const address = (i: number): string => `198.${18 + (i >> 16)}.${(i >> 8) & 255}.${i & 255}`
  for (let i = 0; i < 32768; i += 1024) await firewall.open('a.example', Array.from({ length: 1024 }, (_, k) => address(i + k)), 60, rules)
  t.notMatch(nft.transactions.at(-1), /delete/)
  await firewall.open('a.example', [address(32768)], 60, rules)
  t.match(nft.transactions.at(-1), new RegExp(`delete element inet opensandbox dyn_allow_v4 \\{ ${address(0).replaceAll('.', '\\.')} \\}`))
})
