/** Remembers signatures that were found good, so that a page's hundred requests cost one HMAC. Expiry, epoch and scope are asked each time. */
import { LRUCache } from 'lru-cache'
import type { AccessKeys, VerifiedSignatures } from '#policies/access.ts'

const remembered = 10_000

export class VerifiedMemory {
  #keys: AccessKeys | null = null
  readonly #good = new LRUCache<string, true>({ max: remembered })

  /** What is known under this key ring. A ring that was read again is another one: a withdrawn key lets nobody in. */
  under(keys: AccessKeys): VerifiedSignatures {
    if (keys !== this.#keys) {
      this.#good.clear()
      this.#keys = keys
    }
    return this.#good
  }
}
