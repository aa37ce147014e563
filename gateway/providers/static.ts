/** Routes from a JSON file. It is read again when it changes; a file with a mistake in it changes nothing. */
import { readFile } from 'node:fs/promises'
import { setImmediate } from 'node:timers/promises'
import { ConfigError } from '#policies/config.ts'
import { StaticRoutesReader } from '#policies/static-routes.ts'
import { fileStamp } from '../file-stamp.ts'
import type { Provider } from '../gateway.ts'
import type { RouteTable } from '../routes.ts'
import { readInSlices } from './json-slices.ts'

export type StaticOptions = {
  readonly path: string
  /** ms between two looks at the file. */
  readonly every: number
  /** Told about a file that could not be taken, once per change. */
  readonly onProblem: (reason: string) => void
}

export class StaticProvider implements Provider {
  readonly #options: StaticOptions
  readonly #table: RouteTable
  #timer: NodeJS.Timeout | null = null
  /** Stamp of the file that was read last, and of the one whose problem was told last. */
  #version = ''
  #told = ''
  #reading: Promise<void> | null = null

  constructor(options: StaticOptions, table: RouteTable) {
    this.#options = options
    this.#table = table
  }

  /** @throws ConfigError when the file cannot be read or has problems: a gateway never starts with half its routes */
  async start(): Promise<void> {
    await this.#load(await fileStamp(this.#options.path))
    this.#table.alive(Infinity)
    this.#timer = setInterval(() => {
      this.#reading ??= this.#look().finally(() => (this.#reading = null))
    }, this.#options.every)
    this.#timer.unref()
  }

  async close(): Promise<void> {
    if (this.#timer !== null) clearInterval(this.#timer)
    await this.#reading
  }

  async #look(): Promise<void> {
    const version = await fileStamp(this.#options.path)
    if (version === this.#version) return
    try {
      await this.#load(version)
      this.#told = ''
    } catch (error) {
      if (version !== this.#told) this.#options.onProblem((error as Error).message)
      this.#told = version
    }
  }

  /** Takes the file a slice at a time, and gives way to requests between two of them. */
  async #load(version: string): Promise<void> {
    const { path } = this.#options
    const reader = new StaticRoutesReader((entry) => this.#table.known(entry))
    try {
      const bytes = await readFile(path)
      // A file that could not be opened (no descriptor left, no permission) is tried again; one with a mistake waits for its next change.
      this.#version = version
      const slices = readInSlices(bytes, 'sandboxes')
      let slice = slices.next()
      for (; slice.done !== true; slice = slices.next()) {
        reader.readSandboxes(slice.value)
        await setImmediate()
      }
      reader.readDocument(slice.value)
    } catch (error) {
      throw new ConfigError([{ path, reason: `cannot be read: ${(error as Error).message}` }])
    }
    if (reader.problems.length > 0) throw new ConfigError(reader.problems.map((problem) => ({ path: `${path}: ${problem.path}`, reason: problem.reason })))
    await this.#table.replace(reader.routes)
  }
}
