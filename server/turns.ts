/**
 * Some at a time, the rest in line: fifty sandboxes begun together cost the engine and our event loop more than they gain, and everybody
 * else waits. A turn ends by itself after a while, so that what hangs holds up its own sandbox and nobody else's.
 */
export class Turns {
  readonly #most: number
  readonly #longest: number
  readonly #waiting: (() => void)[] = []
  #taken = 0

  /** @param most at a time @param longest ms a turn keeps others waiting */
  constructor(most: number, longest: number) {
    this.#most = most
    this.#longest = longest
  }

  /** Waits for a turn, then does it. Whether it is done or its time is up: the next one begins. */
  async run<T>(work: () => Promise<T>): Promise<T> {
    if (this.#taken < this.#most) this.#taken++
    else await new Promise<void>((resolve) => this.#waiting.push(resolve))
    let over = false
    const end = (): void => {
      if (over) return
      over = true
      const next = this.#waiting.shift()
      if (next === undefined) this.#taken--
      else next()
    }
    const timer = setTimeout(end, this.#longest)
    try {
      return await work()
    } finally {
      clearTimeout(timer)
      end()
    }
  }
}
