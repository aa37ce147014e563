/** What one function costs: processor time of many calls a batch, collector included; several batches, the median batch is quoted. */
import { formatTable } from './report.ts'
import { median } from './rounds.ts'

/** Each case does one operation a call and returns something of it, so that the work cannot be optimised away; a promise is waited for. */
export type Micro = { readonly title: string; readonly cases: Readonly<Record<string, () => unknown>>; readonly goals?: readonly MicroGoal[] }
/** One case costs at most `limit` times another, batch by batch. */
export type MicroGoal = { readonly name: string; readonly against: string; readonly limit: number }
export type MicroResult = { readonly title: string; readonly nanoseconds: ReadonlyMap<string, number>; readonly goals: readonly (MicroGoal & { readonly ratio: number })[] }

const batches = 9
const batchNanoseconds = 20_000_000

/** Cases take turns, batch by batch, so that a slow moment hits all of them. */
export async function runMicro({ title, cases, goals = [] }: Micro): Promise<MicroResult> {
  const entries: { name: string; work: () => unknown; calls: number; times: number[] }[] = []
  for (const [name, work] of Object.entries(cases)) entries.push({ name, work, calls: await callsFor(work), times: [] })
  for (let batch = 0; batch < batches; batch++) for (const { work, calls, times } of entries) times.push((await timeBatch(work, calls)) / calls)
  return judge(title, new Map(entries.map(({ name, times }) => [name, times])), goals)
}

/** @param times ns a call of each batch, by case */
export function judge(title: string, times: ReadonlyMap<string, readonly number[]>, goals: readonly MicroGoal[]): MicroResult {
  const ratioOf = ({ name, against }: MicroGoal): number => median(times.get(name)!.map((time, batch) => time / times.get(against)![batch]!))
  return { title, nanoseconds: new Map([...times].map(([name, batches]) => [name, median(batches)])), goals: goals.map((goal) => ({ ...goal, ratio: ratioOf(goal) })) }
}

export function formatMicro({ title, nanoseconds, goals }: MicroResult): string {
  const lines = goals.map(({ name, against, limit, ratio }) => `- ${ratio <= limit ? 'met' : 'MISSED'}: ${name}, at most ${limit}× ${against}: ${ratio.toFixed(2)}×`)
  return [`## ${title}`, '', formatTable([['', 'ns a call'], ...[...nanoseconds].map(([name, time]) => [name, time.toFixed(0)])]), ...(lines.length > 0 ? ['', ...lines] : []), ''].join('\n')
}

/** Doubles the calls until a batch is long enough to be timed; warms the code up on the way. */
async function callsFor(work: () => unknown): Promise<number> {
  let calls = 64
  while ((await timeBatch(work, calls)) < batchNanoseconds) calls *= 2
  return calls
}

let sink: unknown

/** Nanoseconds of processor time: other work on the machine makes them longer, but waiting for it does not count. */
async function timeBatch(work: () => unknown, calls: number): Promise<number> {
  const waits = work() instanceof Promise
  const begin = process.cpuUsage()
  if (waits) for (let call = 0; call < calls; call++) sink = await work()
  else for (let call = 0; call < calls; call++) sink = work()
  const { user, system } = process.cpuUsage(begin)
  if (sink === timeBatch) throw new Error('never true, but the compiler cannot know')
  return (user + system) * 1000
}
