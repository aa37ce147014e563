/** Large answers over kept connections, one request at a time on each: every byte is counted, none is looked at. */
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { cpuSeconds, type Program } from './program.ts'
import { HeadReader, openSocket, type Reader } from './raw-socket.ts'
import type { Sample } from './rounds.ts'

export type BodyLoad = {
  readonly port: number
  readonly path: string
  readonly headers: readonly string[]
  /** Bytes that every answer must have. */
  readonly size: number
  readonly connections: number
  readonly seconds: number
  /** Whose processor time is counted. */
  readonly proxy: Program
}

const mebibyte = 1024 * 1024

/** ms until the first bytes must be there, and until the last answers must be whole. */
const patience = 30_000

/**
 * Counts bytes for `seconds`, of whole answers or not, from the moment when every connection has some. Answers under way then are read to their end, uncounted.
 * @returns cpu (ms a GiB), throughput (MiB/s) @throws Error when an answer is not a 200 of the wanted length, breaks off or gets stuck
 */
export async function drain(load: BodyLoad): Promise<Sample> {
  const drains = Array.from({ length: load.connections }, () => new Drain(load))
  const received = (): number => drains.reduce((sum, one) => sum + one.bytes, 0)
  const failed = Promise.race(drains.map((one) => one.failed))
  try {
    await Promise.race([failed, within(Promise.all(drains.map((one) => one.open(load.port))))])
    const [bytes, cpu, begin] = [received(), cpuSeconds(load.proxy.pid), performance.now()]
    await Promise.race([failed, delay(load.seconds * 1000)])
    const [moved, used, seconds] = [received() - bytes, cpuSeconds(load.proxy.pid) - cpu, (performance.now() - begin) / 1000]
    await Promise.race([failed, within(Promise.all(drains.map((one) => one.finish())))])
    return { cpu: (used * 1000) / (moved / mebibyte / 1024), throughput: moved / mebibyte / seconds }
  } finally {
    for (const one of drains) one.close()
  }
}

async function within<T>(work: Promise<T>): Promise<T> {
  const patient = new AbortController()
  const late = delay(patience, undefined, { signal: patient.signal, ref: false }).then(() => { throw new Error(`an answer is stuck for ${patience / 1000} s`) })
  late.catch(() => undefined)
  return Promise.race([work, late]).finally(() => patient.abort())
}

class Drain implements Reader {
  readonly failed: Promise<never>
  bytes = 0
  readonly #request: string
  readonly #size: number
  readonly #head = new HeadReader()
  readonly #begun = Promise.withResolvers<void>()
  readonly #finished = Promise.withResolvers<void>()
  #finishing = false
  #left = 0
  #socket: Socket | null = null
  #fail: (error: Error) => void = () => {}

  constructor({ path, headers, size }: BodyLoad) {
    this.#request = `GET ${path} HTTP/1.1\r\nHost: bench.example\r\n${headers.map((header) => `${header}\r\n`).join('')}\r\n`
    this.#size = size
    this.failed = new Promise((_, reject) => { this.#fail = reject })
    this.failed.catch(() => undefined)
  }

  /** Resolves when the first answer has begun. */
  async open(port: number): Promise<void> {
    this.#socket = await openSocket(port, this)
    this.#socket.write(this.#request)
    await this.#begun.promise
  }

  /** Resolves when the answer under way is whole. */
  finish(): Promise<void> {
    this.#finishing = true
    return this.#finished.promise
  }

  read(bytes: Buffer): void {
    const body = this.#left === 0 ? this.#startBody(bytes) : bytes.length
    this.bytes += body
    this.#left -= body
    if (this.#left < 0) return this.#fail(new Error('more bytes than announced'))
    if (this.#left > 0 || body === 0) return
    if (this.#finishing) this.#finished.resolve()
    else this.#socket!.write(this.#request)
  }

  /** @returns how many of these bytes are body */
  #startBody(bytes: Buffer): number {
    const found = this.#head.feed(bytes)
    if (found === null) return 0
    const length = Number(/^content-length: *(\d+)\r$/im.exec(found.head)?.[1] ?? NaN)
    if (!found.head.startsWith('HTTP/1.1 200 ') || length !== this.#size) this.#fail(new Error(`not the answer that was wanted: ${found.head}`))
    this.#left = this.#size
    this.#begun.resolve()
    return bytes.length - found.length
  }

  closed(reason: Error): void {
    this.#fail(reason)
  }

  close(): void {
    this.#socket?.resetAndDestroy()
  }
}
