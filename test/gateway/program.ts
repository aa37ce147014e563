/** The gateway program as a user starts it: its output, its exit code, its port. */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { eventually } from './support.ts'

export const main = new URL('../../gateway/main.ts', import.meta.url).pathname

export type Program = AsyncDisposable & { child: ChildProcess; output: () => string; code: Promise<number | null> }

export function start(...argv: string[]): Program {
  return startAs([process.execPath, main, ...argv])
}

/** As another program in front wants it to be started, or with an environment. */
export function startAs([file, ...argv]: string[], env: Readonly<Record<string, string>> = {}): Program {
  const child = spawn(file as string, argv, { stdio: ['ignore', 'pipe', 'pipe'], env: { PATH: process.env['PATH'], ...env } })
  let output = ''
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (output += chunk.toString()))
  // Not at its exit: what it wrote last may still be on its way then.
  const code = once(child, 'close').then(([status]) => status as number | null)
  return {
    child,
    output: () => output,
    code,
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await code
    },
  }
}

/** With at most so many descriptors. The shell becomes the gateway: same process id, and no process between. */
export function startWith(descriptors: number, ...argv: string[]): Program {
  return startAs(['sh', '-c', 'ulimit -n "$1" && shift && exec "$@"', 'sh', String(descriptors), process.execPath, main, ...argv])
}

export async function listening(program: Program): Promise<number> {
  await eventually(() => /"msg":"listening"/.test(program.output()) || program.child.exitCode !== null, `listening: ${program.output()}`, 15_000)
  const line = said(program, 'listening')[0]
  if (line === undefined) throw new Error(program.output())
  return line['port'] as number
}

/** Lines of its log with this message. */
export function said(program: Program, msg: string): Record<string, unknown>[] {
  const whole = program.output().slice(0, program.output().lastIndexOf('\n') + 1)
  return whole.split('\n').filter((line) => line.includes(`"msg":"${msg}"`)).map((line) => JSON.parse(line) as Record<string, unknown>)
}
