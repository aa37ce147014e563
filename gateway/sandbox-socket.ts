/**
 * A connection to a sandbox that reads into the same memory again and again. Node's own sockets take fresh memory for every read, outside
 * V8's heap but on its account: with large bodies its collector then works as long as the gateway does.
 *
 *   read ──► undici's parser ──► exchange ──► written to the client, all of it ──► the same memory again
 *                     │              └──────► the client is slow: it waits there ──► fresh memory
 *                     └─────────────────────► a head came only in part ───────────► fresh memory
 *
 * So memory is used again only when the exchange said that nothing of it is needed, and never because nobody said anything.
 */
import { Socket, type TcpSocketConnectOpts } from 'node:net'

/** Bytes of one read: a common large answer with its head. Pages that no answer ever filled cost nothing. */
const readSize = 128 * 1024
/** Below it, what was read is copied. */
const smallRead = 16 * 1024

/** How undici ends a body in chunks. */
const lastChunk = '\r\n0\r\n\r\n'

export class SandboxSocket extends Socket {
  /** Set by the exchange: nothing of what was read last is needed any longer. */
  spent = false
  /** Lines of fields that follow the body being sent (RFC 9112 §7.1.2), which undici cannot send; '' for none. */
  trailers = ''
  /** Read, and not taken by the parser yet. */
  #waiting: Buffer | null = null

  constructor() {
    let memory: Buffer | null = null
    let copied = false
    const onread = {
      buffer: (): Uint8Array => (memory !== null && (copied || (this.spent && this.#waiting === null)) ? memory : (memory = Buffer.allocUnsafeSlow(readSize))),
      callback: (size: number, bytes: Uint8Array): boolean => {
        // A few bytes must not keep all of it, for as long as whoever sent them likes.
        copied = size < smallRead
        return this.#take(copied ? Buffer.from(bytes.subarray(0, size)) : (bytes.subarray(0, size) as Buffer))
      },
    }
    // net.Socket takes more than its types know: they have these options for net.connect only.
    const options = { onread, noDelay: true, keepAlive: true, keepAliveInitialDelay: 30_000, highWaterMark: 64 * 1024 }
    super(options as ConstructorParameters<typeof Socket>[0])
  }

  /** @returns false: the parser is paused, read no more until it asks again */
  #take(bytes: Buffer): boolean {
    this.spent = false
    this.#waiting = bytes
    this.emit('readable')
    return this.#waiting === null
  }

  override read(size?: number): Buffer | null {
    const bytes = this.#waiting
    if (bytes === null) return super.read(size) as Buffer | null
    if (size === 0) return null
    this.#waiting = null
    return bytes
  }

  /** The parser gives back what it did not get to before it was paused. */
  override unshift(bytes: Buffer): void {
    if (bytes.length > 0) this.#waiting = bytes
  }

  dial(target: TcpSocketConnectOpts): void {
    this.connect(target)
    // Behind `connect`, which would put the usual one back.
    this.write = this.#write as typeof this.write
  }

  #write(piece: Uint8Array | string, ...rest: never[]): boolean {
    if (piece !== lastChunk || this.trailers === '') return super.write(piece, ...rest)
    const whole = `\r\n0\r\n${this.trailers}\r\n`
    this.trailers = ''
    return super.write(whole, 'latin1')
  }
}
