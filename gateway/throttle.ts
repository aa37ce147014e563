/** Counts refused access attempts per client: the original's signature has 32 bits, so guessing must be slow. */
import { LRUCache } from 'lru-cache'
import { readAddress } from '#policies/address.ts'

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
    const known = this.#clients.get(networkOf(client))
    return known !== undefined && now - known.since < windowMs && known.count >= this.#limit
  }

  failed(client: string, now: number): void {
    const known = this.#clients.get(networkOf(client))
    if (known === undefined || now - known.since >= windowMs) this.#clients.set(networkOf(client), { since: now, count: 1 })
    else known.count++
  }
}

/** An IPv6 client has at least 2^64 addresses, and guesses from all of them: what counts is the /64 (RFC 6177). */
export function networkOf(client: string): string {
  // A neighbour on the link comes with a zone.
  const zone = client.indexOf('%')
  const address = readAddress(zone === -1 ? client : client.slice(0, zone))
  if (address === null) return client
  return address.family === 4 ? `${address.value}/32` : `${address.value >> 64n}/64`
}
