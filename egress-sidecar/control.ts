/**
 * A place that the sidecar itself must reach whatever the policy says, such as the webhook. Its name is asked for over our own sockets, not
 * through the filter: a lookup can neither be denied nor become an event of its own. The address is opened for our own packets only.
 */
import { canonicalAddress } from '#policies/address.ts'
import type { Resolver } from './answer.ts'
import type { Nft } from './nft.ts'
import { readAnswer, readQuestion, recordTypes, type Question } from './packet.ts'
import { askOnce, writeQuestion } from './question.ts'
import { controlStatements } from './ruleset.ts'

export type ControlPlace = {
  /** Its address, once the kernel lets us go there. @throws when the name has none, or nft refuses */
  reach(): Promise<string>
  /** Asks for the name again at the next `reach`: what it said last did not help. */
  forget(): void
}

export type ControlOptions = {
  /** A name, or an address, which needs no lookup. */
  readonly host: string
  readonly port: number
  /** May an IPv6 address be used where there is no other? */
  readonly ipv6: boolean
  readonly resolver: Resolver
  readonly nft: Nft
  readonly now: () => number
}

/** Seconds that an answer is used: neither a question for every event, nor a stale address for a day. */
const remembered = { least: 5, most: 300 } as const

export function createControlPlace({ host, port, ipv6, resolver, nft, now }: ControlOptions): ControlPlace {
  const literal = canonicalAddress(host)
  let address = ''
  let until = -Infinity

  async function lookUp(): Promise<{ address: string; seconds: number }> {
    if (literal !== null && (ipv6 || !literal.includes(':'))) return { address: literal, seconds: Infinity }
    for (const type of literal !== null ? [] : ipv6 ? [recordTypes.a, recordTypes.aaaa] : [recordTypes.a]) {
      const query = writeQuestion(host, type)
      const question = readQuestion(query) as Question
      const message = await askOnce(resolver, query, question.end, 'tcp')
      const found = message === null ? null : readAnswer(message, question)
      const first = canonicalAddress(found?.addresses[0]?.address ?? '')
      if (found !== null && first !== null) return { address: first, seconds: Math.min(Math.max(found.ttl, remembered.least), remembered.most) }
    }
    throw new Error(`${host} has no address`)
  }

  return {
    async reach() {
      if (now() < until) return address
      const found = await lookUp()
      if (found.address !== address) await nft.apply(controlStatements(found.address, port))
      address = found.address
      until = now() + found.seconds * 1000
      return address
    },
    forget: () => void (until = -Infinity),
  }
}
