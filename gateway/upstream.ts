/**
 * The connections to sandboxes: dialling, pools, and their end. The only importer of undici.
 * Each port of each life of a sandbox has its own pool, which dies with that life: no socket is ever shared between owners.
 */
import type { LookupOptions } from 'node:dns'
import { isIP, type LookupFunction } from 'node:net'
import { performance } from 'node:perf_hooks'
import { Client, type Dispatcher } from 'undici'
import { Fault } from '#policies/fault.ts'
import type { Belonging, Sandbox, Ties } from './routes.ts'
import { SandboxSocket } from './sandbox-socket.ts'
import type { Standing } from './standing.ts'
import type { LookupCallback } from './upstream-guard.ts'

export type { Dispatcher } from 'undici'

export type RelayOptions = {
  /** ms until a connection must stand. */
  readonly connectTimeout: number
  /** ms from the end of locating until the response's head; 0: no limit. */
  readonly firstByteTimeout: number
  /** ms without a byte in either direction; 0: no limit. Event streams are spared. */
  readonly idleTimeout: number
  /** ms during which refused connections are tried again while a sandbox's port is booting. */
  readonly bootGrace: number
  /** Requests at once to one port of one sandbox. */
  readonly maxRequests: number
  /** The client's Host goes to the sandbox instead of the sandbox's own address. */
  readonly preserveHost: boolean
  readonly lookup: (name: string, options: LookupOptions, callback: LookupCallback) => void
  readonly standing: Standing
}

/**
 * ms an upstream connection is kept without a request. Many servers close after 5 s; a shorter time avoids the race with them. Not longer for
 * a sandbox that offers more (Keep-Alive): the descriptor is ours.
 */
const keepIdle = 4_000
/** ms after which the pool of a port that nobody asks for is given up. */
const forgetAfter = 60_000
const largestHead = 256 * 1024

/** The origin is a placeholder: the address is dialled by our own connector and the Host is a header of ours. */
const placeholder = new URL('http://sandbox.invalid')
const lineOptions: Client.Options = { pipelining: 1, keepAliveTimeout: keepIdle, keepAliveMaxTimeout: keepIdle, headersTimeout: 0, bodyTimeout: 0, maxHeaderSize: largestHead }

/**
 * The connections to one port of one life of a sandbox. undici's own Pool looks through all its connections twice a request, those held by
 * long streams first, and loses one for good with every request that it refuses; a list of the free ones does neither.
 */
export class Upstream implements Belonging {
  readonly authority: string
  readonly since: number
  active = 0
  destroyed = false
  /** Has a connection ever stood? Then a refusal is not a port that is still booting. */
  reached = false
  #lastUsed: number
  readonly #host: string
  readonly #port: number
  readonly #options: RelayOptions
  readonly #lines = new Set<Line>()
  /** The one that became free last is taken first: its connection is the most likely to stand. */
  readonly #free: Line[] = []

  constructor(host: string, port: number, options: RelayOptions, now: number) {
    this.authority = isIP(host) === 6 ? `[${host}]:${port}` : `${host}:${port}`
    this.since = now
    this.#lastUsed = now
    this.#host = host
    this.#port = port
    this.#options = options
  }

  dispatch(request: Dispatcher.DispatchOptions, relay: Handler, now: number): void {
    this.#lastUsed = now
    const line = this.#free.pop() ?? this.#openLine()
    line.wire.free = false
    // undici tells when a line has done its work, but not when it refused the request or could not even begin to dial.
    if (!line.dispatch(request, relay) && line.stats.size === 0) this.#release(line)
  }

  #openLine(): Line {
    const line = new Line((wire, callback) => dial(wire, this, this.#host, this.#port, this.#options, callback))
    this.#lines.add(line)
    line.on('drain', () => this.#release(line))
    return line
  }

  #release(line: Line): void {
    if (line.wire.free) return
    line.wire.free = true
    this.#free.push(line)
  }

  /** Gives the pool up when nobody used it for long. @returns true: gone */
  sweep(now: number): boolean {
    if (this.active > 0 || now - this.#lastUsed < forgetAfter) return false
    this.destroy(new Error('idle'))
    return true
  }

  destroy(reason: Error): void {
    this.destroyed = true
    // Also a dial under way must end: the address may belong to somebody else when it completes.
    for (const line of this.#lines) line.hangUp()
    for (const line of this.#lines) line.destroy(reason).catch(() => undefined)
    this.#lines.clear()
  }
}

/** The exchange on a connection, as far as the connection has something to tell it. */
export type Carried = {
  wire: Wire | null
  /** The connection was reset, so an end of the body is not one. */
  reset: boolean
}
export type Handler = Dispatcher.DispatchHandler & Carried

/** What a connector tells about the socket it made. */
export type Wire = { socket: SandboxSocket | null; served: number; relay: Carried | null; /** It waits for an exchange. */ free: boolean }

/** One upstream connection at a time, and what undici does not tell: whether it served before, and whether it was reset. */
class Line extends Client {
  readonly wire: Wire

  constructor(connect: (wire: Wire, callback: Connected) => void) {
    const wire: Wire = { socket: null, served: 0, relay: null, free: false }
    super(placeholder, { ...lineOptions, connect: (_target, callback) => connect(wire, callback) })
    this.wire = wire
  }

  override dispatch(request: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler): boolean {
    ;(handler as Handler).wire = this.wire
    return super.dispatch(request, handler)
  }

  hangUp(): void {
    // With a reason: undici takes an end without one for the regular end of a body that has no length.
    this.wire.socket?.destroy(new Fault('EDGE_UPSTREAM_BROKEN', 'the sandbox ended'))
  }
}

type Connected = (...result: [null, SandboxSocket] | [Error, null]) => void

function dial(wire: Wire, upstream: Upstream, host: string, port: number, options: RelayOptions, callback: Connected): void {
  if (upstream.destroyed) return callback(new Fault('EDGE_UPSTREAM_BROKEN'), null)
  const socket = new SandboxSocket()
  wire.socket = socket
  wire.served = 0
  options.standing.add(socket, wire)
  let settled = false
  const timer = setTimeout(() => socket.destroy(new Fault('EDGE_UPSTREAM_TIMEOUT', 'the sandbox did not accept the connection in time')), options.connectTimeout)
  const settle = (error: Error | null): void => {
    if (settled) return
    settled = true
    clearTimeout(timer)
    if (error !== null) return callback(error, null)
    upstream.reached = true
    callback(null, socket)
  }
  socket.once('connect', () => settle(null))
  socket.on('error', (error: NodeJS.ErrnoException) => {
    // undici takes a reset for the regular end of a body without a length; this listener runs first and knows better.
    if (error.code === 'ECONNRESET' && wire.relay !== null) wire.relay.reset = true
    settle(error)
  })
  socket.once('close', () => {
    // A free line may be kept for a minute, the memory it read into need not.
    if (wire.socket === socket) wire.socket = null
    settle(new Fault('EDGE_UPSTREAM_BROKEN'))
  })
  socket.dial({ host, port, lookup: options.lookup as LookupFunction })
}

/** The pool for one port of a sandbox, made on first use; null when the port has as many requests as it may. */
export function upstreamOf(sandbox: Sandbox, ties: Ties, port: number, options: RelayOptions): Upstream | null {
  let upstream = ties.upstreams.get(port) as Upstream | undefined
  if (upstream === undefined || upstream.destroyed) {
    upstream = new Upstream(sandbox.entry.host, port, options, performance.now())
    ties.upstreams.set(port, upstream)
  }
  return upstream.active < options.maxRequests ? upstream : null
}
