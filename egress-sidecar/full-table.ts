/**
 * Which addresses to give up when the table of learned ones is full. Only the kernel knows what is in use, since packets renew leases there:
 * first those whose lease has run out, then those that no packet has renewed, the one learned longest ago first, and only then those in
 * use, the one used longest ago first. Pure.
 */
import { canonicalAddress } from '#policies/address.ts'

/** `until`: end of the lease that was asked for, in ms; `batch`: on its way to the kernel. */
export type Lease = { readonly until: number; readonly batch: object | null }

/** `over`: not in the kernel any more. `shut`: to be deleted there. */
export type GivenUp = { readonly over: readonly string[]; readonly shut: readonly string[] }

/** A lease that ends so many ms later than it was asked for was renewed; nft itself may have taken that long to write it. */
const slackMs = 3000

/**
 * @param learned in the order in which they were learned
 * @param left ms that the kernel gives them, see `readLeases`; null when it could not be asked
 * @param keep so many may stay
 */
export function chooseGivenUp(learned: ReadonlyMap<string, Lease>, left: ReadonlyMap<string, number> | null, now: number, keep: number): GivenUp {
  const over: string[] = []
  const unused: string[] = []
  const used: { address: string; left: number }[] = []
  for (const [address, { until, batch }] of learned) {
    const remaining = left?.get(address)
    if (batch !== null) continue
    if (left === null) unused.push(address)
    else if (remaining === undefined) (until <= now ? over : unused).push(address)
    else if (remaining <= until - now + slackMs) unused.push(address)
    else used.push({ address, left: remaining })
  }
  used.sort((a, b) => a.left - b.left)
  const tooMany = Math.max(0, learned.size - over.length - keep)
  return { over, shut: [...unused, ...used.map(({ address }) => address)].slice(0, tooMany) }
}

const unitMs = { d: 86_400_000, h: 3_600_000, m: 60_000, s: 1000, ms: 1 } as const

/** Reads nft's listing of a set with timeouts: ms left by address. */
export function readLeases(listing: string): Map<string, number> {
  const leases = new Map<string, number>()
  for (const [, address = '', text = ''] of listing.matchAll(/([0-9a-f.:]+)(?: timeout \w+)? expires (\w+)/g)) {
    let milliseconds = 0
    for (const [, count, unit] of text.matchAll(/(\d+)(ms|[dhms])/g)) milliseconds += Number(count) * unitMs[unit as keyof typeof unitMs]
    leases.set(canonicalAddress(address) ?? address, milliseconds)
  }
  return leases
}
