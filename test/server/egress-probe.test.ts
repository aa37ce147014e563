/** The proof that a sandbox cannot pass for its sidecar: asked for once, believed only when it was seen. */
import t from 'tap'
import { labels } from '#policies/wire.ts'
import { ApiError } from '../../server/api-error.ts'
import { EgressProbe } from '../../server/egress-probe.ts'
import type { ConfirmRules } from '../../server/sidecar-client.ts'
import { Bench, gatewayToml, policyBody, readToml } from './bench.ts'
import { FakeEngine } from './fake-engine.ts'

type Setting = { exitCode: number | null; engine: FakeEngine; proof: { value: string | null }; events: string[]; told?: Record<string, unknown>[]; confirm?: ConfirmRules }

function probeOf({ exitCode, engine, proof, events, told = [], confirm = async () => undefined }: Setting, runtime = ''): EgressProbe {
  engine.after = (call) => { if (call === 'start probe' && exitCode !== null) engine.end(engine.find('probe'), exitCode) }
  return new EgressProbe(readToml(`${gatewayToml}\n${runtime}`), {
    engine, instance: 'bench', confirm,
    proved: { get: () => proof.value, set: (value) => void (proof.value = value) },
    network: { name: 'sallyport', emptyAddress: () => '172.30.255.254' },
    report: (event, detail) => {
      events.push(event)
      told.push({ event, ...detail })
    },
  })
}
const setting = (exitCode: number | null): Setting => ({ exitCode, engine: new FakeEngine(), proof: { value: null }, events: [] })
const starts = (engine: FakeEngine): number => engine.calls.filter((call) => call === 'start probe').length

t.test('proved once, for everybody who waits and for the next server', async (t) => {
  const given = setting(0)
  const probe = probeOf(given)
  await Promise.all([probe.ensure(), probe.ensure()])
  await probe.ensure()
  await probeOf(given).ensure()
  t.equal(starts(given.engine), 1)
  t.equal(given.engine.kept.size, 0, 'nothing is left of it')
  t.same(given.events, ['egress-proved'])
  const others: [why: string, change: (engine: FakeEngine) => void][] = [
    ['another version', ({ engine }) => (engine.version = '29')],
    ['another runtime where none is asked for', ({ engine }) => (engine.runtime = 'runsc')],
    ['another driver of cgroups', ({ engine }) => (engine.cgroups = 'systemd v1')],
    ['another version of cgroups', ({ engine }) => (engine.cgroups = 'systemd v2')],
    ['another image under the name', ({ imageIds }) => imageIds.set('egress:1', 'sha256:2')],
  ]
  for (const [index, [why, change]] of others.entries()) {
    change(given.engine)
    await probe.ensure()
    await probe.ensure()
    t.equal(starts(given.engine), index + 2, `${why} is proved again, once`)
  }
})

t.test('a sidecar is made from the very image that was proved', async (t) => {
  const given = setting(0)
  const images: string[] = []
  given.engine.imageIds.set('egress:1', 'sha256:1')
  given.engine.before = (call) => {
    if (!/^start (egress|probe)$/.test(call)) return
    images.push(given.engine.kept.get(given.engine.find(call.slice(6)))?.spec.image ?? '')
    // Somebody gives the name to another image, at the worst moment.
    given.engine.imageIds.set('egress:1', 'sha256:2')
  }
  await using bench = new Bench({ engine: given.engine, probe: probeOf(given) })
  await bench.create(policyBody)
  t.same(images, ['sha256:1', 'sha256:1', 'sha256:1'], 'of the proof, of the probe, of the sandbox')
  await bench.call('DELETE', `/sandboxes/${bench.groups.list()[0]?.record.id}`)
  images.length = 0
  await bench.create(policyBody)
  t.same(images, ['sha256:2', 'sha256:2', 'sha256:2'], 'the next has the other one, proved as well')
})

t.test('what the probe is', async (t) => {
  const given = setting(0)
  let spec: unknown
  let sidecar: unknown
  given.engine.before = (call) => {
    if (call === 'start probe') spec = given.engine.kept.get(given.engine.find('probe'))?.spec
    if (call === 'start egress') sidecar = given.engine.kept.get(given.engine.find('egress'))?.spec
  }
  await probeOf(given).ensure()
  t.match(spec, { network: { join: /^c/ }, capAdd: [], cgroupns: 'private', labels: { [labels.instance]: 'bench' } }, "a sandbox's rights, not the sidecar's")
  t.ok((spec as { capDrop: string[] }).capDrop.includes('NET_RAW'))
  t.ok((sidecar as { env: string[] }).env.includes('OPENSANDBOX_EGRESS_DNS_UPSTREAM=172.30.255.254:53'), 'the upstream is where nobody is')
  t.ok((sidecar as { env: string[] }).env.includes('OPENSANDBOX_EGRESS_RULES={"defaultAction":"deny","egress":[]}'))
})

t.test('under the runtime of sandboxes', async (t) => {
  const given = setting(0)
  const runtimes: unknown[] = []
  given.engine.before = (call) => {
    if (call.startsWith('start ')) runtimes.push(given.engine.kept.get(given.engine.find(call.slice(6)))?.spec.runtime)
  }
  await probeOf(given).ensure()
  await probeOf(given, '[secure_runtime]\ntype = "gvisor"').ensure()
  t.same(runtimes, [null, null, null, 'runsc'], 'proved anew; the sidecar is ours and needs none')
  const refusing = probeOf(setting(4), '[secure_runtime]\ntype = "kata"\ndocker_runtime = "kata-qemu"')
  await t.rejects(refusing.ensure(), { code: 'DOCKER::SANDBOX_START_FAILED', message: /under secure_runtime "kata-qemu"/ })
})

t.test('not proved: refused, every time', async (t) => {
  for (const exitCode of [3, 4, 127]) {
    const given = setting(exitCode)
    const probe = probeOf(given)
    for (const attempt of [1, 2]) await t.rejects(probe.ensure(), { code: 'DOCKER::SANDBOX_START_FAILED' }, `exit code ${exitCode}, attempt ${attempt}`)
    t.equal(given.proof.value, null)
    t.equal(given.engine.kept.size, 0)
    t.same(given.events, ['egress-probe-failed', 'egress-probe-failed'])
  }
})

t.test('a sweep leaves it alone, and takes what a killed server left of one', async (t) => {
  const given = setting(0)
  const swept = Promise.withResolvers<void>()
  const probe = probeOf({ ...given, confirm: () => swept.promise })
  await using bench = new Bench({ engine: given.engine, inUse: (id) => probe.tries(id) })
  const started = Promise.withResolvers<void>()
  const { after } = given.engine
  given.engine.after = (call) => {
    if (call === 'start egress') started.resolve()
    return after(call)
  }
  const proved = probe.ensure()
  await started.promise
  await bench.groups.sweep(true)
  t.same([given.engine.kept.size, bench.events], [1, []])
  swept.resolve()
  await proved
  t.equal(starts(given.engine), 1)

  const killed = probeOf({ ...setting(0), engine: given.engine, confirm: () => new Promise(() => undefined) })
  given.engine.after = (call) => { if (call === 'start egress') left.resolve() }
  const left = Promise.withResolvers<void>()
  void killed.ensure()
  await left.promise
  await bench.groups.sweep(true)
  t.same([given.engine.kept.size, bench.events], [0, ['orphan-removed']])
})

t.test('a sidecar that is not ready: as long as any other, and the reason is told', async (t) => {
  const late = new ApiError('DOCKER::SANDBOX_START_FAILED', 'Egress sidecar did not become ready within 30s (no answer).')
  const waiting: ConfirmRules = (_address, _token, _late, signal) => new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason)))
  const cases: [why: string, confirm: ConfirmRules, ends: number | null, message: RegExp, told: object][] = [
    ['not in time', async () => { throw late }, null, /did not become ready within 30s/, { sidecar_exit_code: null, sidecar_log: 'nothing to do' }],
    ['it ended', waiting, 78, /^The egress sidecar ended with exit code 78 when it was tried\.$/, { sidecar_exit_code: 78, sidecar_log: 'nothing to do' }],
  ]
  for (const [why, confirm, ends, message, told] of cases) {
    const given = setting(0)
    const lines: Record<string, unknown>[] = []
    given.engine.log = 'nothing to do'
    const probe = probeOf({ ...given, confirm, told: lines })
    if (ends !== null) given.engine.after = (call) => { if (call === 'start egress') given.engine.end(given.engine.find('egress'), ends) }
    await t.rejects(probe.ensure(), { code: 'DOCKER::SANDBOX_START_FAILED', message }, why)
    t.match(lines, [{ event: 'egress-probe-failed', error: message, ...told }], why)
    t.same([lines.length, given.engine.calls.filter((call) => call === 'start egress').length, given.engine.kept.size], [1, 1, 0], `${why}: told once, tried once, nothing is left`)
  }
})
