/**
 * The sandboxes this gateway knows, and for each the connections that belong to it. A sandbox that ends, or whose id or address
 * gets a new owner, takes its pools and tunnels with it in the same tick: nothing of the old owner can reach the new one.
 */
import { routeStreamStaleSeconds, type RouteEntry, type SandboxState } from '#policies/wire.ts'

/** Something that ends with its sandbox: a pool of upstream connections, a tunnel. */
export interface Belonging {
  destroy(reason: Error): void
}

/** One life of one sandbox. A new life is a new object, so whoever holds the old one cannot reach the new. */
export class Sandbox {
  entry: RouteEntry
  ended = false
  /** HTTP connections by port. */
  readonly upstreams = new Map<number, Belonging & { sweep(now: number): boolean }>()
  readonly tunnels = new Set<Belonging>()
  /** Whatever else must end with the sandbox. */
  readonly belongings = new Set<Belonging>()
  constructor(entry: RouteEntry) {
    this.entry = entry
  }

  end(): void {
    this.ended = true
    const reason = new SandboxEnded()
    for (const upstream of this.upstreams.values()) upstream.destroy(reason)
    for (const tunnel of this.tunnels) tunnel.destroy(reason)
    for (const belonging of this.belongings) belonging.destroy(reason)
    this.upstreams.clear()
    this.tunnels.clear()
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

export class RouteTable {
  readonly #byId = new Map<string, Sandbox>()
  readonly #byHost = new Map<string, Sandbox>()
  readonly #exclusive: (host: string) => boolean
  #aliveAt = -Infinity

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

  sandboxes(): IterableIterator<Sandbox> {
    return this.#byId.values()
  }

  put(entry: RouteEntry): void {
    const known = this.#byId.get(entry.id)
    const lives = !over.has(entry.state)
    if (known !== undefined && known.entry.lifecycle === entry.lifecycle && known.entry.host === entry.host && (lives || over.has(known.entry.state))) {
      known.entry = entry
      return
    }
    if (known !== undefined) this.#drop(known)
    // Who is over has no address any more, whatever its entry still says.
    const claims = lives && entry.host !== '' && this.#exclusive(entry.host)
    const before = claims ? this.#byHost.get(entry.host) : undefined
    if (before !== undefined) this.#drop(before)
    const sandbox = new Sandbox(entry)
    this.#byId.set(entry.id, sandbox)
    if (claims) this.#byHost.set(entry.host, sandbox)
  }

  delete(id: string): void {
    const known = this.#byId.get(id)
    if (known !== undefined) this.#drop(known)
  }

  /** Makes the table hold exactly these entries; what stays keeps its connections. */
  replace(entries: Iterable<RouteEntry>): void {
    const wanted = new Map<string, RouteEntry>()
    for (const entry of entries) wanted.set(entry.id, entry)
    for (const [id, sandbox] of this.#byId) if (!wanted.has(id)) this.#drop(sandbox)
    for (const entry of wanted.values()) this.put(entry)
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
