/** execd: taken out of its image once, in every sandbox before it starts, and never on the way to the egress API. */
import t from 'tap'
import { extract, pack } from 'tar-stream'
import { EngineError } from '../../server/docker.ts'
import { readFirstFile, writeTar } from '../../server/tar.ts'
import { Bench, createBody, gatewayToml, policyBody } from './bench.ts'

const directToml = '[server]\nhost = "127.0.0.1"\napi_key = "k1"\n[runtime]\nexecd_image = "execd:1"\n[egress]\nimage = "egress:1"\ndns_upstreams = ["198.51.100.53"]\n'

function open(toml = directToml): Bench {
  const bench = new Bench({ toml })
  bench.engine.images.add('execd:1')
  bench.engine.files.set('/execd', 'the program').set('/bootstrap.sh', '#!/bin/sh\n')
  return bench
}

type Entry = { name: string; type: string; mode: number; text: string }
async function list(archive: Buffer): Promise<Entry[]> {
  const entries: Entry[] = []
  const reader = extract()
  reader.end(archive)
  for await (const entry of reader) {
    const parts: Buffer[] = []
    for await (const part of entry) parts.push(part as Buffer)
    entries.push({ name: entry.header.name, type: entry.header.type ?? '', mode: entry.header.mode ?? 0, text: Buffer.concat(parts).toString() })
  }
  return entries
}

t.test('staged once, installed between create and start', async (t) => {
  await using bench = open()
  await Promise.all([bench.create(), bench.create(policyBody)])
  await bench.create()
  const calls = bench.engine.calls
  t.equal(calls.filter((call) => call === 'create staging').length, 1, 'three creates, one staging container')
  t.equal(calls.filter((call) => call === 'remove staging').length, 1, 'which is gone again')
  t.equal(bench.engine.written.size, 3)
  t.same(calls.filter((call) => / main$/.test(call)).slice(-3), ['create main', 'write main', 'start main'])
  t.same(await list([...bench.engine.written.values()][0]!), [
    { name: 'opt/opensandbox', type: 'directory', mode: 0o755, text: '' },
    { name: 'opt/opensandbox/execd', type: 'file', mode: 0o755, text: 'the program' },
    { name: 'opt/opensandbox/bootstrap.sh', type: 'file', mode: 0o755, text: '#!/bin/sh\n' },
  ])
  t.match(bench.engine.kept.get(bench.engine.find('main'))?.spec, { entrypoint: ['/opt/opensandbox/bootstrap.sh'], cmd: ['sleep', '1'] })
})

t.test('a newer image under the same name', async (t) => {
  await using bench = open()
  await bench.create()
  bench.engine.imageIds.set('execd:1', 'newer')
  await bench.create()
  t.equal(bench.engine.calls.filter((call) => call === 'create staging').length, 2)
})

t.test('what goes wrong leaves nothing, and says what', async (t) => {
  const cases: [why: string, call: string, code: string, status: number][] = [
    ['the image cannot be opened', 'create staging', 'DOCKER::SANDBOX_EXECD_START_FAILED', 503],
    ['there is no execd in it', 'read /execd', 'DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED', 500],
    ['there is no bootstrap script in it', 'read /bootstrap.sh', 'DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED', 500],
    ['the sandbox does not take it', 'write main', 'DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED', 500],
  ]
  for (const [why, failing, code, status] of cases) {
    await using bench = open()
    bench.engine.before = (call) => { if (call === failing) throw new EngineError('boom', 500) }
    t.match(await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody }), { status, body: { code } }, why)
    t.equal(bench.engine.kept.size, 0, `${why}: no container`)
    t.same(bench.store.all(), [], `${why}: no record`)
    bench.engine.before = () => undefined
    t.ok(await bench.create(), `${why}: the next create tries again`)
  }
})

t.test('a sweep that comes at the wrong moment', async (t) => {
  await using bench = open()
  let swept = false
  bench.engine.before = async (call) => {
    if (call !== 'read /execd' || swept) return
    swept = true
    await bench.groups.sweep(true)
    throw new EngineError('No such container', 404)
  }
  t.ok(await bench.create())
  t.ok(swept)
  t.notOk(bench.engine.find('staging'))
})

t.test('endpoints in direct mode', async (t) => {
  await using bench = open()
  const endpoint = async (id: string, port: number) => (await bench.call('GET', `/v1/sandboxes/${id}/endpoints/${port}`)).body
  const plain = await bench.create()
  const ports = bench.groups.get(plain).record.hostPorts
  t.equal(new Set(Object.values(ports)).size, 2)
  t.same(await endpoint(plain, 44772), { endpoint: `127.0.0.1:${ports.execd}/proxy/44772` })
  t.same(await endpoint(plain, 8080), { endpoint: `127.0.0.1:${ports.http}` })
  t.same(await endpoint(plain, 18080), { endpoint: `127.0.0.1:${ports.execd}/proxy/18080` }, 'no sidecar: no secret either')
  t.same(await endpoint(plain, 3000), { endpoint: `127.0.0.1:${ports.execd}/proxy/3000` })

  const guarded = await bench.create(policyBody)
  const { hostPorts, egress } = bench.groups.get(guarded).record
  t.same(await endpoint(guarded, 18080), { endpoint: `127.0.0.1:${hostPorts.egress}`, headers: { 'OPENSANDBOX-EGRESS-AUTH': egress?.token } }, 'the sidecar itself')
  t.same(await endpoint(guarded, 44772), { endpoint: `127.0.0.1:${hostPorts.execd}/proxy/44772` }, 'no token on the way to execd')
  const sidecar = bench.engine.kept.get(bench.engine.find('egress'))!.spec
  t.same([...sidecar.publish], [[8080, hostPorts.http], [44772, hostPorts.execd], [18080, hostPorts.egress]])

  // A store that was lost does not know the sidecar's port any more; execd is no way around.
  await using second = new Bench({ toml: directToml, engine: bench.engine })
  second.store.put({ ...bench.groups.get(guarded).record, hostPorts: { execd: 40000 } })
  second.groups.load()
  t.match((await second.call('GET', `/v1/sandboxes/${guarded}/endpoints/18080`)), { status: 500, body: { code: 'DOCKER::NETWORK_MODE_ENDPOINT_UNAVAILABLE' } })
})

t.test('without execd', async (t) => {
  await using gateway = new Bench()
  await gateway.create()
  t.match(gateway.engine.kept.get(gateway.engine.find('main'))?.spec, { entrypoint: [], cmd: ['sleep', '1'] })
  await using direct = new Bench({ toml: directToml.replace('execd_image = "execd:1"', '') })
  const id = await direct.create()
  t.match(await direct.call('GET', `/sandboxes/${id}/endpoints/44772`), { status: 501, body: { code: 'NOT_IMPLEMENTED' } })
})

t.test('in gateway mode execd is a port like any other', async (t) => {
  await using bench = open(`${gatewayToml}\n[runtime]\nexecd_image = "execd:1"\n`)
  const id = await bench.create()
  t.same(bench.groups.get(id).record.hostPorts, {}, 'nothing is published')
  t.same((await bench.call('GET', `/sandboxes/${id}/endpoints/44772`)).body, { endpoint: `${id}-44772.sandbox.localhost:28888` })
})

t.test('tar', async (t) => {
  const foreign = pack()
  foreign.entry({ name: 'folder', type: 'directory', mode: 0o755 })
  foreign.entry({ name: `${'long'.repeat(60)}/execd`, mode: 0o4711, pax: { 'SCHILY.xattr.security.capability': 'x' } }, 'x'.repeat(1025))
  foreign.finalize()
  const chunks: Buffer[] = []
  for await (const chunk of foreign) chunks.push(chunk as Buffer)
  const archive = Buffer.concat(chunks)
  const file = readFirstFile(archive)
  t.equal(file.mode, 0o4711)
  t.equal(Buffer.from(file.content).toString(), 'x'.repeat(1025), 'folders and extended headers are passed over')
  t.throws(() => readFirstFile(archive.subarray(0, archive.length - 2048)), /cut short/)
  t.throws(() => readFirstFile(new Uint8Array(1024)), /no regular file/)
  t.throws(() => readFirstFile(Buffer.alloc(512, 'x')), /broken/)
  t.throws(() => writeTar({ ['a'.repeat(100)]: { mode: 0, content: null } }), /does not fit/)
  t.same((await list(writeTar({ a: { mode: 0o600, content: Buffer.alloc(512, 'y') }, b: { mode: 0o644, content: Buffer.alloc(0) } }))).map(({ text }) => text.length), [512, 0])
})
