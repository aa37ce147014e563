/** What waits for answers by its id: random ids, none twice, none for something else, and an end to what can wait. */
import t from 'tap'
import { PendingTable } from '../../egress-sidecar/pending-table.ts'

t.test('an entry is found under its id only, until it is deleted', async (t) => {
  const table = new PendingTable<string>()
  const a = table.add('a')
  const b = table.add('b')
  t.not(a, b)
  t.equal(table.get(a), 'a')
  t.equal(table.get(b), 'b')
  // Ids that share a's place: a forger who knows how the table is built is not helped.
  for (let id = a % 1024; id < 0x10000; id += 1024) if (id !== a) t.equal(table.get(id), null)
  t.same(new Map(table.all()), new Map([[a, 'a'], [b, 'b']]))
  table.delete(a, 'somebody else')
  t.equal(table.get(a), 'a', 'only what is meant')
  table.delete(a, 'a')
  t.equal(table.get(a), null)
  t.same(table.all(), [[b, 'b']])
})

t.test('full tables refuse, and take again what has room', async (t) => {
  const table = new PendingTable<number>()
  const ids = new Map<number, number>()
  for (let tries = 0; tries < 20_000; tries++) {
    const id = table.add(tries)
    if (id !== -1) ids.set(id, tries)
  }
  t.equal(ids.size, 1024, 'every place is found in the end, and no id given twice')
  t.equal(table.add(-1), -1, 'no room')
  for (const [id, entry] of ids) table.delete(id, entry)
  t.same(table.all(), [])
  t.ok(table.add(1) >= 0)
})

t.test('ids use all sixteen bits, evenly', async (t) => {
  const table = new PendingTable<number>()
  const ones = Array<number>(16).fill(0)
  const rounds = 20_000
  for (let round = 0; round < rounds; round++) {
    const id = table.add(round)
    table.delete(id, round)
    for (let bit = 0; bit < 16; bit++) if ((id >> bit) & 1) ones[bit]!++
  }
  // Seven standard deviations: never by chance.
  for (const [bit, count] of ones.entries()) t.ok(Math.abs(count - rounds / 2) < 7 * Math.sqrt(rounds / 4), `bit ${bit}: ${count}`)
})
