/**
 * The only file that starts programs: one long-lived `nft -i` for every change of the firewall, and iptables for the one match
 * that nft lacks. `nft -i` runs one transaction per line; a command that prints an empty chain marks its end.
 */
import { execa } from 'execa'

/** Runs one transaction; resolves with what it printed once the kernel has it. */
export type Nft = {
  /** @throws NftError when nft refuses the transaction, dies or does not confirm in time */
  apply(statements: readonly string[], timeoutMs?: number): Promise<string>
  /** What a set holds, as nft prints it. For large sets: the long-lived process would keep the memory. @throws NftError */
  list(set: string): Promise<string>
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
// In a table of its own: to list a chain, nft reads all elements of its table's sets back (12 ms with 4,096).
const marker = 'list chain inet sallyport_marker end'
const makeMarker = 'add table inet sallyport_marker; add chain inet sallyport_marker end'
/** What the marker prints. No other command of ours prints it. */
const markerText = 'table inet sallyport_marker {\n\tchain end {\n\t}\n}\n'
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
  broken = false

  // No cleanup at our exit: nft ends with its standard input, and execa's would end us on SIGTERM before the rules are in order.
  constructor() {
    this.#child = execa('nft', ['-i'], { buffer: false, reject: false, env: environment, extendEnv: false, stdin: 'pipe', cleanup: false })
    this.#child.stdout.setEncoding('utf8').on('data', (text: string) => this.#read(text))
    this.#child.stderr.setEncoding('utf8').on('data', (text: string) => { this.#errors = (this.#errors + text).slice(0, maxErrorText) })
    this.#child.stdin.on('error', () => this.#end('nft does not read its commands'))
    this.#child.stdin.write(`${makeMarker}\n`)
    void this.#child.then((result) => this.#end(result.code === 'ENOENT' ? 'nft is not installed' : `nft ended: ${result.shortMessage ?? ''}`))
  }

  run(line: string, timeoutMs: number): Promise<string> {
    this.lines++
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
    if (this.#out.endsWith(markerText)) setImmediate(() => this.#settle())
  }

  #settle(): void {
    const done = this.#waiting[0]
    if (done === undefined || !this.#out.endsWith(markerText)) return
    const printed = this.#out.slice(0, -markerText.length)
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

/** Transactions run one after the other; the caller decides what to put together into one. */
export function createNft(): Nft {
  let process = new NftProcess()
  let last: Promise<unknown> = Promise.resolve()

  const runNext = (statements: readonly string[], timeoutMs: number): Promise<string> => {
    if (process.lines >= linesPerProcess) process.stop()
    if (process.broken) process = new NftProcess()
    return process.run(statements.join('; '), timeoutMs)
  }
  return {
    apply(statements, timeoutMs = defaultTimeoutMs) {
      for (const statement of statements) if (statement.includes('\n')) throw new NftError('a statement must be one line')
      const result = last.then(() => runNext(statements, timeoutMs))
      last = result.catch(() => undefined)
      return result
    },
    async list(set) {
      const result = await execa('nft', ['list', 'set', ...set.split(' ')], { reject: false, env: environment, extendEnv: false, timeout: listTimeoutMs, stdin: 'ignore', cleanup: false })
      if (result.failed) throw new NftError(`nft list set ${set}: ${result.stderr.trim() || result.shortMessage || 'failed'}`)
      return result.stdout
    },
    close: () => process.stop(),
  }
}

/** Adds rules to a table of `iptables` (or `ip6tables`), all or none. @throws NftError with what it said */
export async function appendIptables(program: 'iptables' | 'ip6tables', table: string, rules: readonly string[]): Promise<void> {
  const input = [`*${table}`, ...rules, 'COMMIT', ''].join('\n')
  const result = await execa(`${program}-restore`, ['--noflush', '--wait'], { reject: false, env: environment, extendEnv: false, timeout: defaultTimeoutMs, input, cleanup: false })
  if (result.failed) throw new NftError(`${program}-restore: ${result.stderr.trim() || result.shortMessage || 'failed'}\n${input}`)
}
