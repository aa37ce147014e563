/** The test runner reads its own results right: a run that ended early, ran nothing or skipped must never look like one that passed. */
import t from 'tap'
import { execa } from 'execa'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import { readCounts, readFiles, readSkipReason, slowestFiles } from '#test/support/tap-output.ts'

const abilities = path.join(import.meta.dirname, 'support', 'abilities.ts')

t.test('counts', async (t) => {
  for (const [output, wanted, why] of [
    ['ok 1 - a\n1..1\n# { total: 3, pass: 3 }\n', { passed: 3, failed: 0, skipped: 0 }, 'all passed'],
    ['# { total: 4, pass: 1, fail: 1, skip: 1, todo: 1 }\n# time=1ms', { passed: 1, failed: 1, skipped: 2 }, 'one of each'],
    ['    # { total: 9, pass: 9 }\n', undefined, 'a line inside a subtest is not the summary'],
    ['ok 1 - a\n', undefined, 'ended before its summary'],
    ['# { total: 1, pass: 1 }\n# { total: 2, pass: 0, fail: 2 }\n', { passed: 0, failed: 2, skipped: 0 }, 'the last one counts'],
  ] as const) t.strictSame(readCounts(output), wanted, why)
})

t.test('files of a run', async (t) => {
  const output = '# Subtest: test/a.test.ts\n    ok 1 - x\n    1..1\nok 1 - test/a.test.ts # time=12.5ms\n\n# Subtest: test/b.test.ts\n    not ok 1 - y\nnot ok 2 - test/b.test.ts # time=2s\n  ---\n  exitCode: 1\n  ...\nok 3 - test/c.test.ts # SKIP no root\nnot ok 4 - timeout!\n  ---\n  expired: test/d.test.ts\n  ...\n'
  const files = readFiles(output)
  t.strictSame(files.map(({ name, ok, skipped, milliseconds }) => ({ name, ok, skipped, milliseconds })), [
    { name: 'test/a.test.ts', ok: true, skipped: undefined, milliseconds: 12.5 },
    { name: 'test/b.test.ts', ok: false, skipped: undefined, milliseconds: 2000 },
    { name: 'test/c.test.ts', ok: true, skipped: 'no root', milliseconds: 0 },
    { name: 'test/d.test.ts took too long', ok: false, skipped: undefined, milliseconds: 0 },
  ])
  t.match(files[1]!.output, /not ok 1 - y/, 'what a file said goes with it')
})

t.test('the slowest files', async (t) => {
  const files = [{ name: 'type check', milliseconds: 9000 }, { name: 'a.test.ts', milliseconds: 100 }, { name: 'b.test.ts', milliseconds: 12_340 }, { name: 'c.test.ts', milliseconds: 1000 }]
  t.equal(slowestFiles(files, 2), '   12.3 s  b.test.ts\n    1.0 s  c.test.ts', 'the longest first, and steps that are no file are not among them')
})

t.test('a missing ability skips by name, and fails under CI=true', async (t) => {
  const folder = mkdtempSync(path.join(import.meta.dirname, '.abilities-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const file = path.join(folder, 'needs.test.ts')
  writeFileSync(file, `import t from 'tap'\nimport { needs } from ${JSON.stringify(abilities)}\nawait needs('docker')\nt.ok(true)\n`)
  const run = (env: Record<string, string>) => execa(process.execPath, [file], { env: { DOCKER_HOST: 'unix:///nonexistent', ...env }, extendEnv: false, reject: false })

  const laptop = await run({})
  t.equal(laptop.exitCode, 0)
  t.equal(readSkipReason(laptop.stdout), 'this machine lacks a Docker engine')
  const gate = await run({ CI: 'true' })
  t.not(gate.exitCode, 0)
  t.match(readCounts(gate.stdout), { passed: 0, failed: 1 })
  t.equal(readSkipReason(gate.stdout), undefined)
})
