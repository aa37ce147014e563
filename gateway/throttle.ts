/** Counts refused access attempts per client: the original's signature has 32 bits, so guessing must be slow. */
import { LRUCache } from 'lru-cache'

/** Clients remembered at once; the oldest are forgotten first. */
const remembered = 10_000
const windowMs = 60_000

export class FailureThrottle {
  readonly #limit: number
  readonly #clients = new LRUCache<string, { since: number; count: number }>({ max: remembered })

  /** @param limit refused attempts per client and minute; 0: no limit */
  constructor(limit: number) {
    this.#limit = limit
  }

  /** @param now ms of any steady clock */
  blocked(client: string, now: number): boolean {
    if (this.#limit === 0) return false
    const known = this.#clients.get(client)
    return known !== undefined && now - known.since < windowMs && known.count >= this.#limit
  }

  failed(client: string, now: number): void {
    const known = this.#clients.get(client)
    if (known === undefined || now - known.since >= windowMs) this.#clients.set(client, { since: now, count: 1 })
    else known.count++
  }
}
