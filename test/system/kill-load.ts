/**
 * A mixed load on a lifecycle server that may die at any moment, and a memory of what it was asked and what it answered. What was answered must
 * be so; what was asked and not answered may be so or not.
 */
import { setTimeout as delay } from 'node:timers/promises'
import type { SandboxBody } from '#test/support/api.ts'
import type { Random } from '#test/support/random.ts'
import type { Stack } from '#test/support/stack.ts'

/** One sandbox, as its client knows it. Moments in ms since 1970. */
export type Known = {
  readonly id: string
  /** It may not end before `least`, and has to after `most`: they differ while a renewal is not answered. */
  least: number
  most: number
  /** What its metadata may be: more than one while a patch is not answered. */
  metadata: string[]
  paused: boolean | 'perhaps'
  deletion: 'no' | 'asked' | 'answered'
  busy: boolean
}

/** Sandboxes there are when the load begins, and while it runs. */
const fewest = 3
const most = 5
const far = 600_000

export class Load {
  readonly known = new Map<string, Known>()
  /** Answers that no moment of a kill explains. */
  readonly faults: string[] = []
  /** How often each operation was answered. */
  readonly answered: Record<string, number> = {}
  readonly #stack: Stack
  readonly #random: Random
  readonly #bodies: readonly object[]
  #steps = 0

  /** @param bodies of creates, one of which is picked each time */
  constructor(stack: Stack, random: Random, bodies: readonly object[]) {
    this.#stack = stack
    this.#random = random
    this.#bodies = bodies
  }

  /** There is something to work on, however many ended before. */
  async fill(): Promise<void> {
    await Promise.all(Array.from({ length: Math.max(0, fewest - this.#living) }, () => this.#make()))
  }

  /** One of them ends after this many ms, whatever else happens. */
  async shorten(milliseconds: number): Promise<void> {
    const one = [...this.known.values()].find((each) => !each.busy && each.deletion === 'no')
    if (one === undefined) return
    one.busy = true
    await this.#renew(one, `/v1/sandboxes/${one.id}`, milliseconds)
  }

  /** Goes on until the server is gone. */
  async run(gone: Promise<unknown>): Promise<void> {
    let over = false
    const end = gone.then(() => (over = true))
    const worker = async (work: () => Promise<void>): Promise<void> => {
      while (!over) {
        await work().catch(() => end)
        await delay(this.#random.between(0, 40))
      }
    }
    await Promise.all([worker(() => this.#make()), worker(() => this.#make()), worker(() => this.#use()), worker(() => this.#use())])
  }

  /** A sandbox whose client never heard of it is one like any other. */
  adopt(body: SandboxBody): Known {
    const expiresAt = Date.parse(body.expiresAt ?? '')
    const known: Known = { id: body.id, least: expiresAt, most: expiresAt, metadata: [JSON.stringify(body.metadata)], paused: body.status.state === 'Paused', deletion: 'no', busy: false }
    this.known.set(body.id, known)
    return known
  }

  get #living(): number {
    return [...this.known.values()].filter(({ deletion }) => deletion === 'no').length
  }

  async #make(): Promise<void> {
    if (this.#living >= most) return this.#use()
    const reply = await this.#call<SandboxBody>('create', [202], 'POST', '/v1/sandboxes', { ...this.#random.pick(this.#bodies), metadata: { step: String(++this.#steps) } })
    // One that is still Pending may be heard of when it runs.
    if (reply?.status.state === 'Running') this.adopt(reply)
  }

  async #use(): Promise<void> {
    const idle = [...this.known.values()].filter((each) => !each.busy && each.deletion === 'no')
    if (idle.length === 0) return
    const one = this.#random.pick(idle)
    const path = `/v1/sandboxes/${one.id}`
    one.busy = true
    try {
      const renew = (milliseconds: number) => () => this.#renew(one, path, milliseconds)
      const [patch, freeze, remove] = [() => this.#patch(one, path), () => this.#freeze(one, path), () => this.#remove(one, path)]
      await this.#random.pick([renew(far), renew(far), renew(this.#random.between(300, 3000)), patch, patch, patch, freeze, freeze, freeze, remove])()
    } finally {
      one.busy = false
    }
  }

  async #renew(one: Known, path: string, milliseconds: number): Promise<void> {
    const [wanted, { least, most }] = [Date.now() + milliseconds, one]
    Object.assign(one, { least: Math.min(least, wanted), most: Math.max(most, wanted) })
    const reply = await this.#call<{ expiresAt: string }>('renew', [200, 400, 404], 'POST', `${path}/renew-expiration`, { expiresAt: new Date(wanted).toISOString() })
    if (reply?.expiresAt !== undefined) one.least = one.most = Date.parse(reply.expiresAt)
    else Object.assign(one, { least, most })
  }

  async #patch(one: Known, path: string): Promise<void> {
    const wanted = { step: String(++this.#steps) }
    const before = one.metadata
    one.metadata = [...before, JSON.stringify(wanted)]
    const reply = await this.#call<SandboxBody>('patch', [200, 404], 'PATCH', `${path}/metadata`, wanted)
    one.metadata = reply?.metadata === undefined ? before : [JSON.stringify(reply.metadata)]
  }

  async #freeze(one: Known, path: string): Promise<void> {
    const pause = one.paused !== true
    one.paused = 'perhaps'
    // It may have ended by itself just now.
    const reply = await this.#call(pause ? 'pause' : 'resume', [202, 404, 409], 'POST', `${path}/${pause ? 'pause' : 'resume'}`)
    if (reply !== null) one.paused = pause
  }

  async #remove(one: Known, path: string): Promise<void> {
    one.deletion = 'asked'
    await this.#call('delete', [204, 404], 'DELETE', path)
    one.deletion = 'answered'
  }

  /** null: it was refused, for a reason that is in order. @throws when nobody answers: the server is gone */
  async #call<T>(what: string, statuses: readonly number[], method: string, path: string, body?: unknown): Promise<T | null> {
    const reply = await this.#stack.api.call<T>(method, path, body)
    if (!statuses.includes(reply.status)) this.faults.push(`${what} answered ${reply.status}: ${JSON.stringify(reply.body)}`)
    if (reply.status >= 300) return null
    this.answered[what] = (this.answered[what] ?? 0) + 1
    return reply.body
  }
}
