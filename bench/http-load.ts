/** The HTTP load generators: wrk as fast as it goes, h2load at a fixed rate. Both read back what the proxy's process tree cost. */
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { findTool } from './debian.ts'
import { cpuSeconds, runCommand, type Program } from './program.ts'
import { percentile, type Sample } from './rounds.ts'

export type HttpLoad = {
  readonly url: string
  readonly headers: readonly string[]
  readonly connections: number
  readonly seconds: number
  /** Whose processor time is counted. */
  readonly proxy: Program
}

/** @returns cpu (µs a request), throughput (requests a second), p50 and p99 (ms) @throws Error when a request failed */
export async function saturate({ url, headers, connections, seconds, proxy }: HttpLoad): Promise<Sample> {
  const wrk = await findTool('wrk', 'wrk')
  const script = path.join(import.meta.dirname, 'peers', 'wrk-report.lua')
  const before = cpuSeconds(proxy.pid)
  const output = await runCommand(wrk.file, ['-t1', `-c${connections}`, `-d${Math.max(1, Math.round(seconds))}s`, '-s', script, ...headers.flatMap((header) => ['-H', header]), url], { env: wrk.env })
  const cpu = cpuSeconds(proxy.pid) - before
  return readWrk(output, cpu)
}

export function readWrk(output: string, cpu: number): Sample {
  const { requests, microseconds, failed, p50, p99 } = JSON.parse(output.slice(output.lastIndexOf('\n{') + 1)) as Record<string, number>
  if (!requests || failed) throw new Error(`wrk: ${requests} requests, ${failed} failed`)
  return { cpu: (cpu * 1e6) / requests, throughput: requests / (microseconds! / 1e6), p50: p50! / 1000, p99: p99! / 1000 }
}

/** @param rate requests a second in all @returns cpu (µs a request), p50 and p99 (ms) of times from sending to the last byte */
export async function atRate({ url, headers, connections, seconds, proxy }: HttpLoad, rate: number): Promise<Sample> {
  const h2load = await findTool('h2load', 'nghttp2-client')
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-h2load-'))
  const log = path.join(folder, 'log')
  try {
    const before = cpuSeconds(proxy.pid)
    await runCommand(h2load.file, ['--h1', '-t1', `-c${connections}`, `-D${Math.max(1, Math.round(seconds))}`, `--rps=${(rate / connections).toFixed(2)}`, `--log-file=${log}`, ...headers.flatMap((header) => ['-H', header]), url], { env: h2load.env })
    return readH2load(await readFile(log, 'utf8'), cpuSeconds(proxy.pid) - before)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** h2load's log: start time, status and microseconds of each request, between tabs. A status of 0 or below is a failure. */
export function readH2load(log: string, cpu: number): Sample {
  const rows = log.trimEnd().split('\n').map((line) => line.split('\t').map(Number))
  const bad = rows.filter(([, status]) => status !== 200).length
  if (rows.length === 0 || bad > 0) throw new Error(`h2load: ${rows.length} requests, ${bad} failed`)
  const times = Float64Array.from(rows, (row) => row[2]!).sort()
  return { cpu: (cpu * 1e6) / times.length, p50: percentile(times, 0.5) / 1000, p99: percentile(times, 0.99) / 1000 }
}
