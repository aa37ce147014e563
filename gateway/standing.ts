/**
 * The connections of all pools together. Each port of each sandbox may keep idle ones, and a client may ask port after port: they are worth
 * having, but not worth a descriptor that somebody needs.
 */
import type { Socket } from 'node:net'
import { InFlight, type Placed } from './in-flight.ts'

type Connection = Placed & { readonly socket: Socket; readonly line: { readonly free: boolean } }

export class Standing {
  readonly #connections = new InFlight<Connection>()
  readonly #most: () => number

  /** @param most how many may stand before idle ones have to go */
  constructor(most: () => number) {
    this.#most = most
  }

  /** Before it is dialled. @param line whether it waits for an exchange now */
  add(socket: Socket, line: Connection['line']): void {
    this.makeRoom()
    const connection = { place: 0, socket, line }
    this.#connections.add(connection)
    socket.once('close', () => this.#connections.delete(connection))
  }

  /** Ends an idle connection when there are too many, for the one that is dialled next. Those in use are limited elsewhere. */
  makeRoom(): void {
    if (this.#connections.size < this.#most()) return
    for (const { socket, line } of this.#connections.all()) if (line.free && !socket.destroyed) return void socket.destroy()
  }
}
