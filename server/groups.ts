/** The sandboxes of this server: what clients, the clock and the engine's events want done with them. */
import { ApiError, notFound } from './api-error.ts'
import type { CreateRequest } from './create-request.ts'
import type { Found } from './docker.ts'
import { mainMember, type Fact, type Group, type SandboxRecord } from './group.ts'
import { deadlineOf, GroupTable, type Entry, type TableDeps } from './group-table.ts'
import { GroupWork, sameFacts, stepsFor, toFact, type WorkDeps } from './group-work.ts'
import { newSandboxId, newToken } from './ids.ts'
import { patchMetadata } from './metadata.ts'
import { isUnlabelled, Ownership } from './ownership.ts'
import { recordFromLabels } from './recover.ts'
import { statusOf } from './sandbox-view.ts'
import type { Touch } from './watch.ts'

export type GroupsDeps = Omit<TableDeps, 'expire'> & Omit<WorkDeps, 'table' | 'ownership'> & {
  /** What the original server remembers of a sandbox that is taken over; null: nothing. */
  readonly oldMetadata: (id: string) => Readonly<Record<string, string>> | null
  /** Containers of ours that belong to no sandbox, and are in use all the same. */
  readonly inUse: (id: string) => boolean
}

/** Sandboxes looked at together in a sweep: hundreds at once would cost the engine and our memory more than they gain. */
const sweepLanes = 16

export class Groups {
  readonly #deps: GroupsDeps
  readonly #table: GroupTable
  readonly #work: GroupWork
  readonly #ownership: Ownership
  #closed = false

  constructor(deps: GroupsDeps) {
    this.#deps = deps
    this.#table = new GroupTable({ ...deps, expire: (id) => this.#expire(id) })
    this.#ownership = new Ownership(deps.engine, { instance: deps.instance, adopt: deps.config.docker.adopt })
    this.#work = new GroupWork({ ...deps, table: this.#table, ownership: this.#ownership })
  }

  /** @throws ApiError when there is no such sandbox */
  get(id: string): Group {
    return this.#table.entry(id).group
  }

  /** Newest first. */
  list(): Group[] {
    const groups = this.#table.all().map((entry) => entry.group)
    return groups.sort((a, b) => b.record.createdAt - a.record.createdAt || (a.record.id < b.record.id ? -1 : 1))
  }

  /**
   * Writes the intent, then makes the sandbox. Answers when it runs, or after `create_wait_seconds` while it is
   * still being made. @throws ApiError when it could not be made within that time; then nothing is left of it
   */
  async create(request: CreateRequest): Promise<Group> {
    if (this.#closed) throw new ApiError('SERVER::SHUTTING_DOWN', 'The server is shutting down.')
    await this.#deps.workshop.admit(request)
    const record = await this.#newRecord(request)
    try {
      this.#deps.store.put(record)
    } catch (error) {
      this.#deps.ports.release(Object.values(record.hostPorts))
      throw error
    }
    const entry = this.#table.add({ record, facts: [], progress: null })
    const made = this.#table.exclusive(entry, () => this.#work.make(entry, request))
    const outOfTime = Promise.withResolvers<'waiting'>()
    const timer = setTimeout(() => outOfTime.resolve('waiting'), this.#deps.config.server.create_wait_seconds * 1000)
    made.catch(() => undefined)
    try {
      const outcome = await Promise.race([made, outOfTime.promise])
      if (outcome === 'waiting' && entry.group.record.phase === 'creating') this.#table.update(entry, { announced: true })
      return entry.group
    } catch (error) {
      // The store did not take the promise: then nobody is told the id.
      if (entry.group.record.phase === 'creating') abandon(entry, 'The server could not write its store.')
      throw error
    } finally {
      clearTimeout(timer)
    }
  }

  /** Ends a sandbox and everything of it; also one that is still being made. */
  async remove(id: string): Promise<void> {
    const entry = this.#table.entry(id)
    abandon(entry, 'The sandbox was deleted while it was made.')
    await this.#table.exclusive(entry, async () => {
      if (!this.#table.holds(entry)) return
      await this.#work.reach(entry, 'gone').catch((error: unknown) => {
        throw new ApiError('DOCKER::SANDBOX_DELETE_FAILED', 'The sandbox could not be deleted.', { cause: error })
      })
    })
  }

  async pause(id: string): Promise<void> {
    await this.#freeze(id, 'running', 'paused', 'DOCKER::SANDBOX_NOT_RUNNING', 'DOCKER::SANDBOX_PAUSE_FAILED')
  }

  async resume(id: string): Promise<void> {
    await this.#freeze(id, 'paused', 'running', 'DOCKER::SANDBOX_NOT_PAUSED', 'DOCKER::SANDBOX_RESUME_FAILED')
  }

  /** One whose time is over is as good as gone, also while it is being removed. @param expiresAt ms since 1970 */
  renew(id: string, expiresAt: number): SandboxRecord {
    const entry = this.#table.entry(id)
    const [now, until] = [this.#deps.now(), entry.group.record.expiresAt]
    if (expiresAt <= now) throw new ApiError('DOCKER::INVALID_EXPIRATION', 'expiresAt: must be in the future')
    if (until === null) throw new ApiError('DOCKER::INVALID_EXPIRATION', 'The sandbox has no expiration: it lives until it is deleted.', { status: 409 })
    if (until <= now) throw notFound(id)
    return this.#table.update(entry, { expiresAt }, false)
  }

  /**
   * It was used: with renew-on-access its life is extended, unless it was a moment ago. Nothing happens to sandboxes that are gone,
   * are not running, or did not ask for it. @returns whether it lives longer now
   */
  used(id: string): boolean {
    const entry = this.#table.find(id)
    if (entry === undefined || statusOf(entry.group).state !== 'Running') return false
    const { renewExtendSeconds, expiresAt } = entry.group.record
    if (renewExtendSeconds === null || expiresAt === null) return false
    const now = this.#deps.now()
    if (expiresAt <= now) return false
    const until = now + renewExtendSeconds * 1000
    // What it gains is the time since it was last renewed: the throttle needs no memory of its own, and survives a restart.
    if (until - expiresAt < this.#deps.config.renew_intent.min_interval_seconds * 1000) return false
    this.#table.update(entry, { expiresAt: until }, false)
    this.#deps.report('renewed', id, {})
    return true
  }

  /** No token of ours that was minted so far opens this sandbox any more. */
  revokeAccess(id: string): SandboxRecord {
    const entry = this.#table.entry(id)
    return this.#table.update(entry, { accessEpoch: (entry.group.record.accessEpoch ?? 0) + 1 }, false)
  }

  /** @param patch null deletes a key */
  patch(id: string, patch: Readonly<Record<string, string | null>>): Group {
    const entry = this.#table.entry(id)
    if (Object.keys(patch).length > 0) this.#table.update(entry, { metadata: patchMetadata(entry.group.record.metadata ?? {}, patch) }, false)
    return entry.group
  }

  /** Something happened to a container of this sandbox: look at it again. */
  touch(id: string, what: Touch = 'changed'): void {
    const entry = this.#table.find(id)
    if (entry === undefined) return
    // By us: whoever makes it knows.
    if (what === 'started' && entry.group.record.phase === 'creating') return
    if (what === 'gate died' && entry.group.record.phase === 'creating') entry.abort.abort(new ApiError('DOCKER::SANDBOX_START_FAILED', 'The egress sidecar ended before the sandbox was complete.'))
    if (entry.dirty) return
    entry.dirty = true
    this.#table.exclusive(entry, () => this.#work.look(entry)).catch((error: unknown) => this.#deps.report('look-failed', id, { error: String(error) }))
  }

  /** Reads what the store holds. Nothing is carried out before the first `sweep`. */
  load(): void {
    for (const record of this.#deps.store.all()) this.#table.add({ record, facts: [], progress: null })
  }

  /** Ends whose time is over, now and not within a second. For tests, which drive the clock themselves. */
  tick(): void {
    this.#table.tick()
  }

  /** The wall clock was set: everybody lives as long as was promised, by the new time. @throws ApiError when the store does not take it; then nothing has changed */
  stepped(milliseconds: number, note: string): void {
    const moved = this.#deps.store.all().map((record) => movedBy(record, milliseconds))
    this.#deps.store.putAll(moved, 'clock', note)
    for (const entry of this.#table.all()) this.#table.set(entry, { record: movedBy(entry.group.record, milliseconds) })
    this.#deps.report('clock-stepped', '', { milliseconds })
  }

  /**
   * Compares everything with what Docker has: finishes what a killed server left, ends what has lost its guard,
   * removes what belongs to nobody. At start, after the event stream broke, and every half minute.
   * @param missed events may have been missed: then every sandbox with a gate is looked at, for the list does not tell that one
   * was started again
   */
  async sweep(missed: boolean): Promise<void> {
    const found = await this.#ownership.all(this.#table.all().map(({ group }) => group.record))
    const work: (() => Promise<unknown>)[] = []
    for (const [id, containers] of found) if (this.#table.find(id) === undefined) work.push(() => this.#recover(id, containers))
    for (const entry of this.#table.all()) {
      if (entry.busy > 0) continue
      const { record, facts } = entry.group
      const news = record.phase === 'creating' || (missed && record.phase === 'ready' && record.egress !== null) || !sameFacts(facts, found.get(record.id) ?? []) || stepsFor(entry).length > 0
      if (news) work.push(() => this.#table.exclusive(entry, () => this.#work.look(entry)))
    }
    const lane = async (): Promise<void> => {
      for (let next = work.pop(); next !== undefined; next = work.pop()) await next().catch((error: unknown) => this.#deps.report('sweep-failed', '', { error: String(error) }))
    }
    await Promise.all(Array.from({ length: sweepLanes }, lane))
  }

  /** No create is accepted any more; those under way may finish within `grace` ms, then are undone. Sandboxes keep running. */
  async close(grace: number): Promise<void> {
    this.#closed = true
    this.#table.stopExpiry()
    const late = Promise.withResolvers<void>()
    const timer = setTimeout(late.resolve, grace)
    await Promise.race([this.#table.idle(), late.promise])
    clearTimeout(timer)
    for (const entry of this.#table.all()) if (entry.group.record.phase === 'creating') abandon(entry, 'The server is shutting down.')
    await this.#table.idle()
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
      hostPorts: await this.#work.takePorts(request),
      renewExtendSeconds: request.renewExtendSeconds,
    }
  }

  /**
   * Containers without a record: the store was lost or replaced, or they are the original's and are taken over. `seen` may be stale, so
   * they are looked up again.
   */
  async #recover(id: string, seen: readonly Found[]): Promise<void> {
    const taken = id !== '' && seen.every(isUnlabelled) ? seen.map(({ containerId }) => containerId) : undefined
    const found = id === '' ? seen : await this.#ownership.of(id, taken)
    if (this.#table.find(id) !== undefined || found.length === 0 || this.#deps.inUse(id)) return
    const read = recordFromLabels(id, found, this.#deps.now())
    if (read !== null) {
      const record = taken === undefined ? read : { ...read, adopted: taken, metadata: this.#deps.oldMetadata(id) ?? read.metadata }
      this.#deps.store.put(record)
      this.#table.add({ record, facts: found.map(toFact), progress: null })
      this.#deps.report(taken === undefined ? 'recovered' : 'adopted', id, {})
      return this.touch(id)
    }
    // Somebody may just be making it, and it was never ours.
    if (taken !== undefined) return
    for (const container of found) await this.#deps.engine.remove(container.containerId)
    this.#deps.report('orphan-removed', id, {})
  }

  async #expire(id: string): Promise<void> {
    const entry = this.#table.find(id)
    if (entry === undefined) return
    const due = (): boolean => (deadlineOf(entry.group.record) ?? Number.POSITIVE_INFINITY) <= this.#deps.now()
    if (entry.group.record.phase === 'creating') abandon(entry, 'The sandbox expired while it was made.')
    await this.#table.exclusive(entry, async () => {
      // Renewed while this waited its turn.
      if (!this.#table.holds(entry) || !due()) return
      await this.#work.reach(entry, 'gone')
      this.#deps.report('expired', id, {})
    })
  }

  async #freeze(id: string, from: Fact['state'], to: 'paused' | 'running', wrong: 'DOCKER::SANDBOX_NOT_RUNNING' | 'DOCKER::SANDBOX_NOT_PAUSED', failed: 'DOCKER::SANDBOX_PAUSE_FAILED' | 'DOCKER::SANDBOX_RESUME_FAILED'): Promise<void> {
    const entry = this.#table.entry(id)
    await this.#table.exclusive(entry, async () => {
      this.#table.entry(id)
      const { record, facts } = entry.group
      const main = facts.find((fact) => fact.member === mainMember)
      if (record.phase !== 'ready' || main?.state !== from) throw new ApiError(wrong, `Sandbox ${id} is not ${from}.`)
      try {
        await (to === 'paused' ? this.#deps.engine.pause(main.containerId) : this.#deps.engine.resume(main.containerId))
      } catch (error) {
        throw new ApiError(failed, `Sandbox ${id} could not be ${to === 'paused' ? 'paused' : 'resumed'}.`, { cause: error })
      }
      this.#table.set(entry, { facts: facts.map((fact) => (fact === main ? { ...fact, state: to } : fact)), record: { ...record, changedAt: this.#deps.now() } })
    })
  }
}

function movedBy(record: SandboxRecord, milliseconds: number): SandboxRecord {
  const move = (moment: number | null): number | null => (moment === null ? null : moment + milliseconds)
  return { ...record, expiresAt: move(record.expiresAt), keepUntil: move(record.keepUntil) }
}

/** Stops the making of a sandbox, if it is still being made, at the next step. */
function abandon(entry: Entry, message: string): void {
  entry.removing = true
  entry.abort.abort(new ApiError('DOCKER::SANDBOX_START_FAILED', message))
}
