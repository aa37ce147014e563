/** The wall clock is set, by hand or by NTP: sandboxes live as long as was promised, no shorter and no longer. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Clock } from '../../server/clock.ts'
import { ApiError } from '../../server/api-error.ts'
import { Bench, gatewayToml } from './bench.ts'
import { FakeEngine } from './fake-engine.ts'

const noon = Date.UTC(2026, 0, 1, 12)
const hour = 3_600_000
const minute = 60_000

/** Clocks of a machine: time passes on both, a step is seen on the wall only. */
function machine(boot = 'boot-1') {
  const state = { wall: noon, steady: 5_000_000 }
  return {
    clocks: { wall: () => state.wall, steady: () => state.steady, boot },
    pass: (milliseconds: number) => void ((state.wall += milliseconds), (state.steady += milliseconds)),
    step: (milliseconds: number) => void (state.wall += milliseconds),
  }
}

t.test('a step is told from time that passes', async (t) => {
  const { clocks, pass, step } = machine()
  const steps: [number, string][] = []
  const clock = new Clock(clocks, null, (milliseconds, note) => void steps.push([milliseconds, note]))
  pass(10 * hour)
  t.equal(clock.now(), noon + 10 * hour)
  t.same(steps, [], 'however much passes')
  step(900)
  t.equal(clock.now(), noon + 10 * hour + 900, 'what NTP may do is told as it is')
  t.same(steps, [])
  step(hour)
  t.equal(clock.now(), noon + 11 * hour + 900)
  step(-3 * hour)
  t.equal(clock.now(), noon + 8 * hour + 900)
  t.same(steps.map(([milliseconds]) => milliseconds), [hour + 900, -3 * hour], 'each once, and what was too little before is not lost')
  t.equal(steps[1]![1], clock.note)
})

t.test('a step that cannot be taken is asked again, and until then time goes on as before', async (t) => {
  const { clocks, pass, step } = machine()
  let full = true
  const taken: number[] = []
  const clock = new Clock(clocks, null, (milliseconds) => {
    if (full) throw new ApiError('SERVER::STORE_FAILED', 'full')
    taken.push(milliseconds)
  })
  step(hour)
  pass(minute)
  t.equal(clock.now(), noon + minute)
  full = false
  pass(minute)
  t.equal(clock.now(), noon + hour + 2 * minute)
  t.same(taken, [hour])
})

t.test('what the clock before knew', async (t) => {
  const cases: [why: string, known: (note: string) => string | null, boot: string, steps: number[]][] = [
    ['set while no server ran', (note) => note, 'boot-1', [hour]],
    ['the machine was started anew: the wall is believed', (note) => note, 'boot-2', []],
    ['the first server of this store', () => null, 'boot-1', []],
    ['a note nobody can read', () => 'boot-1 nonsense', 'boot-1', []],
  ]
  for (const [why, known, boot, wanted] of cases) {
    const { clocks, step } = machine()
    const { note } = new Clock(clocks, null, () => undefined)
    step(hour)
    const steps: number[] = []
    t.equal(new Clock({ ...clocks, boot }, known(note), (milliseconds) => void steps.push(milliseconds)).now(), noon + hour, why)
    t.same(steps, wanted, why)
  }
})

const sandboxes: [why: string, milliseconds: number][] = [['forward by a day: nobody ends early', 24 * hour], ['back by a day: nobody lives on', -24 * hour]]
for (const [why, milliseconds] of sandboxes) {
  for (const away of [false, true]) {
    t.test(`the clock is stepped ${why}${away ? ', also when no server runs just then' : ''}`, async (t) => {
      const folder = mkdtempSync(join(tmpdir(), 'sallyport-clock-'))
      t.teardown(() => rmSync(folder, { recursive: true }))
      const { clocks, pass, step } = machine()
      const [engine, store] = [new FakeEngine(), join(folder, 'a.db')]
      const first = new Bench({ clocks, engine, store })
      const [short, renewed, forever] = [await first.create(), await first.create(), await first.create({ timeout: null })]
      t.equal((await first.call('POST', `/sandboxes/${renewed}/renew-expiration`, { expiresAt: new Date(noon + 30 * minute).toISOString() })).status, 200)
      pass(minute)
      if (away) first.abandon()
      step(milliseconds)
      await using later = away ? new Bench({ clocks, engine, store }) : first
      if (away) later.groups.load()
      if (away) await later.groups.sweep(true)

      const alive = async (): Promise<string[]> => {
        await later.due()
        return later.groups.list().map(({ record }) => record.id).sort()
      }
      t.same(await alive(), [short, renewed, forever].sort(), 'nobody ended early')
      const expires = async (id: string): Promise<string> => (await later.call('GET', `/sandboxes/${id}`)).body.expiresAt
      t.equal(await expires(short), new Date(noon + milliseconds + 10 * minute).toISOString(), 'clients read when it ends by the new time')
      t.equal(await expires(renewed), new Date(noon + milliseconds + 30 * minute).toISOString())
      t.equal(await expires(forever), undefined)
      // Answers written after the step are by the new clock, and stay.
      const late = await later.create({ timeout: 120 })
      pass(9 * minute - 1)
      t.same(await alive(), [short, renewed, forever].sort(), `${late} had its own two minutes`)
      pass(1)
      t.same(await alive(), [renewed, forever].sort(), 'to the millisecond')
      pass(20 * minute)
      t.same(await alive(), [forever])
      t.equal(engine.kept.size, 1)
    })
  }
}

t.test('the clock is stepped while a failed sandbox is kept: it stays as long as was said', async (t) => {
  const { clocks, pass, step } = machine()
  await using bench = new Bench({ clocks, toml: gatewayToml.replace('[server]', '[server]\ncreate_wait_seconds = 0'), env: { PENDING_FAILURE_TTL: '300' } })
  const gate = Promise.withResolvers<void>()
  bench.engine.before = async (call) => { if (call === 'start main') { await gate.promise; throw new Error('boom') } }
  const { body } = await bench.call('POST', '/sandboxes', { image: { uri: 'image:1' }, entrypoint: ['x'], resourceLimits: {} })
  gate.resolve()
  await bench.due()
  const state = async (): Promise<string> => {
    await bench.due()
    const { status, body: sandbox } = await bench.call('GET', `/sandboxes/${body.id}`)
    return status === 404 ? 'forgotten' : sandbox.status.state
  }
  t.equal(await state(), 'Failed')
  step(24 * hour)
  pass(5 * minute - 1)
  t.equal(await state(), 'Failed')
  pass(1)
  t.equal(await state(), 'forgotten')
})
