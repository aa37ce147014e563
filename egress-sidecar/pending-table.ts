/**
 * What waits for the answers of one socket, by message id (RFC 1035 4.1.1). A Map would do, but for one trait of V8: the tables that a Map
 * outgrows keep their entries and point to their successors, so that one of them in the old space holds every later question in memory until
 * a whole collection, and every collection before it copies them all.
 */
import { randomFillSync } from 'node:crypto'

/** An id has one place, by its low bits. Twice what a socket carries when as many questions wait as may. */
const places = 1024
/** When every second place is taken, this many misses in a row are less likely than guessing two ids. */
const maxTries = 32

const randomIds = new Uint16Array(2048)
let usedIds = randomIds.length

/** 16 bits that nobody can foresee. RFC 5452 9.2 */
export function randomId(): number {
  if (usedIds === randomIds.length) {
    randomFillSync(randomIds)
    usedIds = 0
  }
  return randomIds[usedIds++] as number
}

export class PendingTable<T> {
  readonly #ids = new Uint16Array(places)
  readonly #entries: (T | null)[] = Array<T | null>(places).fill(null)

  /** @returns the random id under which the entry waits now, or -1: too many wait */
  add(entry: T): number {
    for (let tries = 0; tries < maxTries; tries++) {
      const id = randomId()
      const place = id % places
      if (this.#entries[place] !== null) continue
      this.#entries[place] = entry
      this.#ids[place] = id
      return id
    }
    return -1
  }

  get(id: number): T | null {
    const place = id % places
    return this.#ids[place] === id ? (this.#entries[place] as T | null) : null
  }

  /** Whatever waits there by now instead of it stays. */
  delete(id: number, entry: T): void {
    const place = id % places
    if (this.#ids[place] === id && this.#entries[place] === entry) this.#entries[place] = null
  }

  /** A copy of all that wait now, with their ids. */
  all(): [number, T][] {
    const waiting: [number, T][] = []
    for (let place = 0; place < places; place++) {
      const entry = this.#entries[place] as T | null
      if (entry !== null) waiting.push([this.#ids[place] as number, entry])
    }
    return waiting
  }
}
