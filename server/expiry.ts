/**
 * Ends sandboxes on time. One timer for all of them, driven by the wall clock and never armed for longer than a
 * second: so a deadline years away does not overflow setTimeout (it fires at once above 24.8 days), and a clock
 * that was stepped or a machine that slept is noticed.
 */
export type ExpiryDeps = {
  readonly now: () => number
  /** Called once per deadline; called again later when it rejects. */
  readonly expire: (id: string) => Promise<void>
}

const longestNap = 1000
const retryAfter = 2000

export class Expiry {
  readonly #deps: ExpiryDeps
  readonly #deadlines = new Map<string, number>()
  readonly #busy = new Set<string>()
  #timer: NodeJS.Timeout | null = null
  #closed = false

  constructor(deps: ExpiryDeps) {
    this.#deps = deps
  }

  /** Sets, moves or (null) clears the deadline of a sandbox, in ms since 1970. */
  set(id: string, deadline: number | null): void {
    if (deadline === null) this.#deadlines.delete(id)
    else this.#deadlines.set(id, deadline)
    this.#arm()
  }

  deadline(id: string): number | null {
    return this.#deadlines.get(id) ?? null
  }

  close(): void {
    this.#closed = true
    if (this.#timer !== null) clearTimeout(this.#timer)
  }

  /** Expires what is due. Public for tests, which drive the clock themselves. */
  tick(): void {
    const now = this.#deps.now()
    for (const [id, deadline] of this.#deadlines) {
      if (deadline > now) continue
      if (this.#busy.has(id)) continue
      // Moved on before the attempt: when it fails, the next one is already set.
      const again = now + retryAfter
      this.#deadlines.set(id, again)
      this.#busy.add(id)
      void this.#deps.expire(id).then(
        () => { if (this.#deadlines.get(id) === again) this.#deadlines.delete(id) },
        () => undefined,
      ).finally(() => this.#busy.delete(id))
    }
    this.#arm()
  }

  #arm(): void {
    if (this.#timer !== null) clearTimeout(this.#timer)
    this.#timer = null
    if (this.#closed || this.#deadlines.size === 0) return
    let next = Number.POSITIVE_INFINITY
    for (const deadline of this.#deadlines.values()) next = Math.min(next, deadline)
    const nap = Math.min(longestNap, Math.max(0, next - this.#deps.now()))
    this.#timer = setTimeout(() => this.tick(), nap)
  }
}
