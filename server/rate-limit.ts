/** Counts what a client did in the current minute: keys that were wrong, sandboxes asked for. */
import { LRUCache } from 'lru-cache'

/** Clients remembered at once; those not heard of for longest are forgotten first. */
const remembered = 10_000
const windowMs = 60_000

export class RateLimit {
  readonly #most: number
  readonly #now: () => number
  readonly #clients = new LRUCache<string, { since: number; count: number }>({ max: remembered })

  /** @param most per client and minute; 0: no limit @param now ms of any clock */
  constructor(most: number, now: () => number) {
    this.#most = most
    this.#now = now
  }

  /** Seconds until this client may go on; 0: it may now. */
  wait(address: string): number {
    const known = this.#clients.get(clientOf(address))
    const left = known === undefined ? 0 : known.since + windowMs - this.#now()
    return known === undefined || this.#most === 0 || known.count < this.#most || left <= 0 ? 0 : Math.min(60, Math.ceil(left / 1000))
  }

  count(address: string): void {
    const client = clientOf(address)
    const known = this.#clients.get(client)
    const now = this.#now()
    if (known === undefined || now - known.since >= windowMs) this.#clients.set(client, { since: now, count: 1 })
    else known.count++
  }
}

/** Who has one IPv6 address has the other 2^64 of its network as well (RFC 6177). */
function clientOf(address: string): string {
  if (!address.includes(':') || address.includes('.')) return address
  const [front = '', back] = address.split('::')
  const groups = front === '' ? [] : front.split(':')
  const known = back === undefined || back === '' ? 0 : back.split(':').length
  if (back !== undefined) while (groups.length < 8 - known) groups.push('0')
  return groups.slice(0, 4).join(':')
}
