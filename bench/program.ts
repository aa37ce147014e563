/** Starts and ends the programs of a bench, and reads what they cost from /proc. */
import { execa } from 'execa'
import { readdirSync, readFileSync } from 'node:fs'
import { connect, createServer, type AddressInfo } from 'node:net'

export type Program = { readonly pid: number; stop(): Promise<void> }

export type Start = {
  readonly env?: Readonly<Record<string, string>>
  /** Network namespace to run in; the machine's own when absent. */
  readonly namespace?: string
  /** Folder of the cgroup to run in, from its first moment on; ours when absent. */
  readonly cgroup?: string
  /** Asked every 20 ms until it answers true; a rejection means not yet. */
  readonly ready: () => Promise<boolean>
}

const readyTimeout = 20_000
const stopTimeout = 5_000
/** USER_HZ of Linux, the unit of /proc/<pid>/stat, on every architecture Node runs on. */
const ticksPerSecond = 100

/**
 * Starts a program and waits until it is ready. It dies with us, however we die (PR_SET_PDEATHSIG), unless it changes
 * its own credentials, as dnsmasq does.
 * @throws Error with the end of its output when it exits or is not ready within 20 s
 */
export async function startProgram(file: string, args: readonly string[], { env = {}, namespace, cgroup, ready }: Start): Promise<Program> {
  // First into the cgroup: inside a namespace its tree is not to be seen.
  const joined = cgroup === undefined ? [] : ['sh', '-c', 'echo $$ > "$0/cgroup.procs" && exec "$@"', cgroup]
  const entered = namespace === undefined ? [] : ['ip', 'netns', 'exec', namespace]
  const [program, ...rest] = [...joined, ...entered, 'setpriv', '--pdeathsig', 'KILL', '--', file, ...args]
  const child = execa(program!, rest, { env, stdin: 'ignore', all: true, buffer: false, reject: false })
  let output = ''
  child.all.on('data', (chunk: Buffer) => { output = (output + chunk.toString()).slice(-4000) })
  let exited = false
  const end = child.then(() => { exited = true })
  const stop = async (): Promise<void> => {
    child.kill('SIGTERM')
    const timer = setTimeout(() => child.kill('SIGKILL'), stopTimeout)
    await end
    clearTimeout(timer)
  }
  const deadline = Date.now() + readyTimeout
  for (;;) {
    if (exited) throw new Error(`${file} ended at once:\n${output}`)
    if (await ready().catch(() => false)) return { pid: child.pid!, stop }
    if (Date.now() > deadline) {
      await stop()
      throw new Error(`${file} ${args.join(' ')}: not ready after ${readyTimeout / 1000} s\n${output}`)
    }
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

/** Runs a command to its end. @throws what execa throws, with its output */
export async function runCommand(file: string, args: readonly string[], { namespace, timeout = 30_000, env = {} }: { namespace?: string; timeout?: number; env?: Readonly<Record<string, string>> } = {}): Promise<string> {
  const [program, ...rest] = namespace === undefined ? [file, ...args] : ['ip', 'netns', 'exec', namespace, file, ...args]
  return (await execa(program!, rest, { stdin: 'ignore', timeout, env, maxBuffer: 64 * 1024 * 1024 })).stdout
}

/** Seconds of processor time (user and system) that a process, its living children and its ended ones have used. 10 ms steps. */
export function cpuSeconds(pid: number): number {
  const own = statTicks(readFileSync(`/proc/${pid}/stat`, 'utf8')) / ticksPerSecond
  return childrenOf(pid).reduce((sum, child) => sum + cpuSeconds(child), own)
}

/** Fields 14 to 17 of proc(5) stat: utime, stime, and the same of children that were waited for. The name in brackets may hold spaces. */
export function statTicks(stat: string): number {
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  return [11, 12, 13, 14].reduce((sum, index) => sum + Number(fields[index]), 0)
}

/** Bytes of memory that a process, children not included, has to itself: no program text, no libraries. */
export function ownMemory(pid: number): number {
  return readMemory(readFileSync(`/proc/${pid}/status`, 'utf8'))
}

/** `RssAnon` of proc(5) status, in kB. */
export function readMemory(status: string): number {
  return Number(/^RssAnon:\s+(\d+) kB$/m.exec(status)?.[1] ?? NaN) * 1024
}

export function childrenOf(pid: number): number[] {
  return readdirSync(`/proc/${pid}/task`).flatMap((thread) => readFileSync(`/proc/${pid}/task/${thread}/children`, 'utf8').split(' ').filter((text) => text !== '').map(Number))
}

/** A port that was free a moment ago; for programs that cannot say which one they took. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => server.once('listening', resolve))
  const { port } = server.address() as AddressInfo
  await new Promise((resolve) => server.close(resolve))
  return port
}

/** Whether something accepts connections there. */
export function accepts(port: number): () => Promise<boolean> {
  return () => new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    socket.once('connect', () => { socket.destroy(); resolve(true) })
    socket.once('error', () => resolve(false))
  })
}

/** Things to undo, newest first. One that fails does not keep the others; what comes after the end is undone at once. */
export class Cleanups {
  readonly #undo: (() => Promise<void>)[] = []
  readonly #errors: unknown[] = []
  #over = false
  #running = Promise.resolve()

  add(undo: () => Promise<void>): void {
    this.#undo.push(undo)
    if (this.#over) this.run().catch(() => undefined)
  }

  /** Starts a program that ends with the others. */
  async start(file: string, args: readonly string[], start: Start): Promise<Program> {
    const program = await startProgram(file, args, start)
    this.add(() => program.stop())
    return program
  }

  /** A second call waits for the first. @throws AggregateError with everything that could not be undone */
  async run(): Promise<void> {
    this.#over = true
    this.#running = this.#running.then(async () => {
      for (let undo = this.#undo.pop(); undo !== undefined; undo = this.#undo.pop()) await undo().catch((error: unknown) => this.#errors.push(error))
    })
    await this.#running
    if (this.#errors.length > 0) throw new AggregateError(this.#errors, 'the bench could not clean up')
  }
}
