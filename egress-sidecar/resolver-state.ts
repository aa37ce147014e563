/** What the resolver remembers of a question that is on its way, and of an upstream. */
import type { Socket } from 'node:dgram'
import type { Done, Transport } from './answer.ts'
import type { PendingTable } from './pending-table.ts'
import type { Upstream } from './ruleset.ts'

const none: readonly never[] = []

export class Pending {
  readonly query: Buffer
  readonly questionEnd: number
  /** What kind of answer the asker can take. */
  readonly transport: Transport
  readonly done: Done
  readonly order: readonly UpstreamState[]
  /** How many of them were asked. */
  tried = 0
  /** Where the last of them answers, under which id; null when nothing can come from it any more. */
  channel: Channel | null = null
  id = -1
  /** The same of those before, that were too slow: their answer is as good. */
  earlier: readonly Way[] = none
  settled = false
  readonly deadline: number
  /** When the current upstream is given up, or asked once more. */
  waitUntil = 0
  /** How the letters of `query` differ from what the asker wrote: `mixCase`. */
  mask = 0
  /** Kept when no other upstream has a better one: its SERVFAIL or REFUSED. */
  failure: Buffer | null = null

  constructor(query: Buffer, questionEnd: number, transport: Transport, done: Done, order: readonly UpstreamState[], deadline: number) {
    this.query = query
    this.questionEnd = questionEnd
    this.transport = transport
    this.done = done
    this.order = order
    this.deadline = deadline
  }
}

type Way = { readonly channel: Channel; readonly id: number }

export type Channel = { readonly socket: Socket; readonly pending: PendingTable<Pending>; readonly sent: (error: Error | null) => void }

export type UpstreamState = {
  readonly upstream: Upstream
  readonly channels: Channel[]
  /** The channel of the moment, and since when. */
  channel: Channel | null
  chosenAt: number
  failures: number
  distrustedUntil: number
  silent: boolean
  /** Gives back the case of the question. False as soon as it was proven, or the upstream cannot be asked for a proof. */
  keepsCase: boolean
  /** Somebody guesses answers in its name: until then each is proven over TCP. */
  guardedUntil: number
  /** The answer over TCP that is to tell it. */
  proof: Promise<unknown> | null
}
