/** What each side of a storm did, so that at its end it can be told who saw what was not meant for him. */
import { randomFrom, type Random } from '../../support/random.ts'

/** A request as its client means it. */
export type Asked = {
  /** Nobody else's, and nobody can guess it. It stands in the path, in X-Request-Id and in the body. */
  readonly id: string
  readonly sandbox: string
  readonly method: string
  readonly version: '1.0' | '1.1'
  /** As the sandbox has to see it. */
  readonly target: string
  readonly body: string
  /** `own`: the gateway answers it itself; `bad`: nobody may take it for a request. */
  readonly kind: 'plain' | 'upgrade' | 'own' | 'bad'
  readonly expects: boolean
  /** May reach a sandbox twice, where the first time was in vain. */
  readonly replayable: boolean
  /** May not reach a sandbox: there is none, or it must not, or it stands behind the end of what its connection asks. */
  readonly barred: boolean
  /** The connection ends with its answer. */
  readonly ends: boolean
  /** Places in the order of events. */
  begun: number
  headSent: boolean
  sent: boolean
  /** What the client sent behind an upgrade. */
  tunnel: string
  readonly deliveries: Delivery[]
}

/** One arrival of a request at a sandbox, and what the sandbox made of it. */
export type Delivery = {
  readonly script: Script
  /** The sandbox read all of it. */
  whole: boolean
  /** All that it had to say is written. */
  answered: boolean
  /** What it sent behind a 101, and what came. */
  tunnelSent: string
  tunnelGot: string
  /** It ended the tunnel in order. */
  tunnelEnded: boolean
}

/** How a sandbox answers one request. */
export type Script = {
  /** Before it has read the body. */
  readonly early: boolean
  readonly pauseMs: number
  /** ms for which nothing of the body is read. */
  readonly holdMs: number
  readonly text: string
  /** Right behind it, in the same packet: it breaks a rule. */
  readonly tail: string
  /** Said a while later, although nobody asked. */
  readonly late: string
  readonly end: 'keep' | 'end' | 'destroy' | 'reset'
  readonly interim: readonly number[]
  readonly status: number
  /** Length of the whole body, which is that much `filler`; -1: whatever arrives of this answer is not a whole one. */
  readonly length: number
}

export class Ledger {
  readonly asked = new Map<string, Asked>()
  /** What went wrong while it was going on. */
  readonly problems: string[] = []
  readonly #seed: number
  /** When lives of a sandbox ended. */
  readonly #endings = new Map<string, number[]>()
  #events = 0

  constructor(seed: number) {
    this.#seed = seed
  }

  /** The choices of one actor, who makes the same ones however the others interfere. */
  randomOf(actor: number): Random {
    return randomFrom(Math.imul(this.#seed ^ Math.imul(actor + 1, 0x9e3779b1), 0x85ebca6b))
  }

  /** The place of an event among all others. */
  now(): number {
    return ++this.#events
  }

  lifeEnds(sandbox: string): void {
    this.#endings.set(sandbox, [...(this.#endings.get(sandbox) ?? []), this.now()])
  }

  endedBetween(sandbox: string, from: number, to: number): boolean {
    return (this.#endings.get(sandbox) ?? []).some((at) => at > from && at < to)
  }

  disturbed(sandbox: string): boolean {
    return this.#endings.has(sandbox)
  }
}

/** Ids as they stand in whatever a client received. */
export const idPattern = /q-[0-9a-f]{16}/g
/** Bytes with this in them are part of no answer. */
export const never = 'never-to-be-relayed'

export function newId(random: Random): string {
  return `q-${random.text('0123456789abcdef', 16, 16)}`
}

/** Text that says whose it is at every place, and begins with what a confused reader would take for a request, or an answer. */
export function filler(id: string, length: number): string {
  let text = `${id}\r\n\r\nGET /inner HTTP/1.1\r\nHost: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n`
  for (let n = 0; text.length < length; n++) text += `${id}:${n};`
  return text.slice(0, length)
}

/** Some WebSocket frames as they come, and sometimes none. */
export function frames(random: Random, id: string, masked: boolean): string {
  let text = ''
  for (let count = random.between(1, 3); count > 0; count--) {
    const payload = filler(id, random.pick([0, 20, 125, 126, 2_000, random.between(0, 70_000)]))
    const bit = masked ? 0x80 : 0
    const { length } = payload
    const size = length < 126 ? [bit | length] : length < 65_536 ? [bit | 126, length >> 8, length & 255] : [bit | 127, 0, 0, 0, 0, 0, length >> 16, (length >> 8) & 255, length & 255]
    text += String.fromCharCode(random.pick([0x81, 0x82, 0x01, 0x80, 0x89]), ...size, ...(masked ? [0, 0, 0, 0] : [])) + payload
  }
  return random.between(0, 9) === 0 ? filler(id, random.between(1, 500)) : text
}

/** The text in pieces, cut anywhere. */
export function cut(random: Random, text: string, most: number): string[] {
  const at = Array.from({ length: random.between(0, most - 1) }, () => random.between(0, text.length)).sort((one, other) => one - other)
  return [0, ...at].map((from, index) => text.slice(from, at[index])).filter((piece) => piece !== '')
}
