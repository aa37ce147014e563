/** Large bodies over kept connections, one request at a time on each, down or up: every byte is counted, none is looked at. */
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { cpuSeconds, type Program } from './program.ts'
import { HeadReader, openSocket, type Reader } from './raw-socket.ts'
import type { Sample } from './rounds.ts'

export type BodyLoad = {
  readonly port: number
  readonly path: string
  readonly headers: readonly string[]
  /** Bytes of every body. */
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
 * Counts bytes of answers for `seconds`, whole or not, from the moment when every connection has some. Answers under way then are read to their end, uncounted.
 * @returns cpu (ms a GiB), throughput (MiB/s) @throws Error when an answer is not a 200 of the wanted length, breaks off or gets stuck
 */
export function drain(load: BodyLoad): Promise<Sample> {
  return count(load, () => new Drain(load))
}

/** The same for what is sent: bytes count when the kernel has taken them. Uploads of an announced length; each must be answered with 200. */
export function pour(load: BodyLoad): Promise<Sample> {
  return count(load, () => new Pour(load))
}

interface Flow {
  readonly bytes: number
  /** Rejects when something is wrong. */
  readonly failed: Promise<never>
  /** Resolves when the first body has begun. */
  open(port: number): Promise<void>
  /** Resolves when the exchange under way is whole. */
  finish(): Promise<void>
  close(): void
}

async function count(load: BodyLoad, make: () => Flow): Promise<Sample> {
  const flows = Array.from({ length: load.connections }, make)
  const total = (): number => flows.reduce((sum, one) => sum + one.bytes, 0)
  const failed = Promise.race(flows.map((one) => one.failed))
  try {
    await Promise.race([failed, within(Promise.all(flows.map((one) => one.open(load.port))))])
    const [bytes, cpu, begin] = [total(), cpuSeconds(load.proxy.pid), performance.now()]
    await Promise.race([failed, delay(load.seconds * 1000)])
    const [moved, used, seconds] = [total() - bytes, cpuSeconds(load.proxy.pid) - cpu, (performance.now() - begin) / 1000]
    await Promise.race([failed, within(Promise.all(flows.map((one) => one.finish())))])
    return { cpu: (used * 1000) / (moved / mebibyte / 1024), throughput: moved / mebibyte / seconds }
  } finally {
    for (const one of flows) one.close()
  }
}

async function within<T>(work: Promise<T>): Promise<T> {
  const patient = new AbortController()
  const late = delay(patience, undefined, { signal: patient.signal, ref: false }).then(() => { throw new Error(`an answer is stuck for ${patience / 1000} s`) })
  late.catch(() => undefined)
  return Promise.race([work, late]).finally(() => patient.abort())
}

class Drain implements Reader, Flow {
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

  async open(port: number): Promise<void> {
    this.#socket = await openSocket(port, this)
    this.#socket.write(this.#request)
    await this.#begun.promise
  }

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

const piece = Buffer.alloc(256 * 1024, 'x')

class Pour implements Reader, Flow {
  readonly failed: Promise<never>
  readonly #head: string
  readonly #size: number
  readonly #answer = new HeadReader()
  readonly #finished = Promise.withResolvers<void>()
  #finishing = false
  /** Bytes of the body under way that were not handed to the socket yet. */
  #left = 0
  /** Bytes of the answer's body that are still to come. */
  #answerLeft = 0
  #socket: Socket | null = null
  #fail: (error: Error) => void = () => {}

  constructor({ path, headers, size }: BodyLoad) {
    this.#head = `POST ${path} HTTP/1.1\r\nHost: bench.example\r\nContent-Length: ${size}\r\n${headers.map((header) => `${header}\r\n`).join('')}\r\n`
    this.#size = size
    this.failed = new Promise((_, reject) => { this.#fail = reject })
    this.failed.catch(() => undefined)
  }

  get bytes(): number {
    return this.#socket === null ? 0 : this.#socket.bytesWritten - this.#socket.writableLength
  }

  async open(port: number): Promise<void> {
    this.#socket = await openSocket(port, this)
    this.#socket.on('drain', () => this.#push())
    this.#begin()
  }

  finish(): Promise<void> {
    this.#finishing = true
    return this.#finished.promise
  }

  #begin(): void {
    this.#left = this.#size
    this.#socket!.write(this.#head)
    this.#push()
  }

  #push(): void {
    while (this.#left > 0) {
      const part = this.#left < piece.length ? piece.subarray(0, this.#left) : piece
      this.#left -= part.length
      if (!this.#socket!.write(part)) return
    }
  }

  read(bytes: Buffer): void {
    let body = bytes.length
    if (this.#answerLeft === 0) {
      const found = this.#answer.feed(bytes)
      if (found === null) return
      if (!found.head.startsWith('HTTP/1.1 200 ') || this.#left > 0) return this.#fail(new Error(`not the answer that was wanted: ${found.head}`))
      this.#answerLeft = Number(/^content-length: *(\d+)\r$/im.exec(found.head)?.[1] ?? NaN)
      body -= found.length
    }
    this.#answerLeft -= body
    if (Number.isNaN(this.#answerLeft) || this.#answerLeft < 0) return this.#fail(new Error('an answer of another length than announced'))
    if (this.#answerLeft > 0) return
    if (this.#finishing) this.#finished.resolve()
    else this.#begin()
  }

  closed(reason: Error): void {
    this.#fail(reason)
  }

  close(): void {
    this.#socket?.resetAndDestroy()
  }
}
