/** The hot function: one request, from its head to the relay, as numbered phases. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { decideAccess, decideStrongAccess, type AccessKeys } from '#policies/access.ts'
import type { NetworkTable } from '#policies/address.ts'
import { Fault, type FaultCode } from '#policies/fault.ts'
import { entryCookie, sameHostLocation, takeParameter, takeSegment } from './entry.ts'
import { addForwarded, connectionOptions, readRequestHead } from './headers.ts'
import { hasToken, type Located, type Locator, type NotLocated } from './locate.ts'
import type { Metrics } from './metrics.ts'
import { clientOf, peerOf } from './peer.ts'
import { HttpRelay, upstreamOf } from './relay-http.ts'
import type { UpgradeOptions, UpgradeRelay } from './relay-upgrade.ts'
import { refuse } from './respond.ts'
import type { RouteTable, Sandbox } from './routes.ts'
import type { FailureThrottle } from './throttle.ts'
import type { UpstreamGuard } from './upstream-guard.ts'
import { accessLine, Visit } from './visit.ts'

/** What a request meets on its way. Made once per gateway. */
export type Edge = {
  readonly table: RouteTable
  readonly locator: Locator
  readonly guard: UpstreamGuard
  readonly throttle: FailureThrottle
  readonly metrics: Metrics
  readonly upgrades: UpgradeRelay
  readonly relays: Set<HttpRelay>
  readonly relayOptions: UpgradeOptions
  readonly trustedProxies: NetworkTable
  readonly keys: () => AccessKeys
  /** Refuse unknown sandboxes and refused access alike, so that nobody learns which ids exist. */
  readonly hideMissing: boolean
  /** Browsers may enter by cookie in URI mode. */
  readonly uriCookies: boolean
  readonly draining: () => boolean
  readonly overloaded: () => boolean
  /** Takes one access line, newline included; null: none is wanted. */
  readonly access: ((line: string) => void) | null
  readonly nextRequestId: () => string
}

const visitKey = Symbol('visit')
const relayKey = Symbol('relay')
type Answer = ServerResponse & { [visitKey]?: Visit; [relayKey]?: HttpRelay; edge?: Edge }

export function handle(edge: Edge, request: IncomingMessage, response: ServerResponse, awaitsContinue: boolean): void {
  // 1. Read the head once, and open the record of this request.
  const visit = begin(edge, request, response)
  if (visit.peer.closing) return
  visit.awaitsContinue = awaitsContinue
  const answer = response as Answer
  answer[visitKey] = visit
  answer.edge = edge
  response.on('close', onClose)

  // 2. What needs no sandbox.
  if (answersItself(visit, request.url as string)) return

  // 3. Find the sandbox, and ask whether this client may reach it.
  const refused = admit(edge, visit)
  if (refused !== null) {
    if (refused.code === 'EDGE_BAD_ROUTE' && asksReadiness(request.url as string)) return answerReadiness(edge, visit)
    return refuse(visit, refused.code, refused.detail, edge.draining())
  }

  if (visit.redirect !== '') return redirect(visit)

  // 4. Tell the sandbox who asks, and relay.
  const sandbox = visit.sandbox as Sandbox
  const upstream = upstreamOf(sandbox, edge.table.tiesOf(sandbox), visit.port, edge.relayOptions)
  if (upstream === null) return refuse(visit, 'EDGE_OVERLOADED', 'too many requests at once for this port', edge.draining())
  addForwarded(visit.head, { peer: visit.peer.address, proto: 'http', port: visit.peer.localPort, prefix: visit.plainPrefix, requestId: visit.requestId })
  const relay = new HttpRelay(visit, upstream, edge.relayOptions, onRefusal, edge.relays, edge.draining)
  answer[relayKey] = relay
  relay.send()
}

/** The same for an upgrade. Only WebSocket comes here; the server leaves other protocols to `handle` as ordinary requests. */
export function handleUpgrade(edge: Edge, request: IncomingMessage, socket: Socket, early: Buffer): void {
  const visit = begin(edge, request, null)
  socket.on('error', () => socket.destroy())
  const refused = edge.draining() ? { code: 'EDGE_DRAINING' as const, detail: '' } : admit(edge, visit)
  if (refused !== null) return endUpgrade(edge, visit, new Fault(refused.code, refused.detail))
  addForwarded(visit.head, { peer: visit.peer.address, proto: 'http', port: visit.peer.localPort, prefix: visit.plainPrefix, requestId: visit.requestId })
  edge.upgrades.relay(visit, visit.sandbox as Sandbox, socket, early)
}

/** Is it a request to become a WebSocket? Token lists, any spelling (RFC 9110 §7.8, RFC 6455 §4.2.1). */
export function asksForWebSocket(request: IncomingMessage): boolean {
  const { upgrade, connection } = request.headers
  if (request.method !== 'GET' || upgrade === undefined || connection === undefined) return false
  return connectionOptions(upgrade).has('websocket') && connectionOptions(connection).has('upgrade') && request.httpVersionMinor === 1
}

function begin(edge: Edge, request: IncomingMessage, response: ServerResponse | null): Visit {
  const peer = peerOf(request.socket, edge.trustedProxies)
  const head = readRequestHead(request.rawHeaders, peer.trusted)
  const visit = new Visit(request, response, peer, head)
  visit.client = clientOf(peer, head.forwardedFor, edge.trustedProxies)
  visit.requestId = head.requestId !== undefined && saneRequestId(head.requestId) ? head.requestId : edge.nextRequestId()
  return visit
}

const longestRequestId = 128

function saneRequestId(text: string): boolean {
  if (text.length === 0 || text.length > longestRequestId) return false
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    if (code < 0x21 || code > 0x7e || code === 0x22 || code === 0x5c) return false
  }
  return true
}

/** Liveness, and `OPTIONS *` (RFC 9110 §9.3.7), are the gateway's own for every host. */
function answersItself(visit: Visit, url: string): boolean {
  const response = visit.response as ServerResponse
  const health = url === '/status.ok' || url.startsWith('/status.ok?')
  if (!health && url !== '*') return false
  visit.status = 200
  response.writeHead(200, health ? ['content-type', 'text/plain; charset=utf-8', 'content-length', '2'] : ['content-length', '0'])
  response.end(health && visit.request.method !== 'HEAD' ? 'OK' : undefined)
  return true
}

type Refused = { readonly code: FaultCode; readonly detail: string }

/** Fills in where the request goes, or says why it goes nowhere. Nothing here waits. */
function admit(edge: Edge, visit: Visit): Refused | null {
  const { head, request } = visit
  // Node reads other versions as if they were these; TE in HTTP/1.0 is an attack (RFC 9112 §6.1).
  if (request.httpVersionMajor !== 1 || request.httpVersionMinor > 1) return { code: 'EDGE_BAD_REQUEST', detail: 'unsupported HTTP version' }
  if (head.chunked && request.httpVersionMinor === 0) return { code: 'EDGE_BAD_REQUEST', detail: 'Transfer-Encoding in HTTP/1.0' }
  if (head.problem !== '') return { code: 'EDGE_BAD_REQUEST', detail: head.problem }
  if (edge.overloaded()) return { code: 'EDGE_OVERLOADED', detail: '' }
  const origin = originForm(request.url as string)
  if (origin === null) return { code: 'EDGE_BAD_REQUEST', detail: 'invalid request target' }
  if (origin.authority !== undefined) head.host = origin.authority
  if (head.host !== undefined && !isHost(head.host)) return { code: 'EDGE_BAD_REQUEST', detail: 'malformed Host' }

  const located = edge.locator.locate(head, origin.path)
  if (!located.ok) return notLocated(edge, visit, located)
  const now = performance.now()
  visit.sandbox = located.sandbox
  visit.port = located.route.port
  visit.target = located.target
  visit.prefix = located.prefix
  visit.plainPrefix = located.plainPrefix
  visit.hidden = located.hidden
  const token = takeToken(edge, visit, located)
  visit.locatedAt = now

  if (edge.table.stale(now)) return { code: 'EDGE_ROUTES_STALE', detail: '' }
  if (edge.hideMissing || hasToken(located.sandbox)) {
    const denied = checkAccess(edge, visit, located, token, now)
    if (denied !== null) return denied
  }
  const { state, host, id } = located.sandbox.entry
  if (state !== 'Running' || host === '') {
    edge.metrics.located('not_ready')
    return { code: 'EDGE_NOT_READY', detail: `sandbox not ready: ${id} (${state === 'Running' ? 'no address yet' : state})` }
  }
  if (!edge.guard.allows(host)) return { code: 'EDGE_UPSTREAM_FORBIDDEN', detail: '' }
  edge.metrics.located('success')
  return null
}

type Carried = { readonly token: string; readonly by: 'header' | 'path' | 'query' | 'cookie' }

/** Takes our token off the request, whether or not anybody asks for it: it is nothing a sandbox should learn. */
function takeToken(edge: Edge, visit: Visit, { by, prefix }: Located): Carried | null {
  const { head } = visit
  let found: Carried | null = null
  const cookie = by === 'host' ? head.hostCookie : by === 'path' && edge.uriCookies ? head.pathCookie : ''
  if (cookie !== '') found = { token: cookie, by: 'cookie' }
  const parameter = takeParameter(visit.target)
  if (parameter !== null) {
    found = { token: parameter.token, by: 'query' }
    visit.target = parameter.rest
  }
  const segment = by === 'path' ? takeSegment(visit.target) : null
  if (segment !== null) {
    found = { token: segment.token, by: 'path' }
    visit.target = segment.rest
    visit.prefix = `${prefix}/${segment.token}`
  }
  return head.access === undefined ? found : { token: head.access.trim(), by: 'header' }
}

/** A token that did not come as a cookie of its own accord is asked before the route's signature; a cookie after it. */
function checkStrong(edge: Edge, visit: Visit, { route, sandbox, by, prefix }: Located, { token, by: carried }: Carried): Refused | null {
  const query = visit.target.indexOf('?')
  const path = query === -1 ? visit.target : visit.target.slice(0, query)
  const method = visit.request.method as string
  const now = Date.now() / 1000
  const answer = decideStrongAccess({ token, id: route.id, port: route.port, method, path, epoch: sandbox.entry.epoch ?? 0, keys: edge.keys(), now })
  if (!answer.ok) return { code: answer.fault, detail: answer.detail }
  // A browser goes on without the token in its address bar, history and Referer; others have what they asked for.
  const browses = carried === 'query' && visit.response !== null && (method === 'GET' || method === 'HEAD')
  if (browses && (by === 'host' || (by === 'path' && edge.uriCookies))) {
    visit.redirect = sameHostLocation(prefix + visit.target)
    visit.entryCookie = entryCookie(token, prefix, visit.head.proto === 'https', now)
  }
  return null
}

function checkAccess(edge: Edge, visit: Visit, located: Located, carried: Carried | null, now: number): Refused | null {
  const { route, sandbox } = located
  const token = sandbox.entry.secureAccessToken?.trim() ?? ''
  const header = visit.head.secureAccess
  const strong = token !== '' && header === undefined && carried !== null && (carried.by !== 'cookie' || route.signature === undefined)
  if (strong) return checkStrong(edge, visit, located, carried)
  // Only short signatures can be guessed; a wrong header alone locks nobody out behind a shared address.
  if (token !== '' && header === undefined && route.signature !== undefined && edge.throttle.blocked(visit.client, now)) return { code: 'EDGE_TOO_MANY_ATTEMPTS', detail: '' }
  const answer = decideAccess({ token, header, route, keys: edge.keys(), now: Date.now() / 1000 })
  if (answer.ok) return null
  if (answer.fault === 'EDGE_UNAUTHORIZED' && route.signature !== undefined) edge.throttle.failed(visit.client, now)
  return { code: answer.fault, detail: answer.detail }
}

function notLocated(edge: Edge, visit: Visit, located: NotLocated): Refused {
  edge.metrics.located(located.fault === 'EDGE_NO_ROUTE' ? 'not_found' : 'error')
  visit.locatedAt = performance.now()
  if (located.fault === 'EDGE_NO_ROUTE' && edge.table.stale(visit.locatedAt)) return { code: 'EDGE_ROUTES_STALE', detail: '' }
  if (located.fault === 'EDGE_NO_ROUTE' && edge.hideMissing) return { code: 'EDGE_UNAUTHORIZED', detail: 'signature: signature required for this sandbox' }
  return { code: located.fault, detail: located.detail }
}

type Target = { readonly path: string; readonly authority?: string }

/**
 * The path of a request target and, in absolute form, its authority, which wins over Host (RFC 9112 §3.2.2). Nothing is decoded or
 * cleaned. A fragment, user information or another scheme has no business here: null.
 */
function originForm(url: string): Target | null {
  if (url.includes('#')) return null
  if (url.charCodeAt(0) === 0x2f) return { path: url }
  const lower = url.slice(0, 8).toLowerCase()
  const start = lower.startsWith('http://') ? 7 : lower.startsWith('https://') ? 8 : 0
  if (start === 0) return null
  let end = start
  while (end < url.length && url[end] !== '/' && url[end] !== '?') end++
  const authority = url.slice(start, end)
  if (authority === '' || authority.includes('@')) return null
  const path = url.slice(end)
  return { authority, path: path.startsWith('/') ? path : `/${path}` }
}

/** Letters, digits and what else may stand in a host name, an address or an escape, with a port (RFC 3986 §3.2.2, without sub-delims). */
function isHost(host: string): boolean {
  for (let i = 0; i < host.length; i++) {
    const code = host.charCodeAt(i)
    const plain = (code >= 0x61 && code <= 0x7a) || (code >= 0x30 && code <= 0x3a) || (code >= 0x41 && code <= 0x5b)
    if (!plain && code !== 0x2d && code !== 0x2e && code !== 0x5f && code !== 0x5d && code !== 0x25 && code !== 0x7e) return false
  }
  return true
}

function onRefusal(visit: Visit, fault: Fault): void {
  const edge = (visit.response as Answer | null)?.edge
  refuse(visit, fault.code, fault.detail, edge?.draining() ?? true)
}

export function endUpgrade(edge: Edge, visit: Visit, fault: Fault): void {
  refuse(visit, fault.code, fault.detail, true)
  finish(edge, visit)
}

/** Emitted once per response, whether it was completed or its client went away. */
function onClose(this: ServerResponse): void {
  const answer = this as Answer
  const visit = answer[visitKey] as Visit
  answer[relayKey]?.clientClosed()
  finish(answer.edge as Edge, visit)
  if (!visit.request.complete && !visit.socket.destroyed) lingerBriefly(visit)
}

/** A client that still uploads after its answer may do so for a short while, so that it gets to read the answer. */
const lingerMs = 5_000

function lingerBriefly(visit: Visit): void {
  const timer = setTimeout(() => {
    if (!visit.request.complete) visit.socket.destroy()
  }, lingerMs)
  visit.socket.once('close', () => clearTimeout(timer))
  visit.request.once('end', () => clearTimeout(timer))
}

export function finish(edge: Edge, visit: Visit): void {
  const now = performance.now()
  edge.metrics.done(visit, now)
  if (edge.access !== null) edge.access(accessLine(visit, Date.now(), now))
}

/** The same URL without the token, which now is a cookie. */
function redirect(visit: Visit): void {
  const response = visit.response as ServerResponse
  visit.status = 302
  response.writeHead(302, ['location', visit.redirect, 'set-cookie', visit.entryCookie, 'cache-control', 'no-store', 'referrer-policy', 'no-referrer', 'content-length', '0'])
  response.end()
}

function asksReadiness(url: string): boolean {
  return url === '/readyz' || url.startsWith('/readyz?')
}

/** Ready: the routes are true and nobody asked us to stop. Asked only where no sandbox is named, so that a sandbox keeps its own /readyz. */
function answerReadiness(edge: Edge, visit: Visit): void {
  if (edge.draining()) return refuse(visit, 'EDGE_DRAINING', '', true)
  if (edge.table.stale(performance.now())) return refuse(visit, 'EDGE_ROUTES_STALE', '', false)
  const response = visit.response as ServerResponse
  visit.status = 200
  response.writeHead(200, ['content-type', 'text/plain; charset=utf-8', 'content-length', '2'])
  response.end(visit.request.method === 'HEAD' ? undefined : 'OK')
}
