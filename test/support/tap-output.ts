/** Reads what `tap run` and single test files print (TAP 14). */

export type Counts = { passed: number; failed: number; skipped: number }

export type FileResult = { name: string; ok: boolean; skipped: string | undefined; milliseconds: number; output: string }

/** Assertions of a whole run, from its last summary line: `# { total: 4, pass: 3, fail: 1 }`. Undefined when the run ended before it. */
export function readCounts(output: string): Counts | undefined {
  const summary = output.match(/^# \{ total: .*\}$/gm)?.at(-1)
  if (summary === undefined) return undefined
  const count = (word: string): number => Number(new RegExp(`\\b${word}: (\\d+)`).exec(summary)?.[1] ?? 0)
  return { passed: count('pass'), failed: count('fail'), skipped: count('skip') + count('todo') }
}

/** Why a single file ran nothing (`1..0 # reason`), or undefined when it ran something. */
export function readSkipReason(output: string): string | undefined {
  return /^1\.\.0 # (?:SKIP )?(.*)$/m.exec(output)?.[1]
}

/** The files of a `tap run`: each is a subtest at the margin, with everything it printed before its own line. */
export function readFiles(output: string): FileResult[] {
  const files: FileResult[] = []
  let from = 0
  for (const found of output.matchAll(/^(not )?ok \d+ - (\S+)(?: # (?:SKIP (.*)|time=([\d.]+)(ms|s)))?$/gm)) {
    const [line, not, title, skipped, time, unit] = found
    // A file that took too long is named below its line only.
    const late = title === 'timeout!' ? /^\n {2}---\n {2}expired: (\S+)/.exec(output.slice(found.index + line.length)) : null
    const name = late === null ? title! : `${late[1]} took too long`
    files.push({ name, ok: not === undefined, skipped, milliseconds: Number(time ?? 0) * (unit === 's' ? 1000 : 1), output: output.slice(from, found.index + line.length) })
    from = found.index + line.length
  }
  return files
}

/** The files that took longest, the longest first, a line each: where to look when a run nears its limit. */
export function slowestFiles(files: readonly { readonly name: string; readonly milliseconds: number }[], count: number): string {
  const slowest = files.filter(({ name }) => name.endsWith('.test.ts')).sort((a, b) => b.milliseconds - a.milliseconds).slice(0, count)
  return slowest.map(({ name, milliseconds }) => `${(milliseconds / 1000).toFixed(1).padStart(7)} s  ${name}`).join('\n')
}
