import type { Socket } from 'node:net'

/**
 * Ends a connection so that its other side cannot take what it got for all. A connection whose end was said already, behind everything that
 * was to be sent, cannot be reset any more: libuv refuses that, and net.Socket would keep the descriptor for good.
 */
export function reset(socket: Socket): void {
  if (socket.writableEnded && socket.writableLength === 0) socket.destroy()
  else socket.resetAndDestroy()
}
