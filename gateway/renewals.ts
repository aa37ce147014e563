/**
 * Renew-on-access: sandboxes that asked for it live longer while they are used. Uses are gathered here and reported to the lifecycle
 * server, each sandbox at most once per interval. A use that falls between two reports is in the second one; a report that failed is
 * made again.
 */
import { performance } from 'node:perf_hooks'
import { mostRenewals, renewalStaleSeconds, type Renewals as Report, type RouteEntry } from '#policies/wire.ts'

export type RenewalsOptions = {
  /** ms between two reports of one sandbox. */
  readonly interval: number
  /** Brings a report to the server; rejects when the server did not take it. */
  readonly send: (report: Report) => Promise<void>
  /** Told once when reports begin to fail, and '' when they arrive again. */
  readonly onState: (problem: string) => void
}

/** ms; 0 means never. `usedAt` is the last use not yet reported, by the wall clock; `reportedAt` by the steady one. */
type Use = { usedAt: number; reportedAt: number }

const retryMs = 5_000

export class Renewals {
  readonly #options: RenewalsOptions
  readonly #uses = new Map<string, Use>()
  #sending: Promise<void> | null = null
  #notBefore = 0
  #problem = ''

  constructor(options: RenewalsOptions) {
    this.#options = options
  }

  /** Called for each request that is let in, and about once a second for each sandbox with something under way. */
  used(entry: RouteEntry): void {
    if (entry.renewOnAccess !== true) return
    const use = this.#uses.get(entry.id)
    if (use === undefined) this.#uses.set(entry.id, { usedAt: Date.now(), reportedAt: 0 })
    else use.usedAt = Date.now()
  }

  /** Called about once a second. @param now ms since the process started */
  flush(now: number): void {
    if (this.#sending !== null || now < this.#notBefore) return
    const due = this.#due(now)
    if (due.length > 0) this.#sending = this.#report(due, now).finally(() => (this.#sending = null))
  }

  /** What is due is reported before the gateway goes. */
  async close(now: number): Promise<void> {
    await this.#sending
    this.#notBefore = 0
    // One report holds a thousand. After one that failed there is no other.
    do {
      this.flush(now)
      await this.#sending
    } while (this.#notBefore === 0 && this.#due(now).length > 0)
  }

  /** Forgets what is neither due nor recent, so that the memory is bounded by what is in use. */
  #due(now: number): [id: string, use: Use][] {
    const due: [string, Use][] = []
    const stale = Date.now() - renewalStaleSeconds * 1000
    for (const [id, use] of this.#uses) {
      if (use.reportedAt !== 0 && now - use.reportedAt < this.#options.interval) continue
      if (use.usedAt < stale) this.#uses.delete(id)
      else if (due.length < mostRenewals) due.push([id, use])
    }
    return due
  }

  async #report(due: readonly [string, Use][], began: number): Promise<void> {
    const reported = due.map(([, { usedAt }]) => usedAt)
    try {
      await this.#options.send({ sandboxes: due.map(([id, { usedAt }]) => ({ id, observedAt: new Date(usedAt).toISOString() })) })
      const now = performance.now()
      for (const [index, [, use]] of due.entries()) {
        use.reportedAt = now
        if (use.usedAt === reported[index]) use.usedAt = 0
      }
      this.#say('')
    } catch (error) {
      this.#notBefore = began + retryMs
      this.#say((error as Error).message)
    }
  }

  #say(problem: string): void {
    if ((problem === '') === (this.#problem === '')) return
    this.#problem = problem
    this.#options.onState(problem)
  }
}
