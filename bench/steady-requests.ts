/** Small requests one after the other over one kept connection: what somebody notices whose gateway is busy with something else. */
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { HeadReader, openSocket, type Reader } from './raw-socket.ts'

/** ms until an answer is given up. */
const patience = 30_000

export class SteadyClient implements Reader {
  readonly #head = new HeadReader()
  #socket: Socket | null = null
  #waiting: PromiseWithResolvers<number> | null = null
  #status = 0
  #left = 0
  #closing = false

  static async open(port: number): Promise<SteadyClient> {
    const client = new SteadyClient()
    client.#socket = await openSocket(port, client)
    return client
  }

  /** @returns the status of the answer @throws Error when the connection breaks or nothing comes for 30 s */
  async ask(header: string, path = '/'): Promise<number> {
    const waiting = Promise.withResolvers<number>()
    this.#waiting = waiting
    const timer = setTimeout(() => waiting.reject(new Error(`no answer for ${patience / 1000} s`)), patience)
    this.#socket!.write(`GET ${path} HTTP/1.1\r\nHost: bench.example\r\n${header}\r\n\r\n`)
    return waiting.promise.finally(() => clearTimeout(timer))
  }

  /** A request every `pause` ms, or when the one before is answered, as long as `goOn` says so. @returns the times of the answers, ms @throws Error when one is not 200 */
  async askSteadily(header: string, pause: number, goOn: () => boolean): Promise<number[]> {
    const times: number[] = []
    while (goOn()) {
      const begin = performance.now()
      const status = await this.ask(header)
      if (status !== 200) throw new Error(`answered ${status}`)
      times.push(performance.now() - begin)
      await delay(pause)
    }
    return times
  }

  read(bytes: Buffer): void {
    if (this.#left > 0) this.#left -= bytes.length
    else {
      const found = this.#head.feed(bytes)
      if (found === null) return
      this.#status = Number(found.head.slice(9, 12))
      this.#left = Number(/^content-length: *(\d+)\r$/im.exec(found.head)?.[1] ?? NaN) - (bytes.length - found.length)
    }
    if (this.#left > 0) return
    if (this.#left === 0) this.#waiting?.resolve(this.#status)
    else this.closed(new Error('an answer of another length than announced'))
  }

  closed(reason: Error): void {
    if (!this.#closing) this.#waiting?.reject(reason)
  }

  close(): void {
    this.#closing = true
    this.#socket?.destroy()
  }
}
