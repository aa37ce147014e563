/**
 * `npm run bench [-- name…] [--seconds S] [--rounds N]`: runs the named targets, or all of them, prints a table for each load and, after a whole
 * run of full length, writes RESULTS.md. Ends with 0 when everything ran, also when a goal was missed: the table says so.
 */
import { readdir, readFile, writeFile } from 'node:fs/promises'
import { availableParallelism, loadavg, release } from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { egress } from './load/egress.ts'
import { egressContainers } from './load/egress-containers.ts'
import { egressFlows } from './load/egress-flows.ts'
import { gateway } from './load/gateway.ts'
import { routes } from './load/routes.ts'
import { websocket } from './load/websocket.ts'
import { workers } from './load/workers.ts'
import { server } from './load/server.ts'
import { serverAtOnce } from './load/server-at-once.ts'
import { serverMany } from './load/server-many.ts'
import { formatMicro, runMicro, type Micro } from './micro.ts'
import { Cleanups } from './program.ts'
import { formatResult } from './report.ts'
import { runLoad, type Target } from './rounds.ts'

type Options = { readonly seconds: number; readonly rounds: number | null }

const targets: Readonly<Record<string, Target>> = { gateway, websocket, routes, workers, egress, 'egress-flows': egressFlows, 'egress-containers': egressContainers, server, 'server-at-once': serverAtOnce, 'server-many': serverMany }
const defaults: Options = { seconds: 1, rounds: null }

await main()

async function main(): Promise<void> {
  const micros = await findMicros()
  const { values, positionals } = parseArgs({ allowPositionals: true, options: { seconds: { type: 'string' }, rounds: { type: 'string' } } })
  const known = [...micros.keys(), ...Object.keys(targets)]
  const unknown = positionals.filter((name) => !known.includes(name))
  const options = { seconds: Number(values.seconds ?? defaults.seconds), rounds: values.rounds === undefined ? null : Number(values.rounds) }
  if (unknown.length > 0 || !(options.seconds >= 0.1) || (options.rounds !== null && !(options.rounds >= 1))) {
    console.error(`usage: npm run bench [-- name…] [--seconds S] [--rounds N]\nnames: ${known.join(', ')}`)
    process.exitCode = 64
    return
  }
  const names = positionals.length > 0 ? positionals : known
  const sections = [`# Bench results\n\n${await describeMachine()}\n`]
  console.log(sections[0])
  const begin = performance.now()
  for (const name of names) {
    const section = micros.has(name) ? await measureFunction(micros.get(name)!) : await measureTarget(targets[name]!, options)
    console.log(section)
    sections.push(section)
  }
  console.log(`${names.length} benches in ${Math.round((performance.now() - begin) / 1000)} s`)
  if (positionals.length > 0 || values.seconds !== undefined || values.rounds !== undefined) return
  await writeFile(path.join(import.meta.dirname, 'RESULTS.md'), `${sections.join('\n').trimEnd()}\n`)
}

async function measureFunction(file: string): Promise<string> {
  const { bench } = (await import(file)) as { bench: Micro }
  return formatMicro(await runMicro(bench))
}

/** Starts what the target needs, measures, and takes it all down again, whatever happens. */
async function measureTarget(target: Target, { seconds, rounds }: Options): Promise<string> {
  const cleanups = new Cleanups()
  let leaving: Promise<void> | null = null
  const interrupted = (signal: NodeJS.Signals): void => {
    leaving ??= cleanups.run().finally(() => process.exit(signal === 'SIGINT' ? 130 : 143))
  }
  // Not `once`: a listener that is gone by then lets execa's own end the process before anything is undone.
  process.on('SIGINT', interrupted).on('SIGTERM', interrupted)
  try {
    progress(`${target.title}: starting`)
    const { loads, notes } = await target.start({ seconds }, cleanups)
    const parts: string[] = [`## ${target.title}`, '', ...notes.map((note) => `- ${note}`), '']
    for (const load of loads) parts.push(formatResult(await runLoad(load, rounds ?? load.rounds, progress)))
    return parts.join('\n')
  } finally {
    progress('')
    // Interrupted: what failed here failed because its programs were ended.
    await (leaving ?? cleanups.run())
    process.removeListener('SIGINT', interrupted).removeListener('SIGTERM', interrupted)
  }
}

/** Micro-benches by name: `decide` for decide.bench.ts. */
async function findMicros(): Promise<Map<string, string>> {
  const files = (await readdir(import.meta.dirname)).filter((name) => name.endsWith('.bench.ts')).sort()
  return new Map(files.map((name) => [name.slice(0, -'.bench.ts'.length), path.join(import.meta.dirname, name)]))
}

async function describeMachine(): Promise<string> {
  const cpu = /^model name\s*: (.*)$/m.exec(await readFile('/proc/cpuinfo', 'utf8'))?.[1] ?? process.arch
  const busy = loadavg()[0]!
  const others = busy > 0.5 ? `, **other work on it: load ${busy.toFixed(1)} before the first round**` : ''
  return `Written by \`npm run bench\` on ${new Date().toISOString().slice(0, 10)}: ${availableParallelism()} processors (${cpu}), Linux ${release().split('-')[0]}, Node ${process.versions.node}${others}. A cell is the ratio to the baseline and, in brackets, the median itself. Compare ratios; absolute numbers belong to this machine and this hour.`
}

/** One line that is overwritten, on a terminal only. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`)
}
