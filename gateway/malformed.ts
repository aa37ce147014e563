/** What never became a request: bytes that node:http could not read, requests too far ahead of their answers, connections too many. */
import type { IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'
import type { FaultCode } from '#policies/fault.ts'
import { breakOff } from './break-off.ts'
import type { Edge } from './edge.ts'
import { peerOf, plainAddress } from './peer.ts'
import { malformedLine } from './visit.ts'

/** Requests of one connection that may wait for their answers, or for its end. Clients send a few ahead at most, if any (RFC 9112 §9.3.2). */
const mostSentAhead = 64

/**
 * node:http reads on while requests wait, and stops seeing the client go: one connection could fill all places of a sandbox's port, and
 * keep them after it left. Beyond the limit the connection ends, and its requests with it.
 */
export function sentTooFarAhead(edge: Edge, { socket }: IncomingMessage): boolean {
  const peer = peerOf(socket, edge.trustedProxies)
  if (peer.open.length + peer.ignored < mostSentAhead) return false
  if (!socket.destroyed) {
    note(edge, peer.address, 0, 'EDGE_OVERLOADED')
    breakOff(socket, peer)
  }
  return true
}

/** A connection closed at once, because even those that get a 503 were too many. */
export function noteDropped(edge: Edge, remoteAddress: string | undefined): void {
  note(edge, plainAddress(remoteAddress ?? ''), 0, 'EDGE_OVERLOADED')
}

const tooLarge = { status: 431, reason: 'Request Header Fields Too Large', code: 'EDGE_HEADERS_TOO_LARGE', text: 'the header section is too large' } as const
const tooLate = { status: 408, reason: 'Request Timeout', code: 'EDGE_BAD_REQUEST', text: 'the request did not arrive in time' } as const
const unreadable = { status: 400, reason: 'Bad Request', code: 'EDGE_BAD_REQUEST', text: 'the request is malformed' } as const

/** Answers what node:http could not read as a request. The connection ends: where the next request would begin is unknown. */
export function answerClientError(edge: Edge, error: NodeJS.ErrnoException, socket: Socket): void {
  if (error.code === 'ECONNRESET' || !socket.writable) {
    socket.destroy()
    return
  }
  // Bytes of a body, or behind a request that is not answered yet: whatever we said would be taken for that answer, or a part of it. Where
  // the body's request was answered already, for an answer to the next one.
  const peer = peerOf(socket, edge.trustedProxies)
  if (peer.open.length > 0 || (peer.unread !== null && !peer.unread.complete)) return breakOff(socket, peer)
  const { status, reason, code, text } = error.code === 'HPE_HEADER_OVERFLOW' ? tooLarge : error.code === 'ERR_HTTP_REQUEST_TIMEOUT' ? tooLate : unreadable
  note(edge, peer.address, status, code)
  const body = `OpenSandbox Ingress: ${text}\n`
  socket.on('error', () => socket.destroy())
  socket.end(`HTTP/1.1 ${status} ${reason}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: ${body.length}\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\nconnection: close\r\n\r\n${body}`)
  // Nobody reads on: a client that keeps sending must not keep the connection.
  socket.once('finish', () => socket.destroySoon())
}

function note(edge: Edge, client: string, status: number, code: FaultCode): void {
  edge.metrics.malformed(code)
  edge.access?.(malformedLine(client, status, code, Date.now()))
}
