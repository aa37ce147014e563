/** WebSockets as a load: frames that were masked once and for all go out, and every byte that comes back is compared. */
import type { Socket } from 'node:net'
import { HeadReader, openSocket, type Reader } from './raw-socket.ts'

export type WebSocketEntrance = { readonly port: number; readonly headers: readonly string[] }

const payload = Buffer.from('0123456789abcdef'.repeat(8))
const mask = Buffer.from([0x5a, 0xa5, 0x3c, 0xc3])
/** A binary frame of 128 bytes as a client sends it, and as it comes back from a server (RFC 6455 §5.2). */
const question = Buffer.concat([Buffer.from([0x82, 0xfe, 0, payload.length]), mask, payload.map((byte, index) => byte ^ mask[index % 4]!)])
const answer = Buffer.concat([Buffer.from([0x82, 0x7e, 0, payload.length]), payload])
/** The example of RFC 6455 §1.3. */
const key = 'dGhlIHNhbXBsZSBub25jZQ=='
const accept = 's3pPLMBiTxaQ9kYGzzhZRbK+xOo='
/** Handshakes under way at once; more would fill a listener's queue. */
const atOnce = 64
/** ms until handshakes or answers are given up. */
const patience = 30_000

/** Open connections, each with at most one message under way. */
export class WebSocketLoad {
  readonly #clients: Client[] = []
  #failure: Error | null = null
  #onFailure: (error: Error) => void = () => {}

  /** @throws Error when a handshake is refused */
  static async open(entrance: WebSocketEntrance, count: number): Promise<WebSocketLoad> {
    const load = new WebSocketLoad()
    const head = `GET /ws HTTP/1.1\r\nHost: bench.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ${key}\r\n${entrance.headers.map((header) => `${header}\r\n`).join('')}\r\n`
    let left = count
    const openSome = async (): Promise<void> => {
      while (left-- > 0) {
        const client = new Client((error) => load.#fail(error))
        load.#clients.push(client)
        await client.open(entrance.port, head)
      }
    }
    try {
      await load.#within(Promise.all(Array.from({ length: atOnce }, openSome)))
    } catch (error) {
      load.close()
      throw error
    }
    return load
  }

  /** Echoes on all connections, the next as soon as one is back, until `seconds` are over and all are back. @returns how many */
  async echo(seconds: number): Promise<number> {
    const deadline = performance.now() + seconds * 1000
    const goOn = (): boolean => performance.now() < deadline
    const counts = await this.#within(Promise.all(this.#clients.map((client) => client.echo(goOn))), seconds * 1000 + patience)
    return counts.reduce((sum, count) => sum + count, 0)
  }

  close(): void {
    for (const client of this.#clients) client.close()
  }

  #fail(error: Error): void {
    this.#failure ??= error
    this.#onFailure(error)
  }

  async #within<T>(work: Promise<T>, ms = patience): Promise<T> {
    if (this.#failure !== null) throw this.#failure
    let timer: NodeJS.Timeout | undefined
    const failed = new Promise<never>((_, reject) => {
      this.#onFailure = reject
      timer = setTimeout(() => reject(new Error(`WebSockets: nothing for ${ms} ms`)), ms)
    })
    try {
      return await Promise.race([work, failed])
    } finally {
      clearTimeout(timer)
    }
  }
}

class Client implements Reader {
  readonly #onBroken: (error: Error) => void
  readonly #head = new HeadReader()
  #socket: Socket | null = null
  /** Called with the head of the answer to the handshake. */
  #opened: ((head: string) => void) | null = null
  #goOn: () => boolean = () => false
  #done: (count: number) => void = () => {}
  #count = 0
  /** Bytes of the answer that are there. */
  #at = 0
  #closing = false

  constructor(onBroken: (error: Error) => void) {
    this.#onBroken = onBroken
  }

  async open(port: number, head: string): Promise<void> {
    this.#socket = await openSocket(port, this)
    if (this.#closing) return this.close()
    const text = await new Promise<string>((resolve) => {
      this.#opened = resolve
      this.#socket!.write(head)
    })
    if (!text.startsWith('HTTP/1.1 101 ') || !text.includes(accept)) throw new Error(`no WebSocket: ${text}`)
  }

  echo(goOn: () => boolean): Promise<number> {
    return new Promise((resolve) => {
      this.#count = 0
      this.#goOn = goOn
      this.#done = resolve
      this.#socket!.write(question)
    })
  }

  read(bytes: Buffer): void {
    if (this.#opened !== null) return this.#readHead(bytes)
    const end = this.#at + bytes.length
    if (end > answer.length || answer.compare(bytes, 0, bytes.length, this.#at, end) !== 0) return this.#onBroken(new Error('an echo that is not what was sent'))
    this.#at = end
    if (end < answer.length) return
    this.#at = 0
    this.#count++
    if (this.#goOn()) this.#socket!.write(question)
    else this.#done(this.#count)
  }

  #readHead(bytes: Buffer): void {
    const found = this.#head.feed(bytes)
    if (found === null) return
    const opened = this.#opened!
    this.#opened = null
    if (found.length < bytes.length && found.head.startsWith('HTTP/1.1 101 ')) this.#onBroken(new Error('bytes behind the handshake'))
    opened(found.head)
  }

  closed(reason: Error): void {
    if (!this.#closing) this.#onBroken(reason)
  }

  /** By reset: thousands of ends would keep as many ports waiting. */
  close(): void {
    this.#closing = true
    this.#socket?.resetAndDestroy()
  }
}
