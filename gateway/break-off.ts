/** How connections end before their time: nothing that is not whole may look as if it were. */
import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import type { Peer } from './peer.ts'

/** Ends a client's connection, whatever is on it. */
export function breakOff(socket: Socket, peer: Peer): void {
  const answer = unframed(peer)
  if (answer !== null) reset(socket)
  else socket.destroy()
}

/** The client has said its end. node:http sends what was written so far, and then ours: that must be all there is to say. */
export function clientEnded(socket: Socket, peer: Peer): void {
  const answer = unframed(peer)
  if (answer !== null && !answer.writableEnded) reset(socket)
}

/**
 * The answer that is being sent, if its end is the end of the connection (HTTP/1.0): only a reset says that it is not whole. One that was
 * sent stays in the list for a tick, and the next one has begun meanwhile.
 */
function unframed({ open }: Peer): ServerResponse | null {
  const answer = open.find(({ writableFinished }) => !writableFinished)
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
