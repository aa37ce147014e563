/**
 * Workers seen as one gateway: their parent asks each for its counts and its readiness, and adds up. Nobody waits for a worker that does
 * not answer, and what a dead one counted stays in the sum, so that a counter never goes back.
 */
import type { Worker } from 'node:cluster'
import type { Overseen } from './admin.ts'
import { addCounts, metricsType, textOfCounts, type Counted } from './metrics.ts'

export type Report = { readonly unready: string; readonly counted: Counted }
type Question = { readonly question: number }
type Answer = Report & { readonly answer: number }

/** ms a worker has to answer. Until then its last answer counts. */
const patience = 1_000
/** What goes on counting when a worker ends; the rest is about now. */
const lasting = new Set(['counter', 'histogram'])

/** Called by a worker: answers its parent from now on. */
export function reportToParent(report: () => Promise<Report>): void {
  process.on('message', (message: unknown) => {
    const number = (message as Partial<Question> | null)?.question
    if (number !== undefined) void report().then((said) => process.send?.({ answer: number, ...said } satisfies Answer))
  })
}

export class Fleet implements Overseen {
  readonly contentType = metricsType
  /** From now on not ready. */
  closing = false
  readonly #size: number
  /** Those that listen, and what each said last; null: nothing yet. */
  readonly #said = new Map<Worker, Report | null>()
  readonly #waiting = new Map<number, { readonly silent: Set<Worker>; readonly done: () => void }>()
  #departed: Promise<Counted> = Promise.resolve([])
  #questions = 0

  /** @param size workers there should be */
  constructor(size: number) {
    this.#size = size
  }

  /** @param worker reachable for clients from now on */
  join(worker: Worker): void {
    this.#said.set(worker, null)
    worker.on('message', (message: unknown) => {
      const answer = message as Partial<Answer> | null
      if (answer?.answer === undefined || !this.#said.has(worker)) return
      this.#said.set(worker, answer as Answer)
      this.#heard(worker, answer.answer)
    })
  }

  leave(worker: Worker): void {
    const counts = this.#said.get(worker)?.counted.filter(({ type }) => lasting.has(type as unknown as string))
    this.#said.delete(worker)
    if (counts !== undefined) this.#departed = this.#departed.then((before) => addCounts([before, counts]))
    for (const number of this.#waiting.keys()) this.#heard(worker, number)
  }

  async unready(): Promise<string> {
    if (this.closing) return 'draining'
    const answered = await this.#ask()
    const reasons = [...answered].map((worker) => this.#said.get(worker)?.unready ?? '').filter((reason) => reason !== '')
    const ready = answered.size - reasons.length
    return ready >= this.#size ? '' : [`${ready} of ${this.#size} workers ready`, ...new Set(reasons)].join(', ')
  }

  async metrics(): Promise<string> {
    const answered = await this.#ask()
    const workers: Counted = [{ name: 'sallyport_gateway_workers', help: 'Worker processes that answer', type: 'gauge', aggregator: 'sum', values: [{ value: answered.size, labels: {} }] }] as unknown as Counted
    const known = [...this.#said.values()].filter((report) => report !== null).map(({ counted }) => counted)
    return textOfCounts([workers, ...known, await this.#departed])
  }

  /** Asks all workers. @returns those that answered in time */
  async #ask(): Promise<ReadonlySet<Worker>> {
    const number = this.#questions++
    const asked = [...this.#said.keys()].filter((worker) => worker.isConnected())
    const silent = new Set(asked)
    await new Promise<void>((resolve) => {
      if (silent.size === 0) return resolve()
      const timer = setTimeout(resolve, patience)
      this.#waiting.set(number, { silent, done: () => (clearTimeout(timer), resolve()) })
      for (const worker of asked) worker.send({ question: number } satisfies Question, (error) => void (error !== null && this.#heard(worker, number)))
    })
    this.#waiting.delete(number)
    return new Set(asked.filter((worker) => !silent.has(worker) && this.#said.get(worker) != null))
  }

  #heard(worker: Worker, number: number): void {
    const waiting = this.#waiting.get(number)
    if (waiting?.silent.delete(worker) === true && waiting.silent.size === 0) waiting.done()
  }
}
