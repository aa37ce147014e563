/**
 * The client's side of a tunnel as a stream of our own. http-proxy-3 gets this instead of the client's socket: it may end, destroy
 * and write heads as it likes, and what reaches the client is still decided here.
 */
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { Duplex } from 'node:stream'
import { FrameBoundary, goingAway, messageTooBig } from './frame-boundary.ts'

export class ClientStream extends Duplex {
  readonly #socket: Socket
  readonly #onRefused: () => void
  /** What the sandbox sends. */
  readonly #frames = new FrameBoundary()
  /** What the client sends; null when nobody asked for a limit. */
  readonly #messages: FrameBoundary | null
  #open = false
  /** The first write of http-proxy-3 is a head in which repeated fields are merged. It is dropped: we sent our own. */
  #headDropped = false
  /** The Close frame to be said as soon as no frame is under way. */
  #parting: Uint8Array | null = null
  #left = false
  /** When a message of the client was too large, ms; 0: never. Since then nothing of it is passed on. */
  refusedAt = 0
  lastByteAt = performance.now()
  bytesIn = 0
  bytesOut = 0

  /**
   * @param maxMessage payload bytes of the client's messages; 0: no limit
   * @param onRefused the client has been told that its message was too large
   */
  constructor(socket: Socket, maxMessage: number, onRefused: () => void) {
    super({ allowHalfOpen: true, highWaterMark: 64 * 1024 })
    this.#socket = socket
    this.#messages = maxMessage === 0 ? null : new FrameBoundary(maxMessage)
    this.#onRefused = onRefused
    socket.on('data', this.#onData)
    socket.on('end', () => this.push(null))
    socket.on('error', () => this.destroy())
    socket.on('close', () => this.destroy())
  }

  /** One side has ended, the other not yet. */
  get halfClosed(): boolean {
    return this.readableEnded || this.writableEnded
  }

  /** One side does not take what the other has sent. */
  get stalled(): boolean {
    return this.#socket.isPaused() || this.#socket.writableNeedDrain
  }

  /** The head was sent: from now on the client's connection is a tunnel, and ends as one. */
  open(): void {
    this.#open = true
    this.#part()
  }

  /** Bytes that came right behind the client's head. */
  takeEarly(bytes: Buffer): void {
    if (bytes.length > 0) this.#onData(bytes)
  }

  /** Says 1001 as soon as no frame is under way, and lets nothing of the sandbox follow it. */
  leave(): void {
    this.#parting ??= goingAway
    this.#part()
  }

  #refuseMessage(): void {
    this.refusedAt = performance.now()
    this.#parting = messageTooBig
    // What still comes is thrown away, so that the end of the connection is no reset which swallows the reason.
    this.#socket.resume()
    this.#part()
  }

  #part(): void {
    if (this.#parting === null || !this.#open || !this.#frames.clear) return
    if (!this.#left) this.#socket.write(this.#parting)
    this.#left = true
    if (this.refusedAt !== 0) this.#onRefused()
  }

  readonly #onData = (chunk: Buffer): void => {
    if (this.refusedAt !== 0) return
    this.lastByteAt = performance.now()
    const passed = this.#messages === null ? chunk.length : this.#messages.feed(chunk)
    this.bytesIn += passed
    if (passed > 0 && !this.push(passed === chunk.length ? chunk : chunk.subarray(0, passed))) this.#socket.pause()
    if (this.#messages !== null && this.#messages.tooLarge) this.#refuseMessage()
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
    const kept = this.#frames.feed(chunk, this.#parting !== null)
    this.bytesOut += kept
    const drained = this.#socket.write(kept === chunk.length ? chunk : chunk.subarray(0, kept))
    this.#part()
    if (drained) callback()
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
