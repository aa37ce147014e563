/** One HTTP request to a sandbox and its response back, over a connection of `upstream.ts`. */
import { STATUS_CODES, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { Fault, toFault } from '#policies/fault.ts'
import { breakOff } from './break-off.ts'
import { checkTransferCoding, headText, mostInformed, responseFields, rewriterFor, type ResponseFields } from './response-headers.ts'
import { RequestBody, type Exchange } from './request-body.ts'
import type { InFlight } from './in-flight.ts'
import { safeMethods, type OpenRelay, type Refusal, type Relay } from './relay.ts'
import type { RouteTable } from './routes.ts'
import { upstreamOf, type Dispatcher, type Handler, type RelayOptions, type Upstream, type Wire } from './upstream.ts'
import type { Visit } from './visit.ts'

/**
 * Relays over undici.
 * @param active where the relays under way are kept
 * @param draining does the gateway shut down, so that client connections should end?
 */
export function httpRelays(table: RouteTable, options: RelayOptions, refuse: Refusal, active: InFlight<Relay>, draining: () => boolean): OpenRelay {
  return (visit, sandbox) => {
    const upstream = upstreamOf(sandbox, table.tiesOf(sandbox), visit.port, options)
    return upstream === null ? null : new HttpRelay(visit, upstream, options, refuse, active, draining)
  }
}

/** Methods that undici announces a body for; without one they say so themselves. */
const bodyMethods = new Set(['POST', 'PUT', 'PATCH'])

/** One exchange. Also undici's handler of it, so that a request costs one object here. */
class HttpRelay implements Relay, Handler, Exchange {
  place = 0
  wire: Wire | null = null
  reset = false
  lastByteAt: number
  readonly #visit: Visit
  readonly #upstream: Upstream
  readonly #options: RelayOptions
  readonly #refuse: Refusal
  readonly #active: InFlight<Relay>
  #controller: Dispatcher.DispatchController | null = null
  #body: RequestBody | null = null
  #answered = false
  #bodyBegun = false
  #stream = false
  /** Content-Length of the response, or -1. */
  #length = -1
  /** The body is not in chunks. */
  #plain = false
  /** 1xx that came. */
  #informed = 0
  #over = false
  #retried = false
  #dials = 0
  #onDrain: (() => void) | null = null
  readonly draining: () => boolean

  constructor(visit: Visit, upstream: Upstream, options: RelayOptions, refuse: Refusal, active: InFlight<Relay>, draining: () => boolean) {
    this.#visit = visit
    this.#upstream = upstream
    this.#options = options
    this.#refuse = refuse
    this.#active = active
    this.draining = draining
    this.lastByteAt = visit.locatedAt
    upstream.active++
    active.add(this)
  }

  send(): void {
    const { request, head } = this.#visit
    const method = request.method as string
    const headers = head.out
    const hasBody = head.chunked || (head.contentLength !== '' && head.contentLength !== '0')
    headers.push('host', this.#options.preserveHost && head.host !== undefined ? head.host : this.#upstream.authority)
    if (head.contentLength !== '') headers.push('content-length', head.contentLength)
    else if (!head.chunked && bodyMethods.has(method)) headers.push('content-length', '0')
    if (hasBody) this.#body = new RequestBody(this.#visit, this)
    this.#dispatch()
  }

  #dispatch(): void {
    const { request, target, head } = this.#visit
    // undici closes the connection after a HEAD and after a body on a method that seldom has one. The former is needed: of a sandbox that
    // answers HEAD like GET the body would be read as the answer to the next request, and with it whatever a stranger put into a file.
    this.#upstream.dispatch({ path: target, method: request.method as string, headers: head.out, body: this.#body, headersTimeout: 0, bodyTimeout: 0 }, this, this.lastByteAt)
  }

  clientClosed(): void {
    if (this.#over) return
    this.#end()
    this.#controller?.abort(new Fault('EDGE_BAD_REQUEST', 'the client went away'))
    this.#body?.destroy()
  }

  announceTrailers(lines: string): void {
    if (this.wire !== null && this.wire.socket !== null) this.wire.socket.trailers = lines
  }

  checkTimes(now: number): void {
    const { firstByteTimeout, idleTimeout } = this.#options
    const quiet = now - this.lastByteAt
    if (!this.#bodyBegun && this.#visit.firstByteAt === 0) {
      if (firstByteTimeout > 0 && quiet > firstByteTimeout) this.#giveUp(new Fault('EDGE_UPSTREAM_TIMEOUT', 'no answer in time'))
    } else if (idleTimeout > 0 && !this.#stream && quiet > idleTimeout) this.#giveUp(new Fault('EDGE_UPSTREAM_TIMEOUT', 'the connection fell silent'))
  }

  leave(): void {
    this.#giveUp(new Fault('EDGE_DRAINING'))
  }

  #giveUp(fault: Fault): void {
    if (this.#controller === null) this.#fail(fault)
    else this.#controller.abort(fault)
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    this.#controller = controller
    if (this.#over) return controller.abort(new Fault('EDGE_BAD_REQUEST', 'the client went away'))
    if (this.wire !== null) {
      this.wire.relay = this
      if (this.wire.socket !== null) this.wire.socket.trailers = ''
    }
    this.#visit.dialledAt = performance.now()
  }

  onResponseStarted(): void {
    this.#answered = true
  }

  onResponseStart(_controller: Dispatcher.DispatchController, status: number, fields: ResponseFields, reason?: string): void {
    const visit = this.#visit
    const response = visit.response
    if (this.#over || response === null) return
    this.lastByteAt = performance.now()
    if (status < 200) return this.#inform(status, fields)
    visit.firstByteAt = this.lastByteAt
    visit.status = status
    const method = visit.request.method
    checkTransferCoding(fields)
    const out = responseFields(fields, rewriterFor(visit, this.#upstream.authority), visit.ownHost)
    // `Trailer` announces what only chunks can carry (RFC 9110 §6.6.2): Node refuses to send it otherwise.
    const length = fields['content-length']
    this.#plain = fields['transfer-encoding'] === undefined
    this.#length = typeof length === 'string' ? Number(length) : -1
    const bodiless = method === 'HEAD' || status === 204 || status === 304
    dropField(out, 'trailer', length !== undefined || bodiless || visit.request.httpVersionMinor === 0)
    if (status === 204) dropField(out, 'content-length', true)
    if (this.draining()) out.push('connection', 'close')
    this.#stream = isEventStream(String(fields['content-type'] ?? ''))
    try {
      // undici reads it as UTF-8, node:http writes Latin-1: what does not fit is left to the status.
      response.writeHead(status, reason !== undefined && reasonFits.test(reason) ? reason : undefined, out)
    } catch (error) {
      throw new Fault('EDGE_UPSTREAM_BROKEN', 'the sandbox sent a header that HTTP does not allow', { cause: error })
    }
    // A body in the same packet goes out with the head; when none comes at once, the head must not wait for it.
    if (!bodiless && length !== '0') process.nextTick(flushHead, this)
  }

  /** Sends the head alone when the body did not begin in the same tick. */
  flushHead(): void {
    if (!this.#bodyBegun && !this.#over) this.#visit.response?.flushHeaders()
  }

  onResponseData(controller: Dispatcher.DispatchController, chunk: Buffer): void {
    if (this.#over) return
    const visit = this.#visit
    this.#bodyBegun = true
    visit.bytesOut += chunk.length
    this.lastByteAt = performance.now()
    const response = visit.response
    if (response === null) return
    const taken = chunk.length === this.#length && chunk.length <= smallBody ? writeAtOnce(response, chunk.toString('latin1')) : writeAtOnce(response, chunk)
    // Chunks may be followed by a part of a trailer, which the parser keeps.
    if (this.wire !== null && this.wire.socket !== null) this.wire.socket.spent = this.#plain && response.writableLength === 0
    // Nothing follows a whole body: a pause behind it would turn the sandbox's close into a broken answer.
    if (taken || visit.bytesOut === this.#length) return
    controller.pause()
    if (this.#onDrain === null) {
      this.#onDrain = () => {
        this.lastByteAt = performance.now()
        this.#controller?.resume()
      }
      response.on('drain', this.#onDrain)
    }
  }

  onResponseEnd(_controller: Dispatcher.DispatchController, trailers: ResponseFields): void {
    if (this.wire !== null) {
      this.wire.served++
      this.wire.relay = null
      if (!this.#bodyBegun && this.wire.socket !== null) this.wire.socket.spent = true
    }
    if (this.#over) return
    if (this.reset) return this.#fail(new Fault('EDGE_UPSTREAM_BROKEN'))
    this.#end()
    const response = this.#visit.response
    if (response === null) return
    if (response.chunkedEncoding && hasFields(trailers)) response.addTrailers(asPairs(trailers))
    response.end()
  }

  onResponseError(_controller: Dispatcher.DispatchController, error: Error): void {
    const wire = this.wire
    if (wire !== null && wire.relay === this) wire.relay = null
    if (this.#over) return
    if (this.#upstream.destroyed) return this.#fail(new Fault('EDGE_UPSTREAM_BROKEN', 'the sandbox ended'))
    if (this.#retryStale(wire, error) || this.#retryBooting(error)) return
    // undici's parser errors carry no code (its table maps names to numbers, not numbers to names); to a status below 100 it objects by assertion.
    this.#fail(error.name === 'HTTPParserError' || error.name === 'AssertionError' ? new Fault('EDGE_UPSTREAM_BROKEN', 'the sandbox did not answer in HTTP') : toFault(error))
  }

  /** A connection that served before may die under a request that the sandbox never saw. One more try, when a replay is safe. */
  #retryStale(wire: Wire | null, error: Error): boolean {
    const code = (error as { code?: string }).code
    const stale = code === 'UND_ERR_SOCKET' || code === 'ECONNRESET' || code === 'EPIPE'
    const { request, head } = this.#visit
    const safe = this.#body === null && (safeMethods.has(request.method) || head.replayable)
    if (!stale || !safe || this.#retried || this.#answered || wire === null || wire.served === 0) return false
    this.#retried = true
    this.reset = false
    // Of the attempt that failed: while the next one dials, there is nothing to abort.
    this.#controller = null
    this.#dispatch()
    return true
  }

  /** A port of a young sandbox may not listen yet. Tried again for a bounded time, as long as no connection ever stood. */
  #retryBooting(error: Error): boolean {
    const upstream = this.#upstream
    if ((error as { code?: string }).code !== 'ECONNREFUSED' || upstream.reached || (this.#body !== null && this.#body.begun)) return false
    const wait = Math.min(50 * 2 ** this.#dials, 400)
    if (performance.now() + wait - upstream.since > this.#options.bootGrace) return false
    this.#dials++
    setTimeout(() => {
      if (this.#over) return
      if (upstream.destroyed) this.#fail(new Fault('EDGE_UPSTREAM_BROKEN', 'the sandbox ended'))
      else this.#dispatch()
    }, wait)
    return true
  }

  /** Passes a 1xx on. RFC 9110 §15.2: HTTP/1.0 clients do not know them, and 100 was ours to give. */
  #inform(status: number, fields: ResponseFields): void {
    const { request, response } = this.#visit
    if (++this.#informed > mostInformed) throw new Fault('EDGE_UPSTREAM_BROKEN')
    if (status < 102 || request.httpVersionMinor === 0 || response === null || response.headersSent) return
    const informative = responseFields(fields, null, '')
    // A response that waits for its turn: node:http would put what it holds back behind the final head, into the body.
    if (response.socket === null) response.once('socket', (socket: Socket) => socket.write(`${headText(`HTTP/1.1 ${status} ${STATUS_CODES[status] ?? ''}`, informative)}\r\n`, 'latin1'))
    else response.writeInformation(status, informative)
  }

  #fail(fault: Fault): void {
    this.#end()
    this.#body?.destroy()
    const visit = this.#visit
    if (visit.response !== null && visit.response.headersSent) {
      visit.code = fault.code
      breakOff(visit.socket, visit.peer)
    } else this.#refuse(visit, fault)
  }

  #end(): void {
    this.#over = true
    this.#upstream.active--
    this.#active.delete(this)
  }
}

const eventStream = 'text/event-stream'

/** In any case (RFC 9110 §8.3.1), and with any parameters. */
function isEventStream(type: string): boolean {
  return type.slice(0, eventStream.length).toLowerCase() === eventStream
}

/** What node:http writes (RFC 9112 §4). */
const reasonFits = /^[\t\x20-\x7e\x80-\xff]*$/

/** Bodies up to this size go out together with the head. */
const smallBody = 16 * 1024

/**
 * Hands head and piece to the kernel before it returns, where node:http would wait for the next tick. A small body comes as a string, so that
 * head and body become one: as a vector of two they would cost more than the rest of a small response.
 * @returns false: the client has to catch up first
 */
function writeAtOnce(response: ServerResponse, piece: Buffer | string): boolean {
  const { socket } = response
  socket?.cork()
  const taken = response.write(piece, 'latin1')
  socket?.uncork()
  return taken
}

function flushHead(relay: HttpRelay): void {
  relay.flushHead()
}

function dropField(out: string[], name: string, when: boolean): void {
  if (!when) return
  for (let i = out.length - 2; i >= 0; i -= 2) if (out[i] === name) out.splice(i, 2)
}

function hasFields(fields: ResponseFields): boolean {
  for (const name in fields) if (Object.hasOwn(fields, name)) return true
  return false
}

function asPairs(fields: ResponseFields): [string, string][] {
  const flat = responseFields(fields, null, '')
  const pairs: [string, string][] = []
  for (let i = 0; i < flat.length; i += 2) pairs.push([flat[i] as string, flat[i + 1] as string])
  return pairs
}
