/** What is remembered of the names that led to addresses: bounded in number and size, and judged once. */
import t from 'tap'
import { compilePolicy } from '#policies/compile.ts'
import { createLeadBook, leadJudge, type Lead } from '../../egress-sidecar/leads.ts'

const limits = { leads: 100, bytes: 10_000 }

t.test('sixteen names of an address, the oldest goes first; the last way of a name counts', async (t) => {
  const book = createLeadBook(limits)
  const leads: Lead[] = []
  for (let i = 0; i < 20; i++) book.note(leads, `n${i}`, [])
  t.same(leads.map(({ name }) => name), Array.from({ length: 16 }, (_, i) => `n${i + 4}`))
  book.note(leads, 'n10', ['by.example'])
  t.same(leads.filter(({ name }) => name === 'n10'), [{ name: 'n10', aliases: ['by.example'] }])
  t.equal(leads.length, 16)
})

t.test('no more in all, until some are struck', async (t) => {
  const rows: [what: string, aliases: (i: number) => Lead['aliases'], least: number, most: number][] = [
    ['many short ones', () => [], 100, 100],
    ['long chains, each its own', (i) => Array.from({ length: 16 }, (_, k) => `${'x'.repeat(200)}${i}.${k}`), 2, 4],
  ]
  for (const [what, aliases, least, most] of rows) {
    const book = createLeadBook(limits)
    const remembered: Lead[][] = []
    const fill = (): number => {
      const before = remembered.flat().length
      for (let i = 0; i < 1000; i++) {
        const leads: Lead[] = []
        book.note(leads, `n${i}.example`, aliases(i))
        remembered.push(leads)
      }
      return remembered.flat().length - before
    }
    const first = fill()
    t.ok(first >= least && first <= most, `${what}: ${first} of 1000`)
    t.equal(fill(), 0, `${what}: full`)
    for (const leads of remembered.splice(0)) book.strike(leads)
    t.equal(fill(), first, `${what}: as many again when all are struck`)
  }
})

t.test('addresses of one answer share their aliases, which count once', async (t) => {
  const book = createLeadBook(limits)
  const aliases = Array.from({ length: 16 }, (_, k) => `${'x'.repeat(200)}.${k}`)
  const lists = Array.from({ length: 50 }, () => [] as Lead[])
  for (const leads of lists) book.note(leads, 'a.example', aliases)
  t.equal(lists.flat().length, 50)
})

t.test('a hundred thousand ways under long names are judged within the patience of whoever changes a policy', async (t) => {
  const allows = leadJudge(compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.evil.example' }] }))
  const leads = Array.from({ length: 100_000 }, (_, i): Lead => ({ name: `${'a.'.repeat(110)}n${i}.evil.example`, aliases: [] }))
  const begun = performance.now()
  t.ok(leads.every(allows))
  const took = performance.now() - begun
  t.ok(took < 1000, `${took.toFixed(0)} ms`)
  t.notOk(allows({ name: 'a.good.example', aliases: [] }))
  t.notOk(leadJudge(compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.evil.example' }, { action: 'deny', target: 'by.example' }] }))({ name: 'a.evil.example', aliases: ['by.example'] }), 'nor by an alias that a rule denies')
})
