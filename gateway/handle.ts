/** The hot function: one request, from its head to the relay, as numbered phases. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { Fault } from '#policies/fault.ts'
import { admit } from './admit.ts'
import { breakOff } from './break-off.ts'
import type { Edge } from './edge.ts'
import { addForwarded, connectionOptions, readRequestHead, type RequestHead } from './headers.ts'
import { clientOf, peerOf, type Peer } from './peer.ts'
import { safeMethods, type Relay } from './relay.ts'
import { refuse } from './respond.ts'
import type { Sandbox } from './routes.ts'
import { accessLine, Visit } from './visit.ts'

const visitKey = Symbol('visit')
const relayKey = Symbol('relay')
type Answer = ServerResponse & { [visitKey]?: Visit; [relayKey]?: Relay; edge?: Edge }

export function handle(edge: Edge, request: IncomingMessage, response: ServerResponse, awaitsContinue: boolean): void {
  // 1. Read the head once, and open the record of this request.
  const visit = begin(edge, request, response)
  if (visit.peer.closing) return void visit.peer.ignored++
  visit.awaitsContinue = awaitsContinue
  const answer = response as Answer
  answer[visitKey] = visit
  answer.edge = edge
  visit.peer.open.push(response)
  response.on('close', onClose).on('error', ignore)
  if (losesWhatFollows(visit.head)) {
    visit.peer.closing = true
    response.shouldKeepAlive = false
  }
  // What has to wait is not asked for its right to come in before its turn.
  const ahead = waitsFor(visit.peer)
  if (ahead === null) answerInTurn(edge, visit, answer)
  else ahead.once('close', () => visit.socket.writable && answerInTurn(edge, visit, answer))
}

function answerInTurn(edge: Edge, visit: Visit, answer: Answer): void {
  // 2. What needs no sandbox.
  const url = visit.request.url as string
  if (lacksHost(visit)) return refuse(visit, 'EDGE_BAD_REQUEST', 'missing Host', edge.draining())
  if (answersItself(visit, url)) return

  // 3. Find the sandbox, and ask whether this client may reach it.
  const refused = admit(edge, visit)
  if (refused !== null) {
    if (refused.code === 'EDGE_BAD_ROUTE' && asksReadiness(url)) return answerReadiness(edge, visit)
    return refuse(visit, refused.code, refused.detail, edge.draining())
  }

  if (visit.redirect !== '') return redirect(visit)

  // 4. Tell the sandbox who asks, and relay.
  const sandbox = visit.sandbox as Sandbox
  if (edge.renewals !== null) edge.renewals.used(sandbox.entry)
  addForwarded(visit.head, { peer: visit.peer.address, proto: 'http', port: visit.peer.localPort, prefix: visit.plainPrefix, requestId: visit.requestId })
  const relay = edge.openRelay(visit, sandbox)
  if (relay === null) return refuse(visit, 'EDGE_OVERLOADED', 'too many requests at once for this port', edge.draining())
  answer[relayKey] = relay
  relay.send()
}

/**
 * RFC 9112 §9.3.2: what was sent ahead may be answered beside each other only where nothing of it asks for a change. Otherwise each waits for the one
 * before it, or a sandbox would see them in an order of its own.
 */
function waitsFor({ open }: Peer): ServerResponse | null {
  if (open.length === 1 || open.every(({ req }) => safeMethods.has(req.method))) return null
  return open.at(-2) as ServerResponse
}

/** The same for an upgrade. Only WebSocket comes here; the server leaves other protocols to `handle` as ordinary requests. */
export function handleUpgrade(edge: Edge, request: IncomingMessage, socket: Socket, early: Buffer): void {
  const visit = beginRaw(edge, request, socket)
  if (visit === null) return
  if (lacksHost(visit)) return endUpgrade(edge, visit, new Fault('EDGE_BAD_REQUEST', 'missing Host'))
  const refused = edge.draining() ? { code: 'EDGE_DRAINING' as const, detail: '' } : admit(edge, visit)
  if (refused !== null) return endUpgrade(edge, visit, new Fault(refused.code, refused.detail))
  // Which bytes are its body and which belong to the tunnel would be anybody's guess.
  if (visit.head.chunked || /[1-9]/.test(visit.head.contentLength)) return endUpgrade(edge, visit, new Fault('EDGE_BAD_REQUEST', 'an upgrade with a body'))
  addForwarded(visit.head, { peer: visit.peer.address, proto: 'http', port: visit.peer.localPort, prefix: visit.plainPrefix, requestId: visit.requestId })
  const sandbox = visit.sandbox as Sandbox
  if (edge.renewals !== null) edge.renewals.used(sandbox.entry)
  edge.tunnels.relay(visit, sandbox, socket, early)
}

/** CONNECT would be a tunnel to anywhere (RFC 9110 §9.3.6). */
export function refuseConnect(edge: Edge, request: IncomingMessage, socket: Socket): void {
  const visit = beginRaw(edge, request, socket)
  if (visit !== null) endUpgrade(edge, visit, new Fault('EDGE_METHOD_NOT_ALLOWED', 'CONNECT is not supported'))
}

/** Is it a request to become a WebSocket? Token lists, any spelling (RFC 9110 §7.8, RFC 6455 §4.2.1). */
export function asksForWebSocket(request: IncomingMessage): boolean {
  const { upgrade, connection } = request.headers
  if (request.method !== 'GET' || upgrade === undefined || connection === undefined) return false
  return connectionOptions(upgrade).has('websocket') && connectionOptions(connection).has('upgrade') && request.httpVersionMinor === 1
}

/** RFC 9112 §3.2: only HTTP/1.0 may do without. */
function lacksHost({ head, request }: Visit): boolean {
  return head.host === undefined && request.httpVersionMinor === 1
}

/**
 * Behind a request that asks for any upgrade, node:http throws away the rest of the packet, also when nobody follows it. Where the next
 * request begins is unknown then, so there is none on this connection (RFC 9112 §11.2).
 */
function losesWhatFollows({ upgrade, connection }: RequestHead): boolean {
  return upgrade !== '' && connectionOptions(connection).has('upgrade')
}

function begin(edge: Edge, request: IncomingMessage, response: ServerResponse | null): Visit {
  const peer = peerOf(request.socket, edge.trustedProxies)
  const head = readRequestHead(request.rawHeaders, peer.trusted)
  const visit = new Visit(request, response, peer, head)
  visit.client = clientOf(peer, head.forwardedFor, edge.trustedProxies)
  visit.requestId = head.requestId !== undefined && saneRequestId(head.requestId) ? head.requestId : edge.nextRequestId()
  return visit
}

/**
 * The same for a request that node:http hands over with its bare socket. It does so also while earlier requests of the connection wait for
 * their answers, which ours would be taken for: null, and the connection ends.
 */
function beginRaw(edge: Edge, request: IncomingMessage, socket: Socket): Visit | null {
  const visit = begin(edge, request, null)
  socket.on('error', () => socket.destroy())
  if (visit.peer.open.length === 0 && !visit.peer.closing) return visit
  visit.code = 'EDGE_BAD_REQUEST'
  finish(edge, visit)
  breakOff(socket, visit.peer)
  // node:http looks after the connection no more: an answer whose turn has not come would never hear that there is no client.
  for (const waiting of visit.peer.open.slice()) if (waiting.socket === null) onClose.call(waiting)
  return null
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

function endUpgrade(edge: Edge, visit: Visit, fault: Fault): void {
  refuse(visit, fault.code, fault.detail, true)
  finish(edge, visit)
}

/** A write that met a connection just gone: `close` follows and says all there is to say. */
function ignore(): void {
  return undefined
}

/** Emitted once per response, whether it was completed or its client went away. */
function onClose(this: ServerResponse): void {
  const answer = this as Answer
  const visit = answer[visitKey] as Visit
  const { open } = visit.peer
  const place = open.lastIndexOf(this)
  if (place === -1) return
  if (place === open.length - 1) open.pop()
  else open.splice(place, 1)
  answer[relayKey]?.clientClosed()
  finish(answer.edge as Edge, visit)
  if (visit.request.complete || visit.socket.destroyed) return
  visit.peer.unread = visit.request
  lingerBriefly(visit)
}

/** A client that still uploads after its answer may do so for a short while, so that it gets to read the answer. */
const lingerMs = 5_000

function lingerBriefly(visit: Visit): void {
  const timer = setTimeout(() => {
    if (!visit.request.complete) visit.socket.destroy()
  }, lingerMs)
  timer.unref()
  // Also when the connection ends: an incoming message closes with it.
  visit.request.once('close', () => clearTimeout(timer))
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
