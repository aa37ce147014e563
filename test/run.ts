/**
 * `npm test`: types and unit tests on one side, beside them the system tests one file at a time (they mostly wait for the engine), and at the
 * end the slowest files and one line `N passed, N failed` that counts assertions.
 * `--long` gives the tests their full size and more time; words name the files to run (`npm test -- gateway`).
 */
import { execa } from 'execa'
import { existsSync, globSync } from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { lacking } from './support/abilities.ts'
import { readCounts, readFiles, readSkipReason, slowestFiles, type Counts } from './support/tap-output.ts'

const top = path.dirname(import.meta.dirname)
const minute = 60_000

const { values: options, positionals: words } = parseArgs({ allowPositionals: true, options: { long: { type: 'boolean', default: false } } })
/** What a run takes at most on two idle cores. One beyond it says so; before what is left is given up, a slower machine gets four times as long. */
const goal = (options.long ? 60 : 15) * minute
const limits = { run: 4 * goal, unit: 2 * goal, file: (2 / 3) * goal }
const deadline = Date.now() + limits.run
/** tap ends a file after 30 s unless told; the limits here are the ones that count. */
const environment = { TAP: '', NO_COLOR: '1', TAP_TIMEOUT: String(limits.file / 1000), SALLYPORT_TEST_LONG: options.long ? '1' : '0' }
const total: Counts = { passed: 0, failed: 0, skipped: 0 }
const times: { name: string; milliseconds: number }[] = []
const begin = Date.now()

process.exitCode = await main()

async function main(): Promise<number> {
  const wanted = (file: string): boolean => words.length === 0 || words.some((word) => file.includes(word))
  const files = globSync('test/**/*.test.ts', { cwd: top }).sort().filter(wanted)
  const isSystem = (file: string): boolean => file.startsWith(path.join('test', 'system'))
  if (files.length === 0) report('FAILED', 'no test file matches', 0, { failed: 1 })

  await removeLeftovers()
  await Promise.all([
    checkTypes().then(() => runUnitTests(files.filter((file) => !isSystem(file)))),
    oneByOne(files.filter(isSystem), runSystemTest),
  ])

  console.log(`\nslowest files, of ${((Date.now() - begin) / minute).toFixed(1)} minutes in all:\n${slowestFiles(times, 10)}`)
  if (Date.now() - begin > goal) console.log(`\nslower than the ${goal / minute} minutes this run may take on two idle cores`)
  const skipped = total.skipped > 0 ? `, ${total.skipped} skipped` : ''
  console.log(`\n${total.passed} passed, ${total.failed} failed${skipped}`)
  return total.failed === 0 ? 0 : 1
}

async function oneByOne<T>(list: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  for (const item of list) await work(item)
}

/** What an earlier run left behind when it was killed: containers, networks, namespaces, programs. */
async function removeLeftovers(): Promise<void> {
  if ((await lacking(['root', 'docker', 'netns'])).length > 0) return
  const [{ docker }, { sweepLeftovers }] = await Promise.all([import('./support/containers.ts'), import('./support/leftovers.ts')])
  await sweepLeftovers(docker)
}

async function checkTypes(): Promise<void> {
  const started = Date.now()
  const result = await execa(program('tsc'), ['-p', '.'], { cwd: top, reject: false, all: true, timeout: 3 * minute })
  report(result.failed ? 'FAILED' : 'ok', 'type check', Date.now() - started, result.failed ? { failed: 1 } : { passed: 1 }, result.failed ? result.all : '')
}

/** One `tap run` for all of them, one file at a time; it also holds the coverage of policies/ to 100 % (see .taprc). */
async function runUnitTests(files: readonly string[]): Promise<void> {
  if (files.length === 0) return
  const started = Date.now()
  const partial = words.length > 0 ? ['--allow-empty-coverage', '--allow-incomplete-coverage'] : []
  const result = await execa(program('tap'), ['run', '--reporter=tap', '--jobs=1', `--timeout=${options.long ? 1800 : 120}`, ...partial, ...files], { cwd: top, env: environment, reject: false, all: true, timeout: limits.unit })
  const seen = readFiles(result.all)
  for (const file of seen) report(file.ok ? (file.skipped === undefined ? 'ok' : 'skipped') : 'FAILED', file.name, file.milliseconds, {}, file.ok ? (file.skipped ?? '') : file.output)
  const counts = readCounts(result.all) ?? { passed: 0, failed: 0, skipped: 0 }
  const unseen = files.length - seen.length
  const silent = result.failed && counts.failed === 0 && unseen === 0
  if (unseen > 0) report('FAILED', `${unseen} unit test files did not finish`, Date.now() - started, { failed: unseen }, lastLines(result.all, 40))
  if (silent) report('FAILED', result.timedOut ? 'unit tests took too long' : 'unit tests as a whole (coverage of policies/ below 100 %?)', Date.now() - started, { failed: 1 }, lastLines(result.all, 40))
  count(counts)
}

/** A process of its own, in a group of its own: one that hangs is ended with everything it started. */
async function runSystemTest(file: string): Promise<void> {
  const started = Date.now()
  const time = Math.min(limits.file, deadline - started)
  if (time < 1000) return report('FAILED', `${file}: not run, the ${limits.run / minute} minutes are over`, 0, { failed: 1 })
  const child = execa(process.execPath, [file], { cwd: top, env: environment, reject: false, all: true, detached: true, cleanup: true, stdin: 'ignore', maxBuffer: 50_000_000 })
  let late = false
  const timers = [setTimeout(() => ((late = true), endGroup(child.pid, 'SIGTERM')), time), setTimeout(() => endGroup(child.pid, 'SIGKILL'), time + 15_000)]
  const forward = (): void => endGroup(child.pid, 'SIGKILL')
  process.once('exit', forward)
  const result = await child
  for (const timer of timers) clearTimeout(timer)
  process.off('exit', forward)

  const took = Date.now() - started
  const counts = readCounts(result.all)
  const skipReason = readSkipReason(result.all)
  if (result.exitCode === 0 && skipReason !== undefined) return report('skipped', file, took, { skipped: 1 }, skipReason)
  const ok = result.exitCode === 0 && counts !== undefined && counts.failed === 0 && counts.passed > 0
  const why = late ? `ended after ${Math.round(time / 1000)} s\n` : counts === undefined ? `ended by ${result.signal ?? `exit ${result.exitCode}`} without a result\n` : counts.passed + counts.failed === 0 ? 'ran no assertion\n' : ''
  const failed = ok ? 0 : Math.max(counts?.failed ?? 0, 1)
  report(ok ? 'ok' : 'FAILED', file, took, { ...counts, failed }, ok ? '' : why + failures(result.all))
}

function endGroup(pid: number | undefined, signal: NodeJS.Signals): void {
  try {
    if (pid !== undefined) process.kill(-pid, signal)
  } catch {
    // It is gone already, which is what was wanted.
  }
}

/** The output without the assertions that passed: what is left is the failures, their places and what the test said. */
function failures(output: string): string {
  return lastLines(output.split('\n').filter((line) => !/^\s*(ok \d+|\d+\.\.\d+)( |$)/.test(line)).join('\n'), 300)
}

function lastLines(text: string, count: number): string {
  return text.trimEnd().split('\n').slice(-count).join('\n')
}

/** One line for one file or step, what it said indented below it, and its share of the total. */
function report(result: 'ok' | 'skipped' | 'FAILED', name: string, milliseconds: number, counts: Partial<Counts>, detail = ''): void {
  const passed = counts.passed === undefined ? '' : `  ${counts.passed} passed`
  const reason = result === 'skipped' ? `  ${detail}` : ''
  console.log(`${result.padEnd(7)} ${name.padEnd(52)} ${(milliseconds / 1000).toFixed(1).padStart(6)} s${passed}${reason}`)
  if (result === 'FAILED' && detail !== '') console.log(detail.replaceAll(/^/gm, '    '))
  times.push({ name, milliseconds })
  count(counts)
}

function count(counts: Partial<Counts>): void {
  total.passed += counts.passed ?? 0
  total.failed += counts.failed ?? 0
  total.skipped += counts.skipped ?? 0
}

/** From this checkout, whatever the PATH says. */
function program(name: string): string {
  const file = path.join(top, 'node_modules', '.bin', name)
  if (!existsSync(file)) throw new Error(`no ${name} in node_modules: run npm ci`)
  return file
}
