/** What is done with a sandbox in its turn: made, looked at, brought to an end. Every order of steps comes from `plan.ts`. */
import { availableParallelism } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { formatProblems } from '#policies/problem.ts'
import { ApiError } from './api-error.ts'
import { carryOut, type Containers, type Workshop } from './carry-out.ts'
import type { Config } from './config.ts'
import type { CreateRequest } from './create-request.ts'
import { EngineError, type Found } from './docker.ts'
import { readRefusal } from './engine-words.ts'
import { egressMember, mainMember, membersOf, type Fact, type HostPorts as Ports } from './group.ts'
import type { Entry, GroupTable } from './group-table.ts'
import type { HostPorts } from './host-ports.ts'
import type { LastWords } from './last-words.ts'
import type { Ownership } from './ownership.ts'
import { plan, type Step, type Want } from './plan.ts'
import { Turns } from './turns.ts'

export type WorkDeps = {
  readonly config: Config
  readonly instance: string
  readonly table: GroupTable
  readonly engine: Containers
  readonly ownership: Ownership
  readonly workshop: Workshop
  readonly ports: HostPorts
  readonly now: () => number
  readonly report: (event: string, id: string, detail: Record<string, unknown>) => void
}

const portAttempts = 3
const portTaken = /port is already allocated|ports are not available|address already in use|bind: /

/** Sandboxes made at a time: enough to keep an engine busy. */
const mostBuilds = Math.max(8, 2 * availableParallelism())
/** ms the engine may take to tell why a sidecar ended: its containers wait to be removed. */
const wordsPatience = 2000
/** ms; most are made in less. */
const longestTurn = 2000

export class GroupWork {
  readonly #deps: WorkDeps
  readonly #turns = new Turns(mostBuilds, longestTurn)

  constructor(deps: WorkDeps) {
    this.#deps = deps
  }

  /** @throws ApiError when it could not be made; then nothing runs of it any more */
  async make(entry: Entry, request: CreateRequest): Promise<void> {
    const { table, workshop, now, report } = this.#deps
    const id = entry.group.record.id
    const started = now()
    const progress = (line: string): void => table.set(entry, { progress: line })
    try {
      await workshop.prepare(entry.group.record, request, progress, entry.abort.signal)
      progress('Sandbox container is starting.')
      await this.#turns.run(() => this.#build(entry, request))
      report('created', id, { milliseconds: now() - started })
    } catch (error) {
      const sidecar = await this.#wordsOfSidecar(entry)
      const fault = sidecar === null || sidecar.exitCode === null ? toApiError(error)
        : new ApiError('DOCKER::SANDBOX_START_FAILED', `The egress sidecar ended with exit code ${sidecar.exitCode} before the sandbox was complete.`, { cause: error })
      report('create-failed', id, { code: fault.code, error: fault.message, cause: fault.cause instanceof Error ? fault.cause.message : '', ...(sidecar === null ? {} : { sidecar_exit_code: sidecar.exitCode, sidecar_log: sidecar.log }) })
      // When the engine is away: the next comparison with it undoes what is still there.
      await this.#undo(entry, fault.code, fault.message).catch((late: unknown) => report('undo-failed', id, { error: String(late) }))
      throw fault
    }
  }

  /** Host ports for a new sandbox; none when the gateway brings everybody in. */
  async takePorts(request: CreateRequest): Promise<Ports> {
    const { config, ports } = this.#deps
    if (config.ingress.mode !== 'direct') return {}
    return {
      http: await ports.take(),
      ...(config.runtime.execd_image === undefined ? {} : { execd: await ports.take() }),
      ...(request.networkPolicy === null ? {} : { egress: await ports.take() }),
    }
  }

  /** Asks Docker about one sandbox and does what the answer calls for. */
  async look(entry: Entry): Promise<void> {
    entry.dirty = false
    if (!this.#deps.table.holds(entry)) return
    await this.#read(entry)
    if (entry.group.record.phase === 'creating') await this.#undo(entry, 'CREATE_INTERRUPTED', 'The server stopped while it made this sandbox.')
    else await this.#run(entry, stepsFor(entry), null)
  }

  async reach(entry: Entry, want: Want): Promise<void> {
    await this.#read(entry)
    await this.#run(entry, plan(want, membersOf(entry.group.record), entry.group.facts), null)
  }

  /** In direct mode somebody else may take a host port between our check and Docker's: then with other ports, from the start. */
  async #build(entry: Entry, request: CreateRequest): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#run(entry, plan('built', membersOf(entry.group.record), entry.group.facts), request)
      } catch (error) {
        if (attempt === portAttempts || !(error instanceof EngineError) || !portTaken.test(error.message)) throw error
        await this.reach(entry, 'ended')
        const old = Object.values(entry.group.record.hostPorts)
        this.#deps.table.update(entry, { hostPorts: await this.takePorts(request) })
        this.#deps.ports.release(old)
      }
    }
  }

  /** Nothing of a failed create may be left. The cause stays visible to a client that was told the id. */
  async #undo(entry: Entry, reason: string, message: string): Promise<void> {
    if (!entry.group.record.announced || entry.removing) return this.reach(entry, 'gone')
    await this.reach(entry, 'ended')
    this.#fail(entry, reason, message)
  }

  /** Of a create that failed by its sidecar: with the container goes all that tells why. null: there is none, or the fault is not its own. */
  async #wordsOfSidecar({ group: { facts }, removing }: Entry): Promise<LastWords | null> {
    const gate = facts.find((fact) => fact.member === egressMember)
    if (gate === undefined || removing) return null
    const words = await Promise.race([this.#deps.engine.lastWords(gate.containerId).catch(() => null), delay(wordsPatience, null, { ref: false })])
    return words?.exitCode === null && facts.some((fact) => fact.member === mainMember) ? null : words
  }

  #fail(entry: Entry, reason: string, message: string): void {
    const { table, now, config } = this.#deps
    table.note(entry, { phase: 'failed', reason, message, keepUntil: now() + config.failureTtlSeconds * 1000 })
  }

  async #read(entry: Entry): Promise<void> {
    const { id, adopted } = entry.group.record
    const found = await this.#deps.ownership.of(id, adopted)
    if (sameFacts(entry.group.facts, found)) {
      // What no reader sees may be news all the same: when they started.
      entry.group = { ...entry.group, facts: found.map(toFact) }
      return
    }
    const first = entry.group.facts.length === 0
    this.#deps.table.set(entry, { facts: found.map(toFact), record: first ? entry.group.record : { ...entry.group.record, changedAt: this.#deps.now() } })
  }

  async #run(entry: Entry, steps: readonly Step[], request: CreateRequest | null): Promise<void> {
    const { table, report } = this.#deps
    for (const step of steps) {
      if (request !== null) entry.abort.signal.throwIfAborted()
      const { record, facts } = entry.group
      switch (step.do) {
        case 'settle':
          table.update(entry, { phase: 'ready', announced: true })
          break
        case 'fail':
          this.#fail(entry, step.reason, step.message)
          report('ended', record.id, { reason: step.reason, message: step.message })
          break
        case 'forget':
          table.forget(entry)
          report('gone', record.id, {})
          break
        default: {
          // Its address may be somebody else's long before the engine has cleared away its files.
          if (step.do === 'remove' && request === null) table.set(entry, { facts: facts.map((fact) => (fact.containerId === step.containerId ? { ...fact, state: 'removing', address: '' } : fact)) })
          const now = await carryOut(step, { record, request, facts, signal: entry.abort.signal }, this.#deps)
          // While it is made readers see Pending, so nobody need be told until it settles.
          if (request === null) table.set(entry, { facts: now })
          else entry.group = { ...entry.group, facts: now }
        }
      }
    }
  }
}

/** What a sandbox that is not being made calls for. */
export function stepsFor(entry: Entry): Step[] {
  const { record, facts } = entry.group
  return plan(record.phase === 'failed' ? 'ended' : 'kept', membersOf(record), facts)
}

export function toFact(found: Found): Fact {
  const { containerId, member, state, exitCode, address, startedAt } = found
  return { containerId, member, state, exitCode, address, startedAt }
}

/** In everything that readers see. */
export function sameFacts(known: readonly Fact[], found: readonly Fact[]): boolean {
  if (known.length !== found.length) return false
  return known.every((fact) => found.some((other) => other.containerId === fact.containerId && other.state === fact.state && other.address === fact.address))
}

function toApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error
  if (error instanceof EngineError && error.status === 0) return new ApiError('DOCKER::SANDBOX_START_FAILED', 'The Docker engine cannot be reached.', { cause: error, status: 503 })
  const refusal = error instanceof EngineError && error.status >= 400 ? readRefusal(error.message) : null
  if (refusal !== null) return new ApiError('SANDBOX::INVALID_PARAMETER', formatProblems([refusal]), { cause: error })
  return new ApiError('DOCKER::SANDBOX_START_FAILED', 'The sandbox could not be started.', { cause: error })
}
