/**
 * The sandboxes this gateway knows, and for each the connections that belong to it. A sandbox that ends, or whose id or address
 * gets a new owner, takes its pools and tunnels with it in the same tick: nothing of the old owner can reach the new one.
 */
import { routeStreamStaleSeconds, type RouteEntry, type SandboxState } from '#policies/wire.ts'

/** Something that ends with its sandbox: a pool of upstream connections, a tunnel. */
export interface Belonging {
  destroy(reason: Error): void
}

/** The connections of one life of one sandbox. */
export class Ties {
  /** HTTP connections by port. */
  readonly upstreams = new Map<number, Belonging & { readonly active: number; sweep(now: number): boolean }>()
  readonly tunnels = new Set<Belonging>()
  /** Whatever else must end with the sandbox. */
  readonly others = new Set<Belonging>()
}

/** One life of one sandbox. A new life is a new object, so whoever holds the old one cannot reach the new. */
export class Sandbox {
  entry: RouteEntry
  /** What hangs on it; null until somebody asks for it: of 100,000 sandboxes most are asked for by nobody. */
  ties: Ties | null = null
  constructor(entry: RouteEntry) {
    this.entry = entry
  }

  end(): void {
    if (this.ties === null) return
    const { upstreams, tunnels, others } = this.ties
    this.ties = null
    const reason = new SandboxEnded()
    for (const upstream of upstreams.values()) upstream.destroy(reason)
    for (const tunnel of tunnels) tunnel.destroy(reason)
    for (const other of others) other.destroy(reason)
  }
}

/** Why a request in flight was broken off: its sandbox ended. */
export class SandboxEnded extends Error {
  readonly code = 'SANDBOX_ENDED'
  constructor() {
    super('the sandbox ended')
    this.name = 'SandboxEnded'
  }
}

/** States whose address may already belong to somebody else. */
const over: ReadonlySet<SandboxState> = new Set(['Terminated', 'Failed'])

/** Entries handled without giving way to requests: about a millisecond. */
const slice = 2_000

/** Does a sandbox whose entry becomes `next` go on living, connections and all? */
function livesOn(known: RouteEntry, next: RouteEntry): boolean {
  return known.lifecycle === next.lifecycle && known.host === next.host && (!over.has(next.state) || over.has(known.state))
}

function same(one: RouteEntry, other: RouteEntry): boolean {
  return (
    one.id === other.id && one.host === other.host && one.state === other.state && one.lifecycle === other.lifecycle &&
    one.secureAccessToken === other.secureAccessToken && one.epoch === other.epoch && one.renewOnAccess === other.renewOnAccess
  )
}

export class RouteTable {
  #byId = new Map<string, Sandbox>()
  /** Who has an address that only one may have. */
  #byHost = new Map<string, Sandbox>()
  /** Those that have connections, so that looking after them costs nothing for the rest. */
  readonly #tied = new Set<Sandbox>()
  readonly #exclusive: (host: string) => boolean
  #aliveAt = -Infinity
  /** Counts the calls of `replace`. */
  #replacements = 0

  /** @param exclusive may only one sandbox at a time have this address? Then a new owner ends the old one. */
  constructor(exclusive: (host: string) => boolean) {
    this.#exclusive = exclusive
  }

  get size(): number {
    return this.#byId.size
  }

  get(id: string): Sandbox | undefined {
    return this.#byId.get(id)
  }

  /** What hangs on a sandbox, from now on looked after. */
  tiesOf(sandbox: Sandbox): Ties {
    if (sandbox.ties !== null) return sandbox.ties
    this.#tied.add(sandbox)
    return (sandbox.ties = new Ties())
  }

  /** Gives up pools nobody uses. @param now ms since the process started */
  sweep(now: number): void {
    for (const sandbox of this.#tied) {
      const { ties } = sandbox
      if (ties !== null) for (const [port, upstream] of ties.upstreams) if (upstream.sweep(now)) ties.upstreams.delete(port)
      if (ties !== null && ties.upstreams.size + ties.tunnels.size + ties.others.size > 0) continue
      sandbox.ties = null
      this.#tied.delete(sandbox)
    }
  }

  /** Sandboxes with a request or a tunnel under way. */
  *inUse(): Generator<Sandbox> {
    for (const sandbox of this.#tied) {
      const { ties } = sandbox
      if (ties !== null && (ties.tunnels.size > 0 || ties.upstreams.values().some((upstream) => upstream.active > 0))) yield sandbox
    }
  }

  /** Ends every connection; the table stays. */
  endAll(): void {
    for (const sandbox of this.#tied) sandbox.end()
    this.#tied.clear()
  }

  /** The table's own copy of what it says already: what a long list repeats is then dropped young, and costs the collector nothing. */
  known(entry: RouteEntry): RouteEntry {
    const known = this.#byId.get(entry.id)?.entry
    return known !== undefined && same(known, entry) ? known : entry
  }

  put(entry: RouteEntry): void {
    const known = this.#byId.get(entry.id)
    const stays = known !== undefined && livesOn(known.entry, entry)
    if (known !== undefined && !stays) this.#drop(known)
    const sandbox = stays ? known : new Sandbox(entry)
    // Also one that lives on: while it was over, its address was nobody's, or another's.
    const claims = this.#claims(entry)
    const before = claims ? this.#byHost.get(entry.host) : undefined
    if (before !== undefined && before !== sandbox) this.#drop(before)
    sandbox.entry = entry
    this.#byId.set(entry.id, sandbox)
    if (claims) this.#byHost.set(entry.host, sandbox)
  }

  delete(id: string): void {
    const known = this.#byId.get(id)
    if (known !== undefined) this.#drop(known)
  }

  /**
   * Makes the table hold exactly these entries, by id; what stays keeps its connections. A long list is taken in slices, so that no
   * request waits for it, and beside the table that is served: no request ever sees half of it. Until it is taken, nothing else may be
   * put or deleted.
   * @returns null: taken; or a promise of whether it was: a later call takes the place of one that is still under way
   */
  replace(wanted: ReadonlyMap<string, RouteEntry>): Promise<boolean> | null {
    const steps = this.#replacing(wanted, ++this.#replacements)
    return steps.next().done === true ? null : this.#finish(steps)
  }

  *#replacing(wanted: ReadonlyMap<string, RouteEntry>, turn: number): Generator<void, boolean> {
    const byId = new Map<string, Sandbox>()
    const byHost = new Map<string, Sandbox>()
    const changed: [Sandbox, RouteEntry][] = []
    let count = 0
    for (const entry of wanted.values()) {
      const known = this.#byId.get(entry.id)
      const stays = known !== undefined && livesOn(known.entry, entry)
      const sandbox = stays ? known : new Sandbox(entry)
      if (sandbox.entry !== entry) changed.push([sandbox, entry])
      if (this.#claims(entry)) {
        const before = byHost.get(entry.host)
        if (before !== undefined) byId.delete(before.entry.id)
        byHost.set(entry.host, sandbox)
      }
      byId.set(entry.id, sandbox)
      if (++count % slice === 0) yield
      if (turn !== this.#replacements) return false
    }
    // From here to the end in one tick: the routes, and the connections that nobody may use any more.
    this.#byId = byId
    this.#byHost = byHost
    for (const [sandbox, entry] of changed) sandbox.entry = entry
    for (const sandbox of this.#tied) {
      if (byId.get(sandbox.entry.id) === sandbox) continue
      sandbox.end()
      this.#tied.delete(sandbox)
    }
    return true
  }

  async #finish(steps: Generator<void, boolean>): Promise<boolean> {
    for (;;) {
      await new Promise((resolve) => setImmediate(resolve))
      const step = steps.next()
      if (step.done === true) return step.value
    }
  }

  /** Who is over has no address any more, whatever its entry still says. */
  #claims({ state, host }: RouteEntry): boolean {
    return !over.has(state) && host !== '' && this.#exclusive(host)
  }

  /** The provider's word that the table is true at `now` (ms); Infinity: it always is. */
  alive(now: number): void {
    this.#aliveAt = now
  }

  /** No word from the provider for too long: routes may belong to somebody else by now. */
  stale(now: number): boolean {
    return now - this.#aliveAt > routeStreamStaleSeconds * 1000
  }

  #drop(sandbox: Sandbox): void {
    this.#byId.delete(sandbox.entry.id)
    if (this.#byHost.get(sandbox.entry.host) === sandbox) this.#byHost.delete(sandbox.entry.host)
    sandbox.end()
  }
}
