/** dnsperf from inside a DNS server's namespace, as fast as it goes or at a fixed rate, and what the server's process tree cost. */
import { findTool } from './debian.ts'
import { cpuSeconds, runCommand, type Program } from './program.ts'
import { percentile, type Sample } from './rounds.ts'

export type DnsLoad = {
  readonly namespace: string
  readonly server: { readonly address: string; readonly port: number }
  /** Names and types, one a line. */
  readonly questions: string
  readonly seconds: number
  readonly program: Program
}

/** @param rate queries a second @returns cpu (µs a query), throughput (queries a second), p50 and p99 (ms) when a rate is given */
export async function askMany({ namespace, server, questions, seconds, program }: DnsLoad, rate?: number): Promise<Sample> {
  const dnsperf = await findTool('dnsperf', 'dnsperf')
  const limits = rate === undefined ? ['-q', '64'] : ['-Q', String(rate), '-v']
  const before = cpuSeconds(program.pid)
  const output = await runCommand(dnsperf.file, ['-s', server.address, '-p', String(server.port), '-d', questions, '-l', String(seconds), '-c', '8', '-t', '2', ...limits], { namespace, env: dnsperf.env })
  return readDnsperf(output, cpuSeconds(program.pid) - before)
}

/** dnsperf's summary; with -v also a line for each answer: `> NOERROR name type seconds`. @throws Error when over 1 % was lost or refused */
export function readDnsperf(output: string, cpu: number): Sample {
  const number = (pattern: RegExp): number => Number(pattern.exec(output)?.[1] ?? NaN)
  const sent = number(/Queries sent:\s+(\d+)/)
  const completed = number(/Queries completed:\s+(\d+)/)
  const good = number(/NOERROR (\d+)/)
  if (!(good >= sent * 0.99)) throw new Error(`dnsperf: of ${sent} queries ${completed} were answered, ${good || 0} with NOERROR`)
  const times = Float64Array.from(output.matchAll(/^> NOERROR \S+ \S+ ([\d.]+)$/gm), (match) => Number(match[1]) * 1000).sort()
  return { cpu: (cpu * 1e6) / completed, throughput: number(/Queries per second:\s+([\d.]+)/), p50: percentile(times, 0.5), p99: percentile(times, 0.99) }
}
