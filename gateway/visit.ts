/** One request from its arrival to its end: what was decided, when each stage was over, and the access line that says so. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import type { FaultCode } from '#policies/fault.ts'
import type { RequestHead } from './headers.ts'
import type { Peer } from './peer.ts'
import type { Sandbox } from './routes.ts'

/** Stage times are milliseconds since the process started; 0 means the stage was not reached. */
export class Visit {
  readonly request: IncomingMessage
  /** null for an upgrade, which has only its socket. */
  readonly response: ServerResponse | null
  readonly socket: Socket
  readonly peer: Peer
  readonly head: RequestHead
  readonly startedAt = performance.now()
  requestId = ''
  client: string
  sandbox: Sandbox | null = null
  port = 0
  /** Raw path and query as the sandbox gets them. */
  target = ''
  /** How much of the target's beginning looks like expiry and signature, and stays out of the log. */
  hidden = 0
  /** Where to send a browser that came in with a token in its query, and the cookie to go with it; '' for all others. */
  redirect = ''
  entryCookie = ''
  /** What URI mode took off the path. */
  prefix = ''
  /** The same without token or signature: what the sandbox may know. */
  plainPrefix = ''
  /** The host that names this sandbox and is its alone, for the cookies of the answer; '' where sandboxes share one. */
  ownHost = ''
  locatedAt = 0
  dialledAt = 0
  firstByteAt = 0
  status = 0
  code: FaultCode | '' = ''
  bytesIn = 0
  bytesOut = 0
  /** The client announced a body and waits for `100 Continue`. */
  awaitsContinue = false
  upgraded = false

  constructor(request: IncomingMessage, response: ServerResponse | null, peer: Peer, head: RequestHead) {
    this.request = request
    this.response = response
    this.socket = request.socket
    this.peer = peer
    this.head = head
    this.client = peer.address
  }
}

let stampedMs = 0
let stamp = ''
/** RFC 3339 with milliseconds, built once per millisecond. */
function timestamp(now: number): string {
  if (now !== stampedMs) {
    stampedMs = now
    stamp = new Date(now).toISOString()
  }
  return stamp
}

/**
 * The access line: JSON, one per request, refused ones too. No query, no signature, no token: a path is cut at its `?`, and what
 * URI mode took off it is not repeated. Times are whole microseconds.
 * @param wall Unix milliseconds
 */
export function accessLine(visit: Visit, wall: number, now: number): string {
  const id = visit.sandbox === null ? '' : visit.sandbox.entry.id
  return (
    '{"level":"info","ts":"' + timestamp(wall) +
    '","logger":"sallyport.gateway","msg":"' + (visit.upgraded ? 'upgrade' : 'request') +
    '","request_id":"' + quoted(visit.requestId) +
    '","client":"' + quoted(visit.client) +
    '","method":"' + quoted(visit.request.method ?? '') +
    '","sandbox_id":"' + quoted(id) +
    '","port":' + visit.port +
    ',"path":"' + quoted(pathOf(visit.hidden === 0 ? visit.target : visit.target.slice(visit.hidden))) +
    '","status":' + visit.status +
    ',"code":"' + visit.code +
    '","duration_us":' + micros(visit.startedAt, now) +
    ',"locate_us":' + micros(visit.startedAt, visit.locatedAt) +
    ',"dial_us":' + micros(visit.locatedAt, visit.dialledAt) +
    ',"first_byte_us":' + micros(visit.dialledAt, visit.firstByteAt) +
    ',"bytes_in":' + visit.bytesIn +
    ',"bytes_out":' + visit.bytesOut +
    '}\n'
  )
}

/** The same for bytes that never became a request. @param client address of the peer */
export function malformedLine(client: string, status: number, code: FaultCode, wall: number): string {
  return `{"level":"info","ts":"${timestamp(wall)}","logger":"sallyport.gateway","msg":"malformed","client":"${quoted(client)}","status":${status},"code":"${code}"}\n`
}

function micros(from: number, to: number): number {
  return to === 0 || from === 0 ? 0 : Math.round((to - from) * 1000)
}

const longestPath = 512

function pathOf(target: string): string {
  const query = target.indexOf('?')
  const path = query === -1 ? target : target.slice(0, query)
  return path.length > longestPath ? path.slice(0, longestPath) : path
}

/** Text for the inside of a JSON string. Nearly everything needs nothing done. */
function quoted(text: string): string {
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    if (code < 0x20 || code === 0x22 || code === 0x5c || code > 0x7e) return JSON.stringify(text).slice(1, -1)
  }
  return text
}
