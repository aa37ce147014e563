/** An nft that only remembers what it was told, and confirms when the test says so. */
import type { Nft } from '../../egress-sidecar/nft.ts'

export type FakeNft = Nft & {
  /** One entry per transaction, statements joined by `; `. */
  readonly transactions: string[]
  /** From now on transactions wait for `confirm`. */
  hold(): void
  /** Confirms (or refuses) the oldest waiting transaction. */
  confirm(error?: Error): void
  readonly waiting: number
  /** What `list` prints, by object; an error for one that is not there. */
  readonly listings: Map<string, string>
}

export function fakeNft(): FakeNft {
  const transactions: string[] = []
  const listings = new Map<string, string>()
  const pending: ((error?: Error) => void)[] = []
  let held = false
  return {
    transactions,
    get waiting() {
      return pending.length
    },
    apply(statements) {
      transactions.push(statements.join('; '))
      if (!held) return Promise.resolve('')
      return new Promise((resolve, reject) => pending.push((error) => (error === undefined ? resolve('') : reject(error))))
    },
    listings,
    async list(object) {
      const listing = listings.get(object)
      if (listing === undefined) throw new Error('no such object')
      return listing
    },
    close: () => undefined,
    hold: () => (held = true),
    confirm: (error) => pending.shift()?.(error),
  }
}
