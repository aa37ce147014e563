/**
 * The only file that starts programs: one long-lived `nft -i` for every change of the firewall, and iptables for the one match
 * that nft lacks. `nft -i` runs one transaction per line; a command that asks the kernel nothing and prints one line marks its end.
 */
import { execa } from 'execa'

/** Runs one transaction; resolves with what it printed once the kernel has it. */
export type Nft = {
  /** @throws NftError when nft refuses the transaction, dies or does not confirm in time */
  apply(statements: readonly string[], timeoutMs?: number): Promise<string>
  /** What a set or counter (`set inet t s`) holds, as nft prints it, by a process of its own: the long-lived one would keep the memory. @throws NftError */
  list(object: string): Promise<string>
  close(): void
}

export class NftError extends Error {
  /** `refused`: the kernel has nothing of the transaction. `unknown`: all of it, or nothing. */
  readonly outcome: 'refused' | 'unknown'

  constructor(message: string, outcome: NftError['outcome'] = 'refused') {
    super(message)
    this.name = 'NftError'
    this.outcome = outcome
  }
}

const defaultTimeoutMs = 5000
const listTimeoutMs = 30_000
/** nft keeps every line it ever read as history: 8 MB after 20,000. A fresh process costs 5 ms. */
const linesPerProcess = 2000
/** It also keeps the memory that its largest transaction or listing took: half a megabyte for any policy, 7 for one of 4,096 rules. */
const largeText = 2000
/** After a large one, before a fresh process takes over: whoever waits for the policy must not wait for this. */
const renewAfterMs = 1000
// Of all that prints something, the one that makes nft read nothing back: each table that it knows takes half a megabyte.
const marker = 'describe ip saddr'
/** How the marker's line begins. No other command of ours prints one like it. */
const markerText = 'payload expression, '
const maxErrorText = 2000

// HOME: nft would leave a history file there.
const environment = { PATH: process.env['PATH'] ?? '/usr/sbin:/usr/bin:/sbin:/bin', HOME: '/nonexistent' }

type Waiting = { readonly resolve: (text: string) => void; readonly reject: (error: Error) => void; readonly timer: NodeJS.Timeout }

class NftProcess {
  readonly #child
  readonly #waiting: Waiting[] = []
  #out = ''
  #errors = ''
  lines = 0
  large = false
  broken = false

  // No cleanup at our exit: nft ends with its standard input, and execa's would end us on SIGTERM before the rules are in order.
  constructor() {
    this.#child = execa('nft', ['-i'], { buffer: false, reject: false, env: environment, extendEnv: false, stdin: 'pipe', cleanup: false })
    this.#child.stdout.setEncoding('utf8').on('data', (text: string) => this.#read(text))
    this.#child.stderr.setEncoding('utf8').on('data', (text: string) => { this.#errors = (this.#errors + text).slice(0, maxErrorText) })
    this.#child.stdin.on('error', () => this.#end('nft does not read its commands'))
    void this.#child.then((result) => this.#end(result.code === 'ENOENT' ? 'nft is not installed' : `nft ended: ${result.shortMessage ?? ''}`))
  }

  run(line: string, timeoutMs: number): Promise<string> {
    this.lines++
    this.large ||= line.length > largeText
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#end(`nft did not confirm within ${timeoutMs} ms`)
        this.#child.kill('SIGKILL')
      }, timeoutMs)
      this.#waiting.push({ resolve, reject, timer })
      this.#child.stdin.write(`${line}\n${marker}\n`)
    })
  }

  stop(): void {
    this.#child.stdin.end()
    this.#end('nft was closed')
  }

  // An error is written before the marker of its command, but through another pipe: wait until this turn of the event loop has read both.
  #read(text: string): void {
    this.#out += text
    if (markerAt(this.#out) !== -1) setImmediate(() => this.#settle())
  }

  #settle(): void {
    const done = this.#waiting[0]
    const end = markerAt(this.#out)
    if (done === undefined || end === -1) return
    const printed = this.#out.slice(0, end)
    this.large ||= printed.length > largeText
    const errors = this.#errors
    this.#out = this.#errors = ''
    this.#waiting.shift()
    clearTimeout(done.timer)
    if (errors === '') done.resolve(printed)
    else done.reject(new NftError(errors.trim()))
  }

  #end(reason: string): void {
    this.broken = true
    const detail = this.#errors.trim()
    for (const { reject, timer } of this.#waiting.splice(0)) {
      clearTimeout(timer)
      reject(new NftError(detail === '' ? reason : `${reason}: ${detail}`, 'unknown'))
    }
  }
}

/** Where the marker begins, as the last whole line; -1 when it has not come. */
function markerAt(printed: string): number {
  if (!printed.endsWith('\n')) return -1
  const lastLine = printed.lastIndexOf('\n', printed.length - 2) + 1
  return printed.startsWith(markerText, lastLine) ? lastLine : -1
}

/** Transactions run one after the other; the caller decides what to put together into one. */
export function createNft(): Nft {
  let process = new NftProcess()
  let last: Promise<unknown> = Promise.resolve()
  let renewing: NodeJS.Timeout | null = null

  const inTurn = <T>(work: () => T | Promise<T>): Promise<T> => {
    const result = last.then(work)
    last = result.catch(() => undefined)
    return result
  }
  const renew = (): void => {
    renewing = null
    void inTurn(() => {
      if (process.broken) return
      process.stop()
      process = new NftProcess()
    })
  }
  const runNext = (statements: readonly string[], timeoutMs: number): Promise<string> => {
    if (process.lines >= linesPerProcess) process.stop()
    if (process.broken) process = new NftProcess()
    const result = process.run(statements.join('; '), timeoutMs)
    if (process.large) renewing ??= setTimeout(renew, renewAfterMs).unref()
    return result
  }
  return {
    apply(statements, timeoutMs = defaultTimeoutMs) {
      for (const statement of statements) if (statement.includes('\n')) throw new NftError('a statement must be one line')
      return inTurn(() => runNext(statements, timeoutMs))
    },
    async list(object) {
      const result = await execa('nft', ['list', ...object.split(' ')], { reject: false, env: environment, extendEnv: false, timeout: listTimeoutMs, stdin: 'ignore', cleanup: false })
      if (result.failed) throw new NftError(`nft list ${object}: ${result.stderr.trim() || result.shortMessage || 'failed'}`)
      return result.stdout
    },
    close() {
      if (renewing !== null) clearTimeout(renewing)
      process.stop()
    },
  }
}

/** Adds rules to a table of `iptables` (or `ip6tables`), all or none. @throws NftError with what it said */
export async function appendIptables(program: 'iptables' | 'ip6tables', table: string, rules: readonly string[]): Promise<void> {
  const input = [`*${table}`, ...rules, 'COMMIT', ''].join('\n')
  const result = await execa(`${program}-restore`, ['--noflush', '--wait'], { reject: false, env: environment, extendEnv: false, timeout: defaultTimeoutMs, input, cleanup: false })
  if (result.failed) throw new NftError(`${program}-restore: ${result.stderr.trim() || result.shortMessage || 'failed'}\n${input}`)
}
