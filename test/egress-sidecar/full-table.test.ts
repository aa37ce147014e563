/** More addresses than the kernel is to hold: what is refused, and what is given up. */
import t from 'tap'
import { chooseGivenUp, readLeases } from '../../egress-sidecar/full-table.ts'
import { allow, place, setUp, turn } from './played-firewall.ts'

t.test('a flood of answers: no more than the kernel holds, no transaction larger than nft can take, and the policy can be changed', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  nft.hold()
  const opened: Promise<string>[] = []
  // 60 answers of 2,000 addresses, faster than nft works.
  for (let i = 0; i < 60; i++) {
    opened.push(Promise.resolve(firewall.open(`n${i}.example`, [], Array.from({ length: 2000 }, (_, k) => place(i * 2000 + k)), 60, rules)))
    if (i % 5 === 4) {
      await turn()
      nft.confirm()
      await turn()
    }
  }
  for (let i = 0; i < 60; i++) {
    nft.confirm()
    await turn()
  }
  const results = await Promise.all(opened)
  t.ok(results.includes('open') && results.includes('failed'), 'some are told, the others are SERVFAIL')
  t.ok(firewall.learned <= 40_960, `${firewall.learned} addresses`)
  const small = Promise.resolve(firewall.open('small.example', [], ['198.51.100.1'], 60, rules))
  await turn()
  nft.confirm()
  t.equal(await small, 'open', 'and afterwards names are answered as before')
  const before = nft.transactions.length
  const replaced = firewall.replace(allow('fine.other'))
  for (let i = 0; i < 40; i++) {
    await turn()
    nft.confirm()
  }
  await replaced
  t.equal(firewall.learned, 0)
  const change = nft.transactions.slice(before)
  const bans = new Set(change.flatMap((text) => [...text.matchAll(/add element inet opensandbox shut_v4 \{ ([^}]+) \}/g)].flatMap(([, list]) => list!.split(', '))))
  const deleted = new Set(change.flatMap((text) => [...text.matchAll(/delete element inet opensandbox dyn_allow_v4 \{ ([^}]+) \}/g)].flatMap(([, list]) => list!.split(', '))))
  t.ok(bans.size > 8192, `${bans.size} bans`)
  t.same(deleted, bans, 'all are deleted')
  const policyAt = change.findIndex((text) => text.includes('flush chain'))
  t.ok(change.slice(0, policyAt + 1).every((text) => !text.includes('delete element')) && change.slice(policyAt + 1).every((text) => !text.includes('add element inet opensandbox shut')), 'banned before the policy, deleted behind it')
  t.match(change.at(-1), /flush set inet opensandbox shut_v4; flush set inet opensandbox shut_v6$/)
  const sizes = nft.transactions.map((text) => Math.max(0, ...[...text.matchAll(/\{ ([^}]+) \}/g)].map(([, list]) => list!.split(', ').length)))
  t.ok(Math.max(...sizes) <= 8192, `at most ${Math.max(...sizes)} addresses in one command`)
})

const sets = ['set inet opensandbox dyn_allow_v4', 'set inet opensandbox dyn_allow_v6'] as const

/** 32,768 addresses learned at moment 0 for a minute, the last of them pushed over the limit at moment 30,000. */
async function fill(listed: (i: number) => string) {
  let time = 0
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules, () => time)
  for (let i = 0; i < 32768; i += 1024) await firewall.open('a.example', [], Array.from({ length: 1024 }, (_, k) => place(i + k)), 60, rules)
  const before = nft.transactions.length
  const full = firewall.learned
  for (const set of sets) nft.listings.set(set, `table inet opensandbox {\n\tset x {\n\t\ttimeout 6m\n\t\telements = { ${set.endsWith('4') ? Array.from({ length: 32768 }, (_, i) => listed(i)).join(',\n\t\t\t') : ''} }\n\t}\n}\n`)
  time = 30_000
  await firewall.open('b.example', [], ['198.51.100.1'], 60, rules)
  while (firewall.learned > full) await turn()
  const learned = firewall.learned
  await firewall.open('b.example', [], ['198.51.100.2'], 60, rules)
  const last = nft.transactions.at(-1) ?? ''
  return { nft, firewall, full, learned, between: nft.transactions.slice(before, -1).join(), deleted: new Set(/delete element inet opensandbox dyn_allow_v4 \{ ([^}]+) \}/.exec(last)?.[1]?.split(', ')) }
}

t.test('a full table: what nobody uses is given up, the one learned longest ago first', async (t) => {
  const { full, learned, between, deleted } = await fill((i) => `${place(i)} timeout ${i < 5000 ? '6m expires 5m59s912ms' : '1m30s expires 29s100ms'}`)
  t.equal(full, 32768)
  t.notMatch(between, /delete/)
  t.equal(learned, 32768 - 4096, 'an eighth of it at once')
  t.equal(deleted.size, 4097)
  t.notOk(Array.from({ length: 5000 }, (_, i) => place(i)).some((address) => deleted.has(address)), 'none of those that a packet has renewed')
  t.ok(deleted.has(place(5000)) && deleted.has(place(5000 + 4096)) && !deleted.has(place(5000 + 4097)), 'the oldest of the others')
})

t.test('what was given up may have been put back by a packet: the next policy shuts it all the same', async (t) => {
  const { firewall, nft, deleted } = await fill((i) => `${place(i)} timeout 1m30s expires 29s100ms`)
  t.equal(deleted.size, 4097)
  await firewall.open('a.example', [], [place(1)], 60, firewall.rules)
  const bansOf = async (change: Promise<void>): Promise<Set<string>> => {
    const before = nft.transactions.length
    await change
    await turn()
    return new Set(nft.transactions.slice(before).flatMap((text) => [...text.matchAll(/add element inet opensandbox shut_v4 \{ ([^}]+) \}/g)].flatMap(([, list]) => list!.split(', '))))
  }
  const kept = await bansOf(firewall.replace(allow('*.example')))
  t.same([kept.size, kept.has(place(0)), kept.has(place(1)), kept.has(place(4096)), kept.has(place(4097))], [4096, true, false, true, false], 'also one that still allows the name, but for those that were learned anew')
  t.equal((await bansOf(firewall.replace(allow('*.example')))).size, 0, 'once')
  const all = await bansOf(firewall.replace(allow('fine.other')))
  t.ok(all.has(place(1)) && all.has(place(4097)) && !all.has(place(0)))
})

t.test('a full table, everything in use: the one used longest ago', async (t) => {
  const { deleted } = await fill((i) => `${place(i)} timeout 6m expires ${i === 7 ? '5m' : i === 8 ? '5m999ms' : '5m1s'}`)
  t.ok(deleted.has(place(7)) && deleted.has(place(8)) && deleted.size === 4097)
})

t.test('a full table, and the kernel cannot be asked: those learned longest ago', async (t) => {
  const rules = allow('*.example')
  const { nft, firewall } = await setUp(rules)
  for (let i = 0; i < 32769; i += 1024) await firewall.open('a.example', [], Array.from({ length: 1024 }, (_, k) => place(i + k)), 60, rules)
  while (firewall.learned > 32768) await turn()
  await firewall.open('a.example', [], ['198.51.100.1'], 60, rules)
  t.match(nft.transactions.at(-1), /delete element inet opensandbox dyn_allow_v4 \{ 198\.18\.0\.0, 198\.18\.0\.1, /)
})

t.test('leases that ran out are forgotten, not shut', async (t) => {
  const lease = (until: number, batch: object | null = null) => ({ until, batch })
  const learned = new Map([['a', lease(10)], ['b', lease(10)], ['c', lease(90)], ['d', lease(10, {})], ['e', lease(90)]])
  t.same(chooseGivenUp(learned, new Map([['b', 400_000], ['c', 40]]), 50, 2), { over: ['a'], shut: ['c', 'e'] }, 'what the kernel does not have, unless it was asked for a moment ago')
  t.same(chooseGivenUp(learned, new Map(), 50, 3), { over: ['a', 'b'], shut: [] }, 'and when that is enough, nothing else')
  t.same(readLeases('elements = { 198.51.100.1 timeout 1m30s expires 1m29s912ms, 198.51.100.2 expires 5m59s8ms,\n\t2001:db8:0:1::1 timeout 6m expires 880ms }'), new Map([['198.51.100.1', 89_912], ['198.51.100.2', 359_008], ['2001:db8:0:1::1', 880]]))
})
