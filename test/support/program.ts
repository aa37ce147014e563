/** A program of ours as its users start it: `node <folder>/main.ts …` in a process of its own, ended with the test. */
import { execa } from 'execa'
import { createServer } from 'node:net'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'

export const root = join(import.meta.dirname, '../..')

export interface Program extends AsyncDisposable {
  readonly pid: number
  /** Settles with the exit code, or the signal's name. */
  readonly ended: Promise<number | string>
  readonly running: boolean
  /** What it wrote so far, both streams as they came. */
  log(): string
  /** Sends the signal and waits for the end. A program that takes longer than 15 s is killed, and that is an error. */
  stop(signal?: NodeJS.Signals): Promise<number | string>
}

export type Start = {
  readonly args: readonly string[]
  readonly env?: Readonly<Record<string, string>>
  /** Asked again and again until it says true; `seconds` (20) without it ends the start with the program's own words. */
  readonly ready: () => Promise<boolean>
  readonly seconds?: number
  /** Told the process id before anything is waited for. */
  readonly started?: (pid: number) => Promise<void>
}

/** @throws when the program ends before it is ready, or is not ready in time; it does not run on then */
export async function startProgram({ args, env = {}, ready, seconds = 20, started }: Start): Promise<Program> {
  const child = execa({ cwd: root, env, reject: false, all: true, buffer: false, stdin: 'ignore' })`${process.execPath} ${args}`
  let log = ''
  let over = false
  child.all.setEncoding('utf8').on('data', (text: string) => (log = (log + text).slice(-1_000_000)))
  const ended = child.then((result) => {
    over = true
    return result.signal ?? result.exitCode ?? -1
  })
  const program: Program = {
    pid: child.pid ?? 0,
    ended,
    get running() {
      return !over
    },
    log: () => log,
    async stop(signal = 'SIGTERM') {
      child.kill(signal)
      const late = await Promise.race([ended.then(() => false), delay(15_000, true, { ref: false })])
      if (late) {
        child.kill('SIGKILL')
        await ended
        throw new Error(`${args[0]} did not end within 15 s of ${signal}:\n${log}`)
      }
      return ended
    },
    async [Symbol.asyncDispose]() {
      if (!over) await program.stop()
    },
  }
  await started?.(program.pid)
  const deadline = Date.now() + seconds * 1000
  while (!(await ready().catch(() => false))) {
    if (over) throw new Error(`${args[0]} ended (${await ended}) before it was ready:\n${log}`)
    if (Date.now() > deadline) {
      await program.stop('SIGKILL')
      throw new Error(`${args[0]} was not ready after ${seconds} s:\n${log}`)
    }
    await delay(50)
  }
  return program
}

/** A port that was free a moment ago, `wanted` if it was. For programs whose peers must know the port before they start. */
export async function freePort(wanted = 0): Promise<number> {
  const server = createServer().listen(wanted, '127.0.0.1')
  const listening = await once(server, 'listening').then(() => true, () => false)
  if (!listening) return freePort()
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

/** Asks until the answer is not undefined; polls because what is asked (Docker, nft, /proc) tells nobody when it changes. */
export async function eventually<T>(what: string, ask: () => Promise<T | undefined>, seconds = 10): Promise<T> {
  const deadline = Date.now() + seconds * 1000
  for (;;) {
    const answer = await ask()
    if (answer !== undefined) return answer
    if (Date.now() > deadline) throw new Error(`still not so after ${seconds} s: ${what}`)
    await delay(100)
  }
}
