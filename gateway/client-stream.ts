/**
 * The client's side of a tunnel as a stream of our own. http-proxy-3 gets this instead of the client's socket: it may end, destroy
 * and write heads as it likes, and what reaches the client is still decided here.
 */
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { Duplex } from 'node:stream'
import { FrameBoundary, goingAway } from './frame-boundary.ts'

export class ClientStream extends Duplex {
  readonly #socket: Socket
  readonly #frames = new FrameBoundary()
  #open = false
  /** The first write of http-proxy-3 is a head in which repeated fields are merged. It is dropped: we sent our own. */
  #headDropped = false
  #leaving = false
  #left = false
  lastByteAt = performance.now()
  bytesIn = 0
  bytesOut = 0

  constructor(socket: Socket) {
    super({ allowHalfOpen: true, highWaterMark: 64 * 1024 })
    this.#socket = socket
    socket.on('data', this.#onData)
    socket.on('end', () => this.push(null))
    socket.on('error', () => this.destroy())
    socket.on('close', () => this.destroy())
  }

  /** One side has ended, the other not yet. */
  get halfClosed(): boolean {
    return this.readableEnded || this.writableEnded
  }

  /** The head was sent: from now on the client's connection is a tunnel, and ends as one. */
  open(): void {
    this.#open = true
    if (this.#leaving) this.#sayGoingAway()
  }

  /** Says 1001 as soon as no frame is under way, and lets nothing of the sandbox follow it. */
  leave(): void {
    this.#leaving = true
    if (this.#open && this.#frames.clear) this.#sayGoingAway()
  }

  #sayGoingAway(): void {
    if (this.#left) return
    this.#left = true
    this.#socket.write(goingAway)
  }

  readonly #onData = (chunk: Buffer): void => {
    this.lastByteAt = performance.now()
    this.bytesIn += chunk.length
    if (!this.push(chunk)) this.#socket.pause()
  }

  override _read(): void {
    this.#socket.resume()
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: (error?: Error | null) => void): void {
    if (!this.#headDropped) {
      this.#headDropped = true
      return callback()
    }
    if (this.#left) return callback()
    this.lastByteAt = performance.now()
    if (this.#leaving) {
      const kept = this.#frames.feed(chunk, true)
      this.bytesOut += kept
      this.#socket.write(chunk.subarray(0, kept))
      if (this.#frames.clear) this.#sayGoingAway()
      return callback()
    }
    this.#frames.feed(chunk)
    this.bytesOut += chunk.length
    if (this.#socket.write(chunk)) callback()
    else this.#socket.once('drain', callback)
  }

  override _final(callback: (error?: Error | null) => void): void {
    if (this.#open) this.#socket.end()
    callback()
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    // Before the tunnel stands the socket still has to carry a refusal: it is only let go.
    this.#socket.off('data', this.#onData)
    if (this.#open) this.#socket.destroy()
    callback(error)
  }

  // http-proxy-3 treats what it gets as a socket; the options were set on the real one.
  setTimeout(): this {
    return this
  }
  setNoDelay(): this {
    return this
  }
  setKeepAlive(): this {
    return this
  }
  destroySoon(): void {
    if (this.writable) this.end()
    if (this.writableFinished) this.destroy()
    else this.once('finish', this.destroy)
  }
}
