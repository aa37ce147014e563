/** Interleaving, medians and ratios of the bench, and how they are printed. */
import t from 'tap'
import { formatMicro, judge } from '../../bench/micro.ts'
import { Cleanups } from '../../bench/program.ts'
import { formatResult } from '../../bench/report.ts'
import { goalMet, median, percentile, runLoad, type Load } from '../../bench/rounds.ts'

/** A machine that gets ten times slower half-way: absolute times are useless, ratios are not. */
function slowingLoad(order: string[]): Load {
  const run = (name: string, cost: number) => async () => {
    const slow = order.length >= 4 ? 10 : 1
    order.push(name)
    return { cpu: cost * slow }
  }
  return {
    title: 'work', rounds: 3, baseline: 'theirs', measures: [{ key: 'cpu', label: 'CPU', unit: 'µs' }],
    contenders: { theirs: run('theirs', 20), ours: run('ours', 30) },
    goals: [{ contender: 'ours', measure: 'cpu', sense: 'at most', limit: 2 }, { contender: 'ours', measure: 'cpu', sense: 'at most', limit: 1.4 }],
  }
}

t.test('every contender runs once a round, the first one changes, ratios stay within a round', async (t) => {
  const order: string[] = []
  const result = await runLoad(slowingLoad(order), 3)
  t.same(order, ['theirs', 'ours', 'ours', 'theirs', 'theirs', 'ours'])
  t.same(result.figures.get('ours')?.get('cpu'), { median: 30, ratio: 1.5, lowest: 1.5, highest: 1.5 })
  t.same(result.load.goals.map((goal) => goalMet(goal, result)), [true, false])
  const text = formatResult(result)
  t.match(text, '| ours   | 1.50× (30.0) |')
  t.match(text, '- met: ours, CPU at most 2× theirs: 1.50×')
  t.match(text, '- MISSED: ours, CPU at most 1.4× theirs: 1.50×')
})

t.test('a goal against another contender than the baseline, and one in the unit of the measure', async (t) => {
  const load: Load = {
    ...slowingLoad([]), notes: ['a word about it'],
    goals: [
      { contender: 'theirs', measure: 'cpu', against: 'ours', sense: 'at most', limit: 0.7 },
      { contender: 'ours', measure: 'cpu', against: null, sense: 'at most', limit: 30 },
      { contender: 'ours', measure: 'cpu', against: null, sense: 'at most', limit: 29 },
      { contender: 'ours', measure: 'cpu', against: 'nobody', sense: 'at most', limit: 1 },
    ],
  }
  const result = await runLoad(load, 3)
  t.same(load.goals.map((goal) => goalMet(goal, result)), [true, true, false, false])
  const text = formatResult(result)
  t.match(text, '- a word about it')
  t.match(text, '- met: theirs, CPU at most 0.7× ours: 0.67×, rounds 0.67–0.67')
  t.match(text, '- met: ours, CPU at most 30 µs: 30.0 µs, rounds 30.0–300.0')
  t.match(text, '- MISSED: ours, CPU at most 29 µs: 30.0 µs')
  t.match(text, '- MISSED: ours, CPU at most 1× nobody: no figure')
})

t.test('a goal of one function against another, batch by batch', async (t) => {
  const times = new Map([['short', [10, 100, 10]], ['long', [30, 300, 20]]])
  const result = judge('work', times, [{ name: 'long', against: 'short', limit: 1.5 }, { name: 'short', against: 'long', limit: 0.9 }])
  t.same([...result.nanoseconds], [['short', 10], ['long', 30]])
  const text = formatMicro(result)
  t.match(text, '- MISSED: long, at most 1.5× short: 3.00×')
  t.match(text, '- met: short, at most 0.9× long: 0.33×')
})

t.test('a figure that was not measured meets no goal', async (t) => {
  const load: Load = { ...slowingLoad([]), goals: [] }
  const result = await runLoad(load, 1)
  for (const sense of ['at most', 'at least'] as const) t.equal(goalMet({ contender: 'ours', measure: 'p99', sense, limit: 1 }, result), false)
})

t.test('median and percentile', async (t) => {
  t.equal(median([3, 1, 2]), 2)
  t.equal(median([4, 1, 3, 2]), 2.5)
  t.equal(percentile([1, 2, 3, 4], 0.5), 2)
  t.equal(percentile([1, 2, 3, 4], 0.99), 4)
  t.ok(Number.isNaN(percentile([], 0.5)))
})

t.test('clean-up goes backwards, past failures, and takes what comes late', async (t) => {
  const undone: number[] = []
  const cleanups = new Cleanups()
  cleanups.add(async () => { undone.push(1) })
  cleanups.add(async () => { throw new Error('stuck') })
  cleanups.add(async () => { undone.push(3) })
  await t.rejects(cleanups.run(), /could not clean up/)
  t.same(undone, [3, 1])
  cleanups.add(async () => { undone.push(4) })
  await t.rejects(cleanups.run(), /could not clean up/)
  t.same(undone, [3, 1, 4], 'a start that was interrupted leaves nothing')
})
