/**
 * The request's body on its way to the sandbox. undici destroys a body it no longer wants, and an IncomingMessage takes the client's
 * connection with it: this stream stands between, so that an early answer still reaches the client.
 */
import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { Readable } from 'node:stream'
import { Fault } from '#policies/fault.ts'
import { trailerLines } from './headers.ts'
import type { Visit } from './visit.ts'

/** The exchange that the body belongs to. */
export type Exchange = {
  /** When bytes moved last, ms since the process started. */
  lastByteAt: number
  /** The body is at its end, and these lines of fields follow. */
  announceTrailers(lines: string): void
}

export class RequestBody extends Readable {
  /** Bytes were asked for: the request can no longer be sent again from its start. */
  begun = false
  readonly #visit: Visit
  readonly #exchange: Exchange

  constructor(visit: Visit, exchange: Exchange) {
    super({ highWaterMark: 64 * 1024 })
    this.#visit = visit
    this.#exchange = exchange
    // undici listens only while it sends; an error after that has nobody left to tell.
    this.on('error', () => undefined)
  }

  override _read(): void {
    const { request, response } = this.#visit
    if (this.begun) {
      request.resume()
      return
    }
    this.begun = true
    if (this.#visit.awaitsContinue) {
      this.#visit.awaitsContinue = false
      if (response !== null) writeContinue(response)
    }
    request.on('data', this.#onData).on('end', this.#onEnd).on('close', this.#onClose)
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    const { request } = this.#visit
    request.off('data', this.#onData).off('end', this.#onEnd).off('close', this.#onClose)
    callback(error)
  }

  #onData = (chunk: Buffer): void => {
    this.#visit.bytesIn += chunk.length
    this.#exchange.lastByteAt = performance.now()
    if (!this.push(chunk)) this.#visit.request.pause()
  }

  #onEnd = (): void => {
    const { request, head } = this.#visit
    if (request.rawTrailers.length > 0) this.#exchange.announceTrailers(trailerLines(request.rawTrailers, head.connection))
    this.push(null)
  }

  #onClose = (): void => {
    if (!this.#visit.request.readableEnded) this.destroy(new Fault('EDGE_BAD_REQUEST', 'the client went away'))
  }
}

/** At once, or when it is this response's turn: node:http would put what it holds back behind the final head. */
function writeContinue(response: ServerResponse): void {
  if (response.socket !== null) response.writeContinue()
  else response.once('socket', (socket: Socket) => response.headersSent || socket.write('HTTP/1.1 100 Continue\r\n\r\n'))
}
