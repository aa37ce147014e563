/** `docker.adopt`: sandboxes of the original server are taken over; nobody else's ever. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { labels } from '#policies/wire.ts'
import { mainSpec } from '../../server/container-spec.ts'
import { readCreateRequest } from '../../server/create-request.ts'
import type { Found } from '../../server/docker.ts'
import type { SandboxRecord } from '../../server/group.ts'
import { othersOn, readOldMetadata } from '../../server/ownership.ts'
import { Bench, createBody, gatewayToml, readToml } from './bench.ts'
import { FakeEngine } from './fake-engine.ts'

const adopting = gatewayToml.replace('[egress]', '[docker]\nadopt = true\n[egress]')
const start = Date.UTC(2026, 0, 1)

/** A container as the original makes it: its labels, and no other. */
function put(engine: FakeEngine, containerId: string, own: Record<string, string>, state: Found['state'] = 'running'): void {
  const config = readToml(gatewayToml)
  const request = readCreateRequest(createBody, config, 0)
  const record: SandboxRecord = {
    id: 'x', phase: 'ready', announced: true, reason: null, message: null, createdAt: 0, changedAt: 0, keepUntil: null, expiresAt: null, image: 'old:1', entrypoint: ['tail', '-f'],
    metadata: null, platform: null, egress: null, secureAccessToken: null, hostPorts: {}, renewExtendSeconds: null,
  }
  const spec = mainSpec(config, 'x', 'bridge', record, request, null)
  engine.kept.set(containerId, { spec: { ...spec, name: `sandbox-${containerId}`, labels: own }, state, exitCode: null, address: '172.17.0.5', startedAt: 1 })
}

function putOld(engine: FakeEngine): void {
  put(engine, 'plain', { [labels.id]: 'old-plain', [labels.expiresAt]: '2026-01-01T00:10:00.123456+00:00', [labels.httpPort]: '40001', team: 'x', [labels.accessRenewExtendSeconds]: '300' })
  put(engine, 'main', { [labels.id]: 'old-guarded', [labels.manualCleanup]: 'true', [labels.egressAuthToken]: 'tok' })
  put(engine, 'sidecar', { [labels.egressSidecarFor]: 'old-guarded' })
  put(engine, 'half', { [labels.id]: 'old-half', [labels.manualCleanup]: 'true' }, 'created')
  put(engine, 'bare', { [labels.id]: 'old-bare', [labels.egressAuthToken]: 'tok' })
  put(engine, 'theirs', { [labels.id]: 'theirs', [labels.instance]: 'another', [labels.role]: 'main' })
  put(engine, 'stranger', { app: 'database' })
}

t.test('without adopt they are not seen', async (t) => {
  await using bench = new Bench()
  putOld(bench.engine)
  await bench.groups.sweep(true)
  t.same((await bench.call('GET', '/v1/sandboxes')).body.items, [])
  t.equal((await bench.call('DELETE', '/v1/sandboxes/old-plain')).status, 404)
  t.equal(bench.engine.kept.size, 7, 'nothing was removed')
})

t.test('with adopt they live and end like our own', async (t) => {
  await using bench = new Bench({ toml: adopting, clock: { now: start }, oldMetadata: (id) => (id === 'old-guarded' ? { patched: 'yes' } : null) })
  putOld(bench.engine)
  await bench.groups.sweep(true)
  const ids = async (): Promise<string[]> => (await bench.call('GET', '/v1/sandboxes')).body.items.map((item: { id: string }) => item.id).sort()
  t.same(await ids(), ['old-guarded', 'old-plain'], "neither what is half made, nor another server's, nor a stranger's")
  t.match((await bench.call('GET', '/v1/sandboxes/old-plain')).body, { image: { uri: 'old:1' }, status: { state: 'Running' }, metadata: { team: 'x' }, expiresAt: '2026-01-01T00:10:00.123Z', entrypoint: ['tail', '-f'] })
  t.match((await bench.call('GET', '/v1/sandboxes/old-guarded')).body.metadata, { patched: 'yes' }, "the original's file holds instead of the labels")
  t.equal((await bench.call('GET', '/v1/sandboxes/old-guarded/endpoints/18080')).body.headers['OPENSANDBOX-EGRESS-AUTH'], 'tok')

  t.equal((await bench.call('POST', '/v1/sandboxes/old-plain/renew-expiration', { expiresAt: '2026-01-01T01:00:00Z' })).status, 200)
  t.equal((await bench.call('POST', '/v1/sandboxes/old-plain/pause')).status, 202)
  t.equal((await bench.call('POST', '/v1/sandboxes/old-plain/resume')).status, 202)
  t.match((await bench.call('PATCH', '/v1/sandboxes/old-plain/metadata', { team: null, a: 'b' })).body.metadata, { a: 'b' })
  bench.clock.now = Date.UTC(2026, 0, 1, 0, 59)
  bench.groups.tick()
  await bench.groups.sweep(true)
  t.same(await ids(), ['old-guarded', 'old-plain'], 'the label is not asked again')
  bench.clock.now = Date.UTC(2026, 0, 1, 1)
  bench.groups.tick()
  await bench.groups.close(1000)
  t.notOk(bench.engine.kept.has('plain'), 'it ended at the new time')

  t.equal((await bench.call('DELETE', '/v1/sandboxes/old-guarded')).status, 204)
  t.same([...bench.engine.kept.keys()], ['half', 'bare', 'theirs', 'stranger'], 'main and sidecar are gone, the rest stays')
})

t.test('what was taken over is remembered by container, also when adopt is switched off again', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-adopt-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const [engine, store] = [new FakeEngine(), join(folder, 'store.db')]
  putOld(engine)
  const first = new Bench({ toml: adopting, engine, store, clock: { now: start } })
  await first.groups.sweep(true)
  first.abandon()

  await using bench = new Bench({ engine, store, clock: { now: start } })
  bench.groups.load()
  put(engine, 'twin', { [labels.id]: 'old-plain' })
  put(engine, 'late', { [labels.id]: 'old-late', [labels.manualCleanup]: 'true' })
  await bench.groups.sweep(true)
  t.match((await bench.call('GET', '/v1/sandboxes')).body.items.map((item: { id: string }) => item.id).sort(), ['old-guarded', 'old-plain'])
  t.equal((await bench.call('DELETE', '/v1/sandboxes/old-plain')).status, 204)
  t.same([engine.kept.has('plain'), engine.kept.has('twin'), engine.kept.has('late')], [false, true, true], 'who only calls itself the same is not touched')
  engine.end('sidecar', 1)
  await bench.groups.sweep(true)
  t.match((await bench.call('GET', '/v1/sandboxes/old-guarded')).body.status, { state: 'Failed', reason: 'EGRESS_GONE' }, 'its sidecar is its guard as well')
  t.notOk(engine.kept.has('main'))
})

t.test('nobody passes for a container of a sandbox we made', async (t) => {
  await using bench = new Bench({ toml: adopting })
  const id = await bench.create()
  put(bench.engine, 'forged', { [labels.id]: id })
  await bench.groups.sweep(true)
  t.equal((await bench.call('DELETE', `/v1/sandboxes/${id}`)).status, 204)
  t.same([...bench.engine.kept.keys()], ['forged'])
})

t.test("others' containers are counted, and named", async (t) => {
  const engine = new FakeEngine()
  putOld(engine)
  put(engine, 'ours', { [labels.id]: 'ours', [labels.instance]: 'bench' })
  t.same(await othersOn(engine, 'bench'), { containers: 1, instances: ['another'] }, "neither our own nor nobody's")
  for (let n = 0; n < 20; n++) put(engine, `lost-${n}`, { [labels.instance]: `lost-${n % 12}` })
  t.match(await othersOn(engine, 'bench'), { containers: 21, instances: { length: 10 } }, 'not more names than fit into a line')
})

t.test('metadata that the original keeps in a file', async (t) => {
  const home = mkdtempSync(join(tmpdir(), 'sallyport-home-'))
  t.teardown(() => rmSync(home, { recursive: true }))
  mkdirSync(join(home, '.opensandbox', 'metadata'), { recursive: true })
  const cases: [why: string, id: string, content: string | null, wanted: unknown][] = [
    ['as it stands', 'a-1', '{"team":"x","e.com/k":""}', { team: 'x', 'e.com/k': '' }],
    ['emptied', 'a-2', '{}', {}],
    ['none', 'a-3', null, null],
    ['half written', 'a-4', '{"team":', null],
    ['no map', 'a-5', '["x"]', null],
    ['no texts', 'a-6', '{"team":1}', null],
    ['no labels', 'a-7', '{"team":"a b"}', null],
    ['reserved ones', 'a-8', '{"sallyport.io/instance":"x"}', null],
    ['an id that leads elsewhere', '../metadata/a-1', null, null],
  ]
  for (const [why, id, content, wanted] of cases) {
    if (content !== null) writeFileSync(join(home, '.opensandbox', 'metadata', `${id}.json`), content)
    t.same(readOldMetadata(home, id), wanted, why)
  }
})
