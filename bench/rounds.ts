/**
 * Interleaved rounds: every contender runs once in each round, so that a machine that slows down slows all of them. A ratio is taken within
 * its round and the median of the rounds is quoted; absolute numbers from a shared machine are only there to give an idea.
 */
import type { Cleanups } from './program.ts'

/** What one contender did in one round, by measure. */
export type Sample = Readonly<Record<string, number>>

export type Measure = {
  readonly key: string
  readonly label: string
  readonly unit: string
}

/** A promise about one measure of one contender. */
export type Goal = {
  readonly contender: string
  readonly measure: string
  /** Whom it is divided by, round by round: the baseline when absent; nobody when null, and the limit has the unit of the measure. */
  readonly against?: string | null
  readonly limit: number
  /** 'at most' the limit is met by a value below it. */
  readonly sense: 'at most' | 'at least'
}

/** One kind of work, and who does it. */
export type Load = {
  readonly title: string
  readonly rounds: number
  /** The contender that the others are divided by. */
  readonly baseline: string
  readonly measures: readonly Measure[]
  /** Runs one round of one contender. */
  readonly contenders: Readonly<Record<string, () => Promise<Sample>>>
  readonly goals: readonly Goal[]
  /** What a reader must know to understand the numbers, a line each. */
  readonly notes?: readonly string[]
}

/** Programs that stand ready to be measured. */
export type Arena = { readonly loads: readonly Load[]; readonly notes: readonly string[] }

/** `seconds` is the length of one timed round; `rounds` replaces each load's own number when given. */
export type Effort = { readonly seconds: number; readonly rounds?: number }
/** `start` notes in `cleanups` how to undo each thing as it makes it; the caller runs them whatever happens. */
export type Target = { readonly title: string; start(effort: Effort, cleanups: Cleanups): Promise<Arena> }

export type Figure = { readonly median: number; readonly ratio: number; readonly lowest: number; readonly highest: number }
export type Samples = ReadonlyMap<string, readonly Sample[]>
export type Result = { readonly load: Load; readonly rounds: number; readonly samples: Samples; readonly figures: ReadonlyMap<string, ReadonlyMap<string, Figure>> }

/** Runs all rounds of a load. The order of the contenders turns by one each round: nobody always runs first. */
export async function runLoad(load: Load, rounds: number, report: (text: string) => void = () => {}): Promise<Result> {
  const names = Object.keys(load.contenders)
  const samples = new Map<string, Sample[]>(names.map((name) => [name, []]))
  for (let round = 0; round < rounds; round++) {
    report(`${load.title}: round ${round + 1} of ${rounds}`)
    for (let turn = 0; turn < names.length; turn++) {
      const name = names[(turn + round) % names.length]!
      samples.get(name)!.push(await load.contenders[name]!())
    }
  }
  return { load, rounds, samples, figures: summarise(load, samples) }
}

export function summarise(load: Load, samples: Samples): Result['figures'] {
  return new Map([...samples.keys()].map((name) => [name, new Map(load.measures.map(({ key }) => [key, figureOf(samples, name, key, load.baseline)]))]))
}

function figureOf(samples: Samples, contender: string, key: string, against: string | null): Figure {
  const values = samples.get(contender)?.map((sample) => sample[key] ?? NaN) ?? [NaN]
  const ratios = values.map((value, round) => (against === null ? value : value / (samples.get(against)?.[round]?.[key] ?? NaN)))
  return { median: median(values), ratio: median(ratios), lowest: Math.min(...ratios), highest: Math.max(...ratios) }
}

/** What a goal is judged by: its ratio is the median itself where it is compared with nobody. */
export function goalFigure({ contender, measure, against }: Goal, { load, samples }: Pick<Result, 'load' | 'samples'>): Figure {
  return figureOf(samples, contender, measure, against === undefined ? load.baseline : against)
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length / 2
  return sorted.length % 2 === 1 ? sorted[Math.floor(middle)]! : (sorted[middle - 1]! + sorted[middle]!) / 2
}

/** The value that a fraction of the sorted values does not exceed (nearest rank). */
export function percentile(sorted: ArrayLike<number>, fraction: number): number {
  return sorted[Math.max(0, Math.ceil(sorted.length * fraction) - 1)] ?? NaN
}

export function goalMet(goal: Goal, result: Pick<Result, 'load' | 'samples'>): boolean {
  const { ratio } = goalFigure(goal, result)
  return goal.sense === 'at most' ? ratio <= goal.limit : ratio >= goal.limit
}
