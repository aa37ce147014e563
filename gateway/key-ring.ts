/** The keys of signed routes, from the command line or from a file that is read again when it changes. */
import { readFileSync } from 'node:fs'
import { parseAccessKeys, type AccessKeys } from '#policies/access.ts'
import { ConfigError } from '#policies/config.ts'
import { fileStamp } from './file-stamp.ts'

const lookEveryMs = 1_000

export class KeyRing {
  keys: AccessKeys = new Map()
  readonly #text: string
  readonly #path: string
  readonly #onProblem: (reason: string) => void
  #timer: NodeJS.Timeout | null = null
  #looking: Promise<void> | null = null
  /** '' so that the first look reads once more: the file may have changed since the start. */
  #version = ''
  /** Stamp of the file whose problem was told last. */
  #told = ''

  /** @param path '' when the keys are given as text; @param onProblem told about a changed file that could not be taken */
  constructor(text: string, path: string, onProblem: (reason: string) => void) {
    this.#text = text
    this.#path = path
    this.#onProblem = onProblem
  }

  /** @throws ConfigError when the keys cannot be read */
  start(): void {
    if (this.#path === '') {
      this.keys = parse(this.#text, '--secure-access-keys')
      return
    }
    this.keys = parse(readText(this.#path), this.#path)
    this.#timer = setInterval(() => {
      this.#looking ??= this.#look().finally(() => (this.#looking = null))
    }, lookEveryMs)
    this.#timer.unref()
  }

  close(): void {
    if (this.#timer !== null) clearInterval(this.#timer)
  }

  async #look(): Promise<void> {
    const version = await fileStamp(this.#path)
    if (version === this.#version) return
    try {
      const text = readText(this.#path)
      // A file that could not be opened (no descriptor left, no permission) is tried again; one with a mistake waits for its next change.
      this.#version = version
      this.keys = parse(text, this.#path)
      this.#told = ''
    } catch (error) {
      if (version !== this.#told) this.#onProblem((error as Error).message)
      this.#told = version
    }
  }
}

function parse(text: string, where: string): AccessKeys {
  const read = parseAccessKeys(text, where)
  if (!read.ok) throw new ConfigError(read.problems)
  return read.keys
}

/** One key a line or separated by commas. */
function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8').split('\n').join(',')
  } catch (error) {
    throw new ConfigError([{ path, reason: `cannot be read: ${(error as NodeJS.ErrnoException).code}` }])
  }
}
