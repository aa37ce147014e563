/**
 * The sandboxes of this server: one in-memory table that answers every read, and one queue per sandbox in which
 * everything that changes it waits its turn. What to do is decided by `plan.ts`, stored by `store.ts`.
 */
import { ApiError, notFound } from './api-error.ts'
import type { Config } from './config.ts'
import { carryOut, type Containers, type Made, type Workshop } from './carry-out.ts'
import type { CreateRequest } from './create-request.ts'
import { EngineError, type Found } from './docker.ts'
import { Expiry } from './expiry.ts'
import { mainMember, membersOf, type Fact, type Group, type SandboxRecord } from './group.ts'
import type { HostPorts } from './host-ports.ts'
import { groupHash, newSandboxId, newToken } from './ids.ts'
import { patchMetadata } from './metadata.ts'
import { plan, type Step, type Want } from './plan.ts'
import { recordFromLabels } from './recover.ts'
import type { Store } from './store.ts'
import { labels } from '#policies/wire.ts'

export type GroupsDeps = {
  readonly config: Config
  readonly instance: string
  readonly store: Store
  readonly engine: Containers
  readonly workshop: Workshop
  readonly ports: HostPorts
  readonly now: () => number
  /** Called after every change a reader could see; null: the sandbox is gone. */
  readonly changed: (id: string, group: Group | null) => void
  readonly report: (event: string, id: string, detail: Record<string, unknown>) => void
}

const portAttempts = 3
const portTaken = /port is already allocated|ports are not available|address already in use|bind: /

type Entry = { group: Group; queue: Promise<unknown>; abort: AbortController; removing: boolean; dirty: boolean; busy: number }

export class Groups {
  readonly #deps: GroupsDeps
  readonly #entries = new Map<string, Entry>()
  readonly #expiry: Expiry
  #closed = false

  constructor(deps: GroupsDeps) {
    this.#deps = deps
    this.#expiry = new Expiry({ now: deps.now, expire: (id) => this.#expire(id) })
  }

  /** @throws ApiError when there is no such sandbox */
  get(id: string): Group {
    const entry = this.#entries.get(id)
    if (entry === undefined) throw notFound(id)
    return entry.group
  }

  /** Newest first. */
  list(): Group[] {
    return [...this.#entries.values()].map((entry) => entry.group).sort((a, b) => b.record.createdAt - a.record.createdAt || (a.record.id < b.record.id ? -1 : 1))
  }

  get size(): number {
    return this.#entries.size
  }

  /**
   * Writes the intent, then makes the sandbox. Answers when it runs, or after `create_wait_seconds` while it is
   * still being made. @throws ApiError when it could not be made within that time; then nothing is left of it
   */
  async create(request: CreateRequest): Promise<Group> {
    if (this.#closed) throw new ApiError('SERVER::SHUTTING_DOWN', 'The server is shutting down.')
    const record = await this.#newRecord(request)
    this.#deps.store.put(record)
    const entry = this.#adopt({ record, facts: [], progress: null })
    const made = this.#exclusive(record.id, () => this.#make(entry, request))
    const wait = this.#deps.config.server.create_wait_seconds * 1000
    let timer: NodeJS.Timeout | undefined
    const outOfTime = new Promise<'waiting'>((resolve) => { timer = setTimeout(() => resolve('waiting'), wait) })
    try {
      const outcome = await Promise.race([made, outOfTime])
      if (outcome === 'waiting' && entry.group.record.phase === 'creating') this.#update(entry, { announced: true })
      return entry.group
    } catch (error) {
      // The store did not take the promise: then nobody is told the id.
      if (entry.group.record.phase === 'creating') this.#abandon(entry, 'The server could not write its store.')
      throw error
    } finally {
      clearTimeout(timer)
      made.catch(() => undefined)
    }
  }

  /** Ends a sandbox and everything of it; also one that is still being made. */
  async remove(id: string): Promise<void> {
    const entry = this.#entry(id)
    this.#abandon(entry, 'The sandbox was deleted while it was made.')
    await this.#exclusive(id, async () => {
      if (!this.#entries.has(id)) return
      await this.#reach(entry, 'gone').catch((error: unknown) => {
        throw new ApiError('DOCKER::SANDBOX_DELETE_FAILED', 'The sandbox could not be deleted.', { cause: error })
      })
    })
  }

  async pause(id: string): Promise<void> {
    await this.#freeze(id, 'running', 'DOCKER::SANDBOX_NOT_RUNNING', 'DOCKER::SANDBOX_PAUSE_FAILED', 'paused', (main) => this.#deps.engine.pause(main))
  }

  async resume(id: string): Promise<void> {
    await this.#freeze(id, 'paused', 'DOCKER::SANDBOX_NOT_PAUSED', 'DOCKER::SANDBOX_RESUME_FAILED', 'running', (main) => this.#deps.engine.resume(main))
  }

  /** @param expiresAt ms since 1970 */
  renew(id: string, expiresAt: number): SandboxRecord {
    const entry = this.#entry(id)
    if (expiresAt <= this.#deps.now()) throw new ApiError('DOCKER::INVALID_EXPIRATION', 'expiresAt: must be in the future')
    if (entry.group.record.expiresAt === null) throw new ApiError('DOCKER::INVALID_EXPIRATION', 'The sandbox has no expiration: it lives until it is deleted.', { status: 409 })
    return this.#update(entry, { expiresAt }, false)
  }

  patch(id: string, patch: Readonly<Record<string, string | null>>): Group {
    const entry = this.#entry(id)
    if (Object.keys(patch).length > 0) this.#update(entry, { metadata: patchMetadata(entry.group.record.metadata ?? {}, patch) }, false)
    return entry.group
  }

  /** Something happened to a container of this sandbox: look at it again. @param gateDied it was the sidecar's end */
  touch(id: string, gateDied = false): void {
    const entry = this.#entries.get(id)
    if (entry === undefined) return
    if (gateDied && entry.group.record.phase === 'creating') entry.abort.abort(new ApiError('DOCKER::SANDBOX_START_FAILED', 'The egress sidecar ended before the sandbox was complete.'))
    if (entry.dirty) return
    entry.dirty = true
    void this.#exclusive(id, () => this.#look(entry)).catch((error: unknown) => this.#deps.report('look-failed', id, { error: String(error) }))
  }

  /** Reads what the store holds. Nothing is carried out before the first `sweep`. */
  load(): void {
    for (const record of this.#deps.store.all()) this.#adopt({ record, facts: [], progress: null })
  }

  /**
   * Compares everything with what Docker has: finishes what a killed server left, ends what has lost its guard,
   * removes what belongs to nobody. At start, after the event stream broke, and every half minute.
   */
  async sweep(): Promise<void> {
    const found = new Map<string, Found[]>()
    for (const container of await this.#deps.engine.list([`${labels.instance}=${this.#deps.instance}`])) {
      const id = container.labels[labels.id] ?? container.labels[labels.egressSidecarFor] ?? ''
      found.set(id, [...(found.get(id) ?? []), container])
    }
    const work: Promise<unknown>[] = []
    for (const [id, containers] of found) if (!this.#entries.has(id)) work.push(this.#recover(id, containers))
    for (const [id, entry] of this.#entries) {
      if (entry.busy > 0 || entry.dirty) continue
      if (entry.group.record.phase === 'creating' || sameFacts(entry.group.facts, found.get(id) ?? []) === false || this.#steps(entry).length > 0) {
        work.push(this.#exclusive(id, () => this.#look(entry)))
      }
    }
    for (const outcome of await Promise.allSettled(work)) if (outcome.status === 'rejected') this.#deps.report('sweep-failed', '', { error: String(outcome.reason) })
  }

  /** No create is accepted any more; those under way may finish within `grace` ms, then are undone. Sandboxes keep running. */
  async close(grace: number): Promise<void> {
    this.#closed = true
    this.#expiry.close()
    const idle = (): Promise<unknown> => Promise.allSettled([...this.#entries.values()].map((entry) => entry.queue))
    let timer: NodeJS.Timeout | undefined
    await Promise.race([idle(), new Promise((resolve) => { timer = setTimeout(resolve, grace) })])
    clearTimeout(timer)
    for (const entry of this.#entries.values()) if (entry.group.record.phase === 'creating') this.#abandon(entry, 'The server is shutting down.')
    await idle()
  }

  async #newRecord(request: CreateRequest): Promise<SandboxRecord> {
    const now = this.#deps.now()
    return {
      id: newSandboxId(), phase: 'creating', announced: false, reason: null, message: null,
      createdAt: now, changedAt: now, keepUntil: null,
      expiresAt: request.timeout === null ? null : now + request.timeout * 1000,
      image: request.image, entrypoint: request.command, metadata: request.metadata, platform: request.platform,
      egress: request.networkPolicy === null ? null : { token: newToken(), policy: request.networkPolicy },
      secureAccessToken: request.secureAccess ? newToken() : null,
      hostPorts: await this.#takePorts(request),
      renewExtendSeconds: request.renewExtendSeconds,
    }
  }

  async #make(entry: Entry, request: CreateRequest): Promise<void> {
    const id = entry.group.record.id
    const started = this.#deps.now()
    const progress = (line: string): void => this.#set(entry, { progress: line })
    try {
      await this.#deps.workshop.prepare(entry.group.record, request, progress, entry.abort.signal)
      progress('Sandbox container is starting.')
      await this.#build(entry, request)
      this.#deps.report('created', id, { milliseconds: this.#deps.now() - started })
    } catch (error) {
      const fault = toApiError(error)
      this.#deps.report('create-failed', id, { code: fault.code, error: fault.message, cause: String((fault.cause as Error | undefined)?.message ?? '') })
      await this.#undo(entry, fault.code, fault.message)
      throw fault
    }
  }

  /** In direct mode somebody else may take a host port between our check and Docker's: then with other ports, from the start. */
  async #build(entry: Entry, request: CreateRequest): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#run(entry, plan('built', membersOf(entry.group.record), entry.group.facts), request)
      } catch (error) {
        if (attempt === portAttempts || !(error instanceof EngineError) || !portTaken.test(error.message)) throw error
        await this.#reach(entry, 'ended')
        const old = Object.values(entry.group.record.hostPorts)
        this.#update(entry, { hostPorts: await this.#takePorts(request) })
        this.#deps.ports.release(old)
      }
    }
  }

  async #takePorts(request: CreateRequest): Promise<SandboxRecord['hostPorts']> {
    if (this.#deps.config.ingress.mode !== 'direct') return {}
    const { ports, config } = this.#deps
    return {
      http: await ports.take(),
      ...(config.runtime.execd_image === undefined ? {} : { execd: await ports.take() }),
      ...(request.networkPolicy === null ? {} : { egress: await ports.take() }),
    }
  }

  /** Nothing of a failed create may be left. The cause stays visible to a client that was told the id. */
  async #undo(entry: Entry, reason: string, message: string): Promise<void> {
    if (!entry.group.record.announced || entry.removing) return this.#reach(entry, 'gone')
    await this.#reach(entry, 'ended')
    this.#fail(entry, reason, message)
  }

  #fail(entry: Entry, reason: string, message: string): void {
    this.#update(entry, { phase: 'failed', reason, message, keepUntil: this.#deps.now() + this.#deps.config.failureTtlSeconds * 1000 })
  }

  /** Asks Docker about one sandbox and does what the answer calls for. */
  async #look(entry: Entry): Promise<void> {
    entry.dirty = false
    const id = entry.group.record.id
    if (this.#entries.get(id) !== entry) return
    await this.#read(entry)
    if (entry.group.record.phase === 'creating') await this.#undo(entry, 'CREATE_INTERRUPTED', 'The server stopped while it made this sandbox.')
    else await this.#run(entry, this.#steps(entry), null)
  }

  #steps(entry: Entry): Step[] {
    const { record, facts } = entry.group
    return plan(record.phase === 'failed' ? 'ended' : 'kept', membersOf(record), facts)
  }

  async #reach(entry: Entry, want: Want): Promise<void> {
    await this.#read(entry)
    await this.#run(entry, plan(want, membersOf(entry.group.record), entry.group.facts), null)
  }

  async #read(entry: Entry): Promise<void> {
    const found = await this.#containers(entry.group.record.id)
    if (sameFacts(entry.group.facts, found)) return
    const before = entry.group.facts.length
    this.#set(entry, { facts: found.map(toFact), record: before === 0 ? entry.group.record : { ...entry.group.record, changedAt: this.#deps.now() } })
  }

  async #run(entry: Entry, steps: readonly Step[], request: CreateRequest | null): Promise<void> {
    for (const step of steps) {
      if (request !== null) entry.abort.signal.throwIfAborted()
      if (step.do === 'settle') this.#update(entry, { phase: 'ready', announced: true })
      else if (step.do === 'fail') this.#fail(entry, step.reason, step.message)
      else if (step.do === 'forget') this.#forget(entry)
      else {
        const made: Made = { record: entry.group.record, request, facts: entry.group.facts, signal: entry.abort.signal }
        const facts = await carryOut(step, made, this.#deps)
        // Between start and settle readers see Pending, so nothing need be told until then.
        entry.group = { ...entry.group, facts }
        if (request === null) this.#set(entry, {})
      }
      if (step.do === 'fail') this.#deps.report('ended', entry.group.record.id, { reason: step.reason })
    }
  }

  #forget(entry: Entry): void {
    const { id, hostPorts } = entry.group.record
    this.#deps.store.delete(id)
    this.#entries.delete(id)
    this.#expiry.set(id, null)
    this.#deps.ports.release(Object.values(hostPorts))
    this.#deps.changed(id, null)
    this.#deps.report('gone', id, {})
  }

  /** Containers of ours without a record: the store was lost or replaced. `seen` may be stale, so they are looked up again. */
  async #recover(id: string, seen: readonly Found[]): Promise<void> {
    const found = id === '' ? seen : await this.#containers(id)
    if (this.#entries.has(id) || found.length === 0) return
    const record = recordFromLabels(id, found)
    if (record !== null) {
      this.#deps.store.put(record)
      this.#adopt({ record, facts: found.map(toFact), progress: null })
      this.#deps.report('recovered', id, {})
      return this.touch(id)
    }
    for (const container of found) await this.#deps.engine.remove(container.containerId)
    this.#deps.report('orphan-removed', id, {})
  }

  #containers(id: string): Promise<Found[]> {
    return this.#deps.engine.examine([`${labels.instance}=${this.#deps.instance}`, `${labels.group}=${groupHash(id)}`])
  }

  async #expire(id: string): Promise<void> {
    const entry = this.#entries.get(id)
    if (entry === undefined) return
    const due = (): boolean => (deadlineOf(entry.group.record) ?? Number.POSITIVE_INFINITY) <= this.#deps.now()
    if (entry.group.record.phase === 'creating') this.#abandon(entry, 'The sandbox expired while it was made.')
    await this.#exclusive(id, async () => {
      // Renewed while this waited its turn.
      if (!this.#entries.has(id) || !due()) return
      await this.#reach(entry, 'gone')
      this.#deps.report('expired', id, {})
    })
  }

  async #freeze(id: string, from: Fact['state'], wrong: 'DOCKER::SANDBOX_NOT_RUNNING' | 'DOCKER::SANDBOX_NOT_PAUSED', failed: 'DOCKER::SANDBOX_PAUSE_FAILED' | 'DOCKER::SANDBOX_RESUME_FAILED', to: Fact['state'], act: (containerId: string) => Promise<void>): Promise<void> {
    const entry = this.#entry(id)
    await this.#exclusive(id, async () => {
      const main = entry.group.facts.find((fact) => fact.member === mainMember)
      if (!this.#entries.has(id)) throw notFound(id)
      if (entry.group.record.phase !== 'ready' || main?.state !== from) throw new ApiError(wrong, `Sandbox ${id} is not ${from}.`)
      try {
        await act(main.containerId)
      } catch (error) {
        throw new ApiError(failed, `Sandbox ${id} could not be ${to === 'paused' ? 'paused' : 'resumed'}.`, { cause: error })
      }
      this.#set(entry, { facts: entry.group.facts.map((fact) => (fact === main ? { ...fact, state: to } : fact)), record: { ...entry.group.record, changedAt: this.#deps.now() } })
    })
  }

  #abandon(entry: Entry, message: string): void {
    entry.removing = true
    entry.abort.abort(new ApiError('DOCKER::SANDBOX_START_FAILED', message))
  }

  #entry(id: string): Entry {
    const entry = this.#entries.get(id)
    if (entry === undefined) throw notFound(id)
    return entry
  }

  #adopt(group: Group): Entry {
    const entry: Entry = { group, queue: Promise.resolve(), abort: new AbortController(), removing: false, dirty: false, busy: 0 }
    this.#entries.set(group.record.id, entry)
    this.#deps.ports.hold(Object.values(group.record.hostPorts))
    this.#set(entry, {})
    return entry
  }

  /** Stored first, seen second. */
  #update(entry: Entry, change: Partial<SandboxRecord>, moved = true): SandboxRecord {
    const record = { ...entry.group.record, ...change, ...(moved ? { changedAt: this.#deps.now() } : {}) }
    this.#deps.store.put(record)
    this.#set(entry, { record })
    return record
  }

  #set(entry: Entry, change: Partial<Group>): void {
    entry.group = { ...entry.group, ...change }
    const { record } = entry.group
    if (this.#entries.get(record.id) !== entry) return
    this.#expiry.set(record.id, deadlineOf(record))
    this.#deps.changed(record.id, entry.group)
  }

  /** One at a time per sandbox, in the order asked for. */
  #exclusive<T>(id: string, work: () => Promise<T>): Promise<T> {
    const entry = this.#entry(id)
    entry.busy++
    const turn = entry.queue.then(work).finally(() => entry.busy--)
    entry.queue = turn.catch(() => undefined)
    return turn
  }
}

/** When a sandbox is to be removed: a failed one stays visible for a while, but not longer than it would have lived. */
function deadlineOf(record: SandboxRecord): number | null {
  if (record.phase !== 'failed' || record.keepUntil === null) return record.expiresAt
  return record.expiresAt === null ? record.keepUntil : Math.min(record.keepUntil, record.expiresAt)
}

function toFact(found: Found): Fact {
  const { containerId, member, state, exitCode, address } = found
  return { containerId, member, state, exitCode, address }
}

function sameFacts(known: readonly Fact[], found: readonly Fact[]): boolean {
  if (known.length !== found.length) return false
  return known.every((fact) => found.some((other) => other.containerId === fact.containerId && other.state === fact.state && other.address === fact.address))
}

function toApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error
  // The engine's 400 is about limits and names a client chose; anything else may name what is not the client's.
  if (error instanceof EngineError && error.status === 400) return new ApiError('SANDBOX::INVALID_PARAMETER', `The engine refuses this container: ${error.message.slice(0, 300)}`, { cause: error })
  return new ApiError('DOCKER::SANDBOX_START_FAILED', 'The sandbox could not be started.', { cause: error })
}
