/** What keeps the program from starting is one line and an exit code; what befalls it later is met by new workers, ever later. */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { claimPort } from '../../gateway/claim-port.ts'
import { restartDelay } from '../../gateway/workers.ts'
import { ask, eventually, get, startRaw, statusOf } from './support.ts'

const main = new URL('../../gateway/main.ts', import.meta.url).pathname
const folder = mkdtempSync(join(tmpdir(), 'gateway-start-'))
t.teardown(() => rmSync(folder, { recursive: true }))
const routes = join(folder, 'routes.json')
const writeRoutes = (text: string): void => writeFileSync(routes, text)
writeRoutes('{"sandboxes":[]}')

type Program = AsyncDisposable & { readonly child: ChildProcess; readonly errors: () => string[]; readonly lines: () => Record<string, unknown>[]; readonly code: Promise<number | null> }

function start(...argv: string[]): Program {
  const child = spawn(process.execPath, [main, '--provider=static', `--routes=${routes}`, ...argv], { stdio: ['ignore', 'pipe', 'pipe'], env: { PATH: process.env['PATH'] } })
  let output = ''
  let errors = ''
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (errors += chunk.toString()))
  const code = once(child, 'close').then(([status]) => status as number | null)
  return {
    child,
    code,
    errors: () => errors.split('\n').filter((line) => line !== ''),
    lines: () => output.slice(0, output.lastIndexOf('\n') + 1).split('\n').filter((line) => line !== '').map((line) => JSON.parse(line) as Record<string, unknown>),
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await code
    },
  }
}

t.test('a port or an address that cannot be had: one line, exit 69; one that cannot be meant: exit 64', { timeout: 90_000 }, async (t) => {
  await using taken = await startRaw(() => undefined)
  const port = `--port=${taken.port}`
  const rows = [
    [['--host=127.0.0.1', port], 69, /^gateway: cannot listen: .*EADDRINUSE/],
    [['--host=127.0.0.1', port, '--workers=2'], 69, /^gateway: cannot listen: .*EADDRINUSE/],
    [['--port=0', `--admin-port=${taken.port}`], 69, /^gateway: cannot listen: .*EADDRINUSE/],
    [['--port=0', '--host=198.51.100.7'], 69, /^gateway: cannot listen: .*EADDRNOTAVAIL/],
    [['--port=0', '--host=999.1.1.1'], 64, /^gateway: --host: is neither/],
    [['--port=0', `--access-log=${routes}/access.log`], 64, /^gateway: --access-log: .*cannot be opened/],
  ] as const
  await using programs = new AsyncDisposableStack()
  const started = rows.map(([argv]) => programs.use(start(...argv)))
  for (const [index, [argv, code, said]] of rows.entries()) {
    const program = started[index] as Program
    t.equal(await program.code, code, argv.join(' '))
    t.equal(program.errors().length, 1, program.errors().join('\n'))
    t.match(program.errors()[0], said)
  }
})

t.test('a worker that cannot start is said once, and ends the program; one that dies later is replaced', { timeout: 90_000 }, async (t) => {
  writeRoutes('{"sandboxes":[{"id":"a","host":"10.0.0.1:80"}]}')
  const reserved = await startRaw(() => undefined)
  const { port } = reserved
  await reserved[Symbol.asyncDispose]()
  const argv = [`--port=${port}`, '--host=127.0.0.1', '--workers=2']
  await using refused = start(...argv)
  t.equal(await refused.code, 64)
  t.equal(refused.errors().length, 1)
  t.match(refused.errors()[0], 'sandboxes[0].host')

  writeRoutes('{"sandboxes":[]}')
  await using program = start(...argv)
  const said = (msg: string): Record<string, unknown>[] => program.lines().filter((line) => line['msg'] === msg)
  await eventually(() => said('listening').length === 2, 'both listen', 15_000)
  for (const [host, message] of [['127.0.0.1', `gateway: cannot listen: port ${port} belongs to another gateway`], ['0.0.0.0', `gateway: cannot listen: listen EADDRINUSE: address already in use 0.0.0.0:${port}`]] as const) {
    await using second = start(`--port=${port}`, `--host=${host}`, '--workers=2')
    t.equal(await second.code, 69, 'a second gateway would share the port')
    t.same(second.errors(), [message])
  }
  writeRoutes('no routes')
  process.kill(said('listening')[0]?.['pid'] as number, 'SIGKILL')
  await eventually(() => said('worker died').length >= 2, 'a replacement that cannot start', 15_000)
  t.same(said('worker died').slice(0, 2).map((line) => line['restart_ms']), [500, 1_000], 'each try waits longer')
  t.equal(statusOf(await ask(port, get('/status.ok'))), 200, 'the other worker goes on')
  writeRoutes('{"sandboxes":[]}')
  await eventually(() => said('listening').length === 3, 'a replacement', 15_000)
  program.child.kill('SIGTERM')
  t.equal(await program.code, 0)
})

t.test('of two that start at once with workers, one has the port, until it gives it up', async (t) => {
  const reserved = await startRaw(() => undefined)
  const { port } = reserved
  await t.rejects(claimPort(port, '127.0.0.1'), { code: 'EADDRINUSE', syscall: 'listen' }, 'somebody listens')
  await reserved[Symbol.asyncDispose]()
  const tries = await Promise.allSettled([claimPort(port, '127.0.0.1'), claimPort(port, '127.0.0.1')])
  const won = tries.filter((one) => one.status === 'fulfilled')
  t.equal(won.length, 1)
  t.match(tries.find((one) => one.status === 'rejected')?.reason, { syscall: 'listen', message: `port ${port} belongs to another gateway` })
  const elsewhere = await claimPort(port, '127.0.0.2')
  won[0]?.value()
  const again = await claimPort(port, '127.0.0.1')
  for (const giveUp of [elsewhere, again]) giveUp()
})

t.test('restarts wait twice as long each time, up to half a minute', async (t) => {
  t.same([0, 1, 2, 3, 7, 8, 5_000].map(restartDelay), [500, 500, 1_000, 2_000, 30_000, 30_000, 30_000])
})
