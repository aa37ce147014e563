/** Random input that can be had again: the seed is printed, and `SEED=<n>` repeats a run. */
import { randomInt } from 'node:crypto'
import type { Test } from 'tap'

export type Random = {
  /** A whole number, both ends included. */
  between(low: number, high: number): number
  text(alphabet: string, minLength: number, maxLength: number): string
  pick<T>(list: readonly T[]): T
}

export function randomOf(t: Pick<Test, 'comment'>): Random {
  const seed = Number(process.env.SEED ?? randomInt(2 ** 31))
  t.comment(`SEED=${seed}`)
  return randomFrom(seed)
}

/** mulberry32: small, fast, good enough to choose test input. */
export function randomFrom(seed: number): Random {
  let state = seed >>> 0
  const next = (): number => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
  const between = (low: number, high: number): number => low + Math.floor(next() * (high - low + 1))
  return {
    between,
    text(alphabet, minLength, maxLength) {
      const letters = [...alphabet]
      return Array.from({ length: between(minLength, maxLength) }, () => letters[between(0, letters.length - 1)]).join('')
    },
    pick: (list) => list[between(0, list.length - 1)] as (typeof list)[number],
  }
}
