/**
 * The table of sandboxes: answers every read from memory, keeps store, expiry and listeners in step with it, and gives
 * each sandbox one queue in which everything that changes it waits its turn.
 */
import { notFound } from './api-error.ts'
import { Expiry } from './expiry.ts'
import type { Group, SandboxRecord } from './group.ts'
import type { HostPorts } from './host-ports.ts'
import type { Store } from './store.ts'

export type Entry = {
  group: Group
  readonly abort: AbortController
  /** It is being deleted, or expired while it was made: a failure needs no grave. */
  removing: boolean
  /** A look is queued already. */
  dirty: boolean
  /** Turns taken or waiting. */
  busy: number
  queue: Promise<unknown>
}

export type TableDeps = {
  readonly store: Store
  readonly ports: HostPorts
  readonly now: () => number
  /** Called after every change a reader could see; null: the sandbox is gone. */
  readonly changed: (id: string, group: Group | null) => void
  readonly expire: (id: string) => Promise<void>
  readonly report: (event: string, id: string, detail: Record<string, unknown>) => void
}

export class GroupTable {
  readonly #deps: TableDeps
  readonly #entries = new Map<string, Entry>()
  readonly #expiry: Expiry

  constructor(deps: TableDeps) {
    this.#deps = deps
    this.#expiry = new Expiry({ now: deps.now, expire: deps.expire })
  }

  /** @throws ApiError when there is no such sandbox */
  entry(id: string): Entry {
    const entry = this.#entries.get(id)
    if (entry === undefined) throw notFound(id)
    return entry
  }

  find(id: string): Entry | undefined {
    return this.#entries.get(id)
  }

  /** False for an entry whose sandbox was forgotten while somebody held on to it. */
  holds(entry: Entry): boolean {
    return this.#entries.get(entry.group.record.id) === entry
  }

  all(): Entry[] {
    return [...this.#entries.values()]
  }

  /** Puts a stored record into the table. */
  add(group: Group): Entry {
    const entry: Entry = { group, abort: new AbortController(), removing: false, dirty: false, busy: 0, queue: Promise.resolve() }
    this.#entries.set(group.record.id, entry)
    this.#deps.ports.hold(Object.values(group.record.hostPorts))
    this.set(entry, {})
    return entry
  }

  /** Stored first, seen second. @param moved whether its state changed, for `changedAt` @throws ApiError SERVER::STORE_FAILED */
  update(entry: Entry, change: Partial<SandboxRecord>, moved = true): SandboxRecord {
    const record = { ...entry.group.record, ...change, ...(moved ? { changedAt: this.#deps.now() } : {}) }
    // Without a step of its life it is a client's wish.
    this.#deps.store.put(record, !moved)
    this.set(entry, { record })
    return record
  }

  /** The same for what is so whether the store takes it or not: a next server finds out by looking. */
  note(entry: Entry, change: Partial<SandboxRecord>): void {
    try {
      this.update(entry, change)
    } catch (error) {
      this.#deps.report('store-failed', entry.group.record.id, { error: causeOf(error) })
      this.set(entry, { record: { ...entry.group.record, ...change, changedAt: this.#deps.now() } })
    }
  }

  /** What need not survive. */
  set(entry: Entry, change: Partial<Group>): void {
    entry.group = { ...entry.group, ...change }
    if (!this.holds(entry)) return
    const { record } = entry.group
    this.#expiry.set(record.id, deadlineOf(record))
    this.#deps.changed(record.id, entry.group)
  }

  /**
   * Nothing of it is left in Docker; now nothing is left here. Also when the disk is full, for then sandboxes are deleted to make room: of
   * a record that stays the next server finds no container, and forgets it too.
   */
  forget(entry: Entry): void {
    const { id, hostPorts } = entry.group.record
    try {
      this.#deps.store.delete(id)
    } catch (error) {
      this.#deps.report('store-failed', id, { error: causeOf(error) })
    }
    this.#entries.delete(id)
    this.#expiry.set(id, null)
    this.#deps.ports.release(Object.values(hostPorts))
    this.#deps.changed(id, null)
  }

  /** One at a time per sandbox, in the order asked for. */
  exclusive<T>(entry: Entry, work: () => Promise<T>): Promise<T> {
    entry.busy++
    const turn = entry.queue.then(work).finally(() => entry.busy--)
    entry.queue = turn.catch(() => undefined)
    return turn
  }

  /** Resolves when nobody waits for a turn. */
  async idle(): Promise<void> {
    await Promise.allSettled(this.all().map((entry) => entry.queue))
  }

  /** Ends what is due. The timer does the same within a second. */
  tick(): void {
    this.#expiry.tick()
  }

  stopExpiry(): void {
    this.#expiry.close()
  }
}

/** When a sandbox is to be removed: a failed one stays visible for a while, but not longer than it would have lived. */
export function deadlineOf(record: SandboxRecord): number | null {
  if (record.phase !== 'failed' || record.keepUntil === null) return record.expiresAt
  return record.expiresAt === null ? record.keepUntil : Math.min(record.keepUntil, record.expiresAt)
}

function causeOf(error: unknown): string {
  return String((error as Error).cause ?? error)
}
