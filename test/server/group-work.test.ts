/** Why a sandbox could not be made, where its sidecar is to blame. */
import t from 'tap'
import { ApiError } from '../../server/api-error.ts'
import { EngineError } from '../../server/docker.ts'
import { toRoute } from '../../server/sandbox-view.ts'
import { Bench, createBody, policyBody } from './bench.ts'

t.test('the sidecar ends while its sandbox is made: how it ended is answered, why stands in the log', async (t) => {
  const cases: [why: string, ends: number | null, main: boolean, message: RegExp, told: object | null][] = [
    ['it ended', 64, false, /^The egress sidecar ended with exit code 64 before the sandbox was complete\.$/, { sidecar_exit_code: 64, sidecar_log: 'no resolver' }],
    ['it ended after main was made', 1, true, /exit code 1 before/, { sidecar_exit_code: 1, sidecar_log: 'no resolver' }],
    ['it runs, but is not ready', null, false, /^not ready$/, { sidecar_exit_code: null, sidecar_log: 'no resolver' }],
    ['it runs, and main cannot', null, true, /^The sandbox could not be started\.$/, null],
  ]
  for (const [why, ends, main, message, told] of cases) {
    await using bench = new Bench({ confirm: async () => { if (!main) throw fail() } })
    const fail = (): Error => {
      if (ends !== null) bench.engine.end(bench.engine.find('egress'), ends)
      return main ? new EngineError('boom', 500) : new ApiError('DOCKER::SANDBOX_START_FAILED', 'not ready')
    }
    bench.engine.log = 'no resolver'
    bench.engine.before = (call) => { if (main && call === 'start main') throw fail() }
    const answer = await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody })
    t.match(answer, { status: 500, body: { code: 'DOCKER::SANDBOX_START_FAILED', message } }, why)
    const line = bench.details.find(({ event }) => event === 'create-failed')!
    if (told === null) t.notOk('sidecar_log' in line, why)
    else t.match(line, told, why)
    t.equal(bench.engine.kept.size, 0, `${why}: nothing is left`)
  }
})

t.test('an engine that cannot tell what a sidecar wrote holds nothing up', { timeout: 20_000 }, async (t) => {
  await using bench = new Bench({ confirm: async () => { throw new ApiError('DOCKER::SANDBOX_START_FAILED', 'not ready') } })
  bench.engine.before = (call) => (call === 'last words' ? new Promise(() => undefined) : undefined)
  t.match(await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody }), { status: 500, body: { message: 'not ready' } })
  t.equal(bench.engine.kept.size, 0)
})

t.test('a sandbox that is being removed has no address any more: the engine may give it to another before its files are gone', async (t) => {
  await using bench = new Bench()
  const id = ((await bench.call('POST', '/sandboxes', createBody)).body as { id: string }).id
  const address = (): string => toRoute(bench.groups.get(id)).host
  t.not(address(), '')
  let [reached, go] = [(): void => undefined, (): void => undefined]
  const removing = new Promise<void>((resolve) => (reached = resolve))
  const held = new Promise<void>((resolve) => (go = resolve))
  bench.engine.before = (call) => {
    if (call !== 'remove main') return undefined
    reached()
    return held
  }
  const deleted = bench.call('DELETE', `/sandboxes/${id}`)
  await removing
  t.equal(address(), '', 'while the engine clears it away')
  go()
  t.equal((await deleted).status, 204)
})
