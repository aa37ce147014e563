/** How connections end before their time: nothing that is not whole may look as if it were. */
import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import type { Peer } from './peer.ts'
import type { Visit } from './visit.ts'

/** Ends the client's connection so that it cannot look like the end of the response. */
export function breakOff(visit: Visit): void {
  const { response, socket } = visit
  // Without chunks or a length the end of the connection is the end of the body (HTTP/1.0): only a reset says otherwise.
  if (response !== null && !response.chunkedEncoding && !visit.hasLength) reset(socket)
  else socket.destroy()
}

/** Ends a client's connection, whatever is on it. */
export function hangUp(socket: Socket, peer: Peer): void {
  const answer = unframed(peer)
  if (answer !== null && !answer.writableFinished) reset(socket)
  else socket.destroy()
}

/** The client has said its end. node:http sends what was written so far, and then ours: that must be all there is to say. */
export function clientEnded(socket: Socket, peer: Peer): void {
  const answer = unframed(peer)
  if (answer !== null && !answer.writableEnded) reset(socket)
}

/** The answer under way whose end is the end of the connection (HTTP/1.0): only a reset says that it is not whole. */
function unframed({ open: [answer] }: Peer): ServerResponse | null {
  return answer !== undefined && answer.headersSent && answer.req.httpVersionMinor === 0 ? answer : null
}

/**
 * Ends a connection so that its other side cannot take what it got for all. A connection whose end was said already, behind everything that
 * was to be sent, cannot be reset any more: libuv refuses that, and net.Socket would keep the descriptor for good.
 */
export function reset(socket: Socket): void {
  if (socket.writableEnded && socket.writableLength === 0) socket.destroy()
  else socket.resetAndDestroy()
}
