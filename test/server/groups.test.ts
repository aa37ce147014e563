/** What happens when something goes wrong while a sandbox is made, held or removed. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { EngineError } from '../../server/docker.ts'
import type { Touch } from '../../server/watch.ts'
import { Bench, createBody, gatewayToml, policyBody } from './bench.ts'
import { FakeEngine } from './fake-engine.ts'

t.setTimeout(120_000)

/** A create answers before anything is made. */
const atOnce = gatewayToml.replace('[server]', '[server]\ncreate_wait_seconds = 0')

t.test('a step that fails leaves nothing', async (t) => {
  const steps = ['create network', 'create egress', 'start egress', 'address', 'create main', 'start main']
  for (const step of steps) {
    for (const when of ['before', 'after'] as const) {
      await using bench = new Bench()
      bench.engine[when] = (call) => { if (call === step) throw new EngineError('boom', 500) }
      const answer = await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody })
      t.match(answer, { status: 500, body: { code: 'DOCKER::SANDBOX_START_FAILED' } }, `${when} ${step}`)
      t.notMatch(answer.body.message, /boom/, 'the engine is not quoted')
      t.equal(bench.engine.kept.size, 0, `${when} ${step}: no container`)
      t.same(bench.store.all(), [], `${when} ${step}: no record`)
    }
  }
})

t.test('the engine goes away while a sandbox is made: a clear answer, and nothing is left when it is back', async (t) => {
  for (const [name, body] of [['without a policy', createBody], ['with a policy', { ...createBody, ...policyBody }]] as const) {
    for (const step of ['image', 'create network', 'start main', 'address']) {
      await using bench = new Bench()
      let away = false
      bench.engine.before = (call) => { if ((away ||= call === step)) throw new EngineError('connect ENOENT /var/run/docker.sock', 0) }
      const answer = await bench.call('POST', '/sandboxes', body)
      t.match(answer, { status: 503, body: { code: 'DOCKER::SANDBOX_START_FAILED', message: 'The Docker engine cannot be reached.' } }, `${name}: at ${step}`)
      bench.engine.before = () => undefined
      await bench.groups.sweep(true)
      t.same([bench.engine.kept.size, bench.groups.list(), bench.store.all()], [0, [], []], `${name}: at ${step}: nothing is left`)
    }
  }
})

t.test('the gate does not confirm: main never exists', async (t) => {
  await using bench = new Bench({ confirm: async () => { throw new Error('no rules') } })
  t.equal((await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody })).status, 500)
  t.notOk(bench.engine.calls.includes('create main'))
  t.equal(bench.engine.kept.size, 0)
})

t.test('a policy too large for an environment string is handed over before main exists', async (t) => {
  const rule = (n: number) => ({ action: 'allow', target: `host-${n}.${'long.'.repeat(10)}example` })
  const late: (number | undefined)[] = []
  await using bench = new Bench({ confirm: async (_address, _token, policy) => {
    late.push(policy?.egress.length)
    t.notOk(bench.engine.calls.includes('create main'))
  } })
  await bench.create({ networkPolicy: { defaultAction: 'allow', egress: Array.from({ length: 2000 }, (_, n) => rule(n)) } })
  t.match([...bench.engine.kept.values()].map((kept) => kept.spec.env.join('\n')).join(), /OPENSANDBOX_EGRESS_RULES=\{"defaultAction":"deny","egress":\[\]\}/, 'it starts by denying everything')
  t.same(late, [2000])
  bench.engine.calls.length = 0
  await bench.create({ networkPolicy: { egress: Array.from({ length: 1000 }, (_, n) => rule(n)) } })
  t.same(late, [2000, undefined], 'a smaller one it is started with')
})

/** Words of Docker 20.10. What is not known to be harmless is not passed on. */
t.test('the engine refuses, and clients hear it in our words', async (t) => {
  const runc = 'failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: '
  const cases: [call: string, status: number, text: string, answer: number, message: string | RegExp][] = [
    ['create main', 400, 'Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available', 400, /^resourceLimits\.cpu: /],
    ['create main', 400, 'Minimum memory limit allowed is 6MB', 400, /^resourceLimits\.memory: /],
    ['start main', 500, 'could not select device driver "" with capabilities: [[gpu]]', 400, /^resourceLimits\.gpu: /],
    ['start main', 400, `${runc}exec: "/nope": stat /nope: no such file or directory: unknown`, 400, 'entrypoint[0]: names no program of this image'],
    ['start main', 400, `${runc}exec: "nope": executable file not found in $PATH: unknown`, 400, 'entrypoint[0]: names no program of this image'],
    ['start main', 400, `${runc}exec: "/etc": permission denied: unknown`, 400, 'entrypoint[0]: names nothing of this image that can be run'],
    ['start main', 400, `${runc}exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory: unknown`, 400, 'entrypoint[0]: names nothing of this image that can be run'],
    ['create main', 400, 'invalid mount config for /var/lib/secret', 500, 'The sandbox could not be started.'],
    ['start main', 500, 'open /var/lib/docker/overlay2/secret: no such file or directory', 500, 'The sandbox could not be started.'],
    ['create egress', 400, 'invalid CapDrop: unknown capability: "secret"', 500, 'The egress sidecar could not be started.'],
    ['start egress', 400, `${runc}exec: "node": executable file not found in $PATH: unknown`, 500, 'The egress sidecar could not be started.'],
    ['pull far/away:1', 500, 'Get "https://secret.example/v2/": dial tcp: lookup secret.example on 198.51.100.53:53: no such host', 500, 'Failed to pull image far/away:1: the registry cannot be reached.'],
    ['pull far/away:1', 404, 'pull access denied for far/away, repository does not exist or may require docker login: denied: requested access to the resource is denied', 500, /: there is no such image, or these credentials may not pull it\.$/],
    ['pull far/away:1', 500, 'Get "https://secret.example/v2/x/manifests/1": unauthorized: incorrect username or password', 500, /: the registry does not take these credentials\.$/],
    ['pull far/away:1', 404, 'manifest for far/away:1 not found: manifest unknown: manifest unknown', 500, /: there is no such tag or digest\.$/],
    ['pull far/away:1', 500, 'toomanyrequests: You have reached your pull rate limit', 500, /: the registry limits pulls/],
    ['pull far/away:1', 500, 'write /var/lib/docker/tmp/secret: no space left on device', 500, /: the machine has no room for it\.$/],
    ['pull far/away:1', 500, 'something secret', 500, 'Failed to pull image far/away:1: the engine could not pull it.'],
    ['pull registry.internal/egress:1', 500, 'something secret', 500, 'Failed to pull image of the egress sidecar: the engine could not pull it.'],
  ]
  for (const [call, status, text, answer, message] of cases) {
    await using bench = new Bench({ toml: gatewayToml.replace('egress:1', 'registry.internal/egress:1') })
    if (!call.includes('registry.internal')) bench.engine.images.add('registry.internal/egress:1')
    bench.engine.before = (each) => { if (each === call) throw new EngineError(text, status) }
    const got = await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody, ...(call.includes('far/away') ? { image: { uri: 'far/away:1' } } : {}) })
    t.match(got, { status: answer, body: { message } }, `${call}: ${text}`)
    t.notMatch(got.body.message, /secret|198\.51\.100|registry\.internal|runc/, 'nothing of the engine')
    t.equal(bench.engine.kept.size, 0, 'nothing is left')
  }
})

t.test('what the machine can never give is refused before anything is written or made', async (t) => {
  const cases: [why: string, more: object, message: string | null][] = [
    ['another processor', { platform: { os: 'linux', arch: 'arm64' } }, 'platform.arch: this machine runs amd64 only'],
    ['its own', { platform: { os: 'linux', arch: 'amd64' } }, null],
    ['more CPUs than it has', { resourceLimits: { cpu: '2001m' } }, 'resourceLimits.cpu: is more than the 2 CPUs of this machine'],
    ['all of them', { resourceLimits: { cpu: '2' } }, null],
    ['both', { platform: { os: 'linux', arch: 'arm64' }, resourceLimits: { cpu: '100000' } }, 'platform.arch: this machine runs amd64 only; resourceLimits.cpu: is more than the 2 CPUs of this machine'],
    ['less memory than a container needs', { resourceLimits: { memory: '5Mi' } }, 'resourceLimits.memory: must be an amount like 512Mi or 2Gi, at least 6Mi'],
  ]
  for (const [why, more, message] of cases) {
    await using bench = new Bench()
    const got = await bench.call('POST', '/sandboxes', { ...createBody, ...more })
    if (message === null) {
      t.equal(got.status, 202, why)
      continue
    }
    t.match(got, { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER', message } }, why)
    t.same(bench.engine.calls.filter((call) => call !== 'machine'), [], `${why}: the engine was asked for nothing`)
    t.same(bench.store.all(), [])
  }
  await using bench = new Bench()
  bench.engine.before = (call) => { if (call === 'machine') throw new EngineError('boom', 500) }
  t.equal((await bench.call('POST', '/sandboxes', { ...createBody, resourceLimits: { cpu: '99' } })).status, 202, 'an engine that does not tell decides itself')
})

t.test('a start that never answers: the sandbox can be deleted, and expires', async (t) => {
  for (const role of ['egress', 'main']) {
    for (const how of ['deleted', 'expired', 'the server ends'] as const) {
      await using bench = new Bench({ toml: atOnce })
      const hung = Promise.withResolvers<void>()
      bench.engine.before = (call) => {
        if (call !== `start ${role}`) return undefined
        hung.resolve()
        return new Promise(() => undefined)
      }
      const answer = await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody })
      t.match(answer, { status: 202, body: { status: { state: 'Pending' } } })
      await hung.promise
      if (how === 'deleted') t.equal((await bench.call('DELETE', `/sandboxes/${answer.body.id}`)).status, 204)
      if (how === 'expired') {
        const gone = Promise.withResolvers<void>()
        bench.engine.after = (call) => { if (call === 'remove egress') gone.resolve() }
        bench.clock.now += 600_001
        await gone.promise
      }
      await bench.groups.close(0)
      t.equal((await bench.call('GET', `/sandboxes/${answer.body.id}`)).status, 404, `${how} while ${role} starts`)
      t.equal(bench.engine.kept.size, 0, `${how} while ${role} starts: no container`)
      t.same(bench.store.all(), [], 'no record')
    }
  }
})

/**
 * A server killed after any engine call, in any create: the call has taken effect or not, the server never hears of it.
 * The next one finds its store and the engine as they are.
 */
t.test('killed between any two steps', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-kill-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  let points = 0
  for (const when of ['before', 'after'] as const) {
    for (let killAt = 1; ; killAt++) {
      const store = join(folder, `${when}-${killAt}.db`)
      const engine = new FakeEngine()
      const first = new Bench({ store, engine })
      let calls = 0
      const killed = Promise.withResolvers<void>()
      engine[when] = () => {
        if (++calls < killAt) return undefined
        killed.resolve()
        return new Promise(() => undefined)
      }
      const created = first.call('POST', '/sandboxes', { ...createBody, ...policyBody }).then((answer) => answer.status)
      const outcome = await Promise.race([created, killed.promise])
      engine.before = engine.after = () => undefined
      // What a kill leaves: the file, not the process. The hung create of the first server never goes on.
      first.abandon()
      await using second = new Bench({ store, engine })
      second.groups.load()
      await second.groups.sweep(true)
      const [record] = second.store.all()
      const roles = [...engine.kept.values()].map((kept) => kept.spec.labels['sallyport.io/role']).sort()
      const complete = record?.phase === 'ready' && roles.join() === 'egress,main'
      t.ok(complete || (record === undefined && roles.length === 0), `${when} call ${killAt}: complete or gone`, { record, roles })
      points++
      if (outcome === 202) break
    }
  }
  t.ok(points > 15, `${points} kill points`)
})

t.test('a promised sandbox that fails stays visible with its cause', async (t) => {
  await using bench = new Bench({ toml: atOnce })
  const gate = Promise.withResolvers<void>()
  bench.engine.before = async (call) => { if (call === 'start main') { await gate.promise; throw new EngineError('boom', 500) } }
  const answer = await bench.call('POST', '/sandboxes', createBody)
  t.match(answer, { status: 202, body: { status: { state: 'Pending' } } })
  gate.resolve()
  await bench.groups.close(5000)
  t.match((await bench.call('GET', `/sandboxes/${answer.body.id}`)).body.status, { state: 'Failed', reason: 'DOCKER::SANDBOX_START_FAILED', message: 'The sandbox could not be started.' })
  t.equal(bench.engine.kept.size, 0, 'nothing else is left of it')
})

t.test('deleted while it is made', async (t) => {
  await using bench = new Bench({ confirm: (_address, _token, _late, signal) => new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason))) })
  const created = bench.call('POST', '/sandboxes', { ...createBody, ...policyBody })
  const seen = Promise.withResolvers<void>()
  bench.engine.after = (call) => { if (call === 'address') seen.resolve() }
  await seen.promise
  const id = bench.groups.list()[0]!.record.id
  t.equal((await bench.call('DELETE', `/sandboxes/${id}`)).status, 204)
  t.equal((await created).status, 500)
  t.equal(bench.engine.kept.size, 0)
})

t.test('the sidecar ends: so does the sandbox, with the reason', async (t) => {
  for (const how of ['exits', 'is removed'] as const) {
    await using bench = new Bench()
    const id = await bench.create(policyBody)
    if (how === 'exits') bench.engine.end(bench.engine.find('egress'), 137)
    else bench.engine.kept.delete(bench.engine.find('egress'))
    bench.groups.touch(id)
    await bench.groups.close(5000)
    t.match((await bench.call('GET', `/sandboxes/${id}`)).body.status, { state: 'Failed', reason: 'EGRESS_GONE' }, how)
    t.equal(bench.engine.kept.size, 0, how)
  }
})

t.test('the sidecar was started again while nobody listened: it has a new namespace, the sandbox is left in the old one', async (t) => {
  await using bench = new Bench()
  const [lost, kept] = [await bench.create(policyBody), await bench.create(policyBody)]
  bench.engine.restarted(bench.engine.find('egress'))
  await bench.groups.sweep(false)
  t.equal((await bench.call('GET', `/sandboxes/${lost}`)).body.status.state, 'Running', 'the list does not tell')
  await bench.groups.sweep(true)
  t.match((await bench.call('GET', `/sandboxes/${lost}`)).body.status, { state: 'Failed', reason: 'EGRESS_GONE' })
  t.equal((await bench.call('GET', `/sandboxes/${kept}`)).body.status.state, 'Running', 'the other goes on')
  t.equal(bench.engine.kept.size, 2, 'with its two containers, the only ones')
})

t.test('the main container ends: the sandbox is Terminated or Failed, its sidecar goes', async (t) => {
  for (const [code, state] of [[0, 'Terminated'], [127, 'Failed']] as const) {
    await using bench = new Bench()
    const id = await bench.create(policyBody)
    bench.engine.end(bench.engine.find('main'), code)
    await bench.groups.sweep(true)
    t.equal((await bench.call('GET', `/sandboxes/${id}`)).body.status.state, state)
    t.equal(bench.engine.find('egress'), '')
    t.equal((await bench.call('DELETE', `/sandboxes/${id}`)).status, 204)
  }
})

t.test('containers of ours without a record', async (t) => {
  const engine = new FakeEngine()
  const lost = new Bench({ engine })
  const id = await lost.create({ ...policyBody, metadata: { a: 'b' } })
  const orphan = await lost.create(policyBody)
  const main = [...engine.kept].find(([, kept]) => kept.spec.labels['opensandbox.io/id'] === orphan)![0]
  engine.kept.delete(main)
  lost.abandon()
  await using bench = new Bench({ engine })
  await bench.groups.sweep(true)
  t.match((await bench.call('GET', `/sandboxes/${id}`)).body, { metadata: { a: 'b' }, expiresAt: '2026-01-01T00:10:00.000Z' }, 'a complete one is taken back')
  t.equal(bench.groups.get(id).record.accessEpoch, bench.clock.now / 1000, 'nobody knows which of its access tokens were revoked: all are')
  t.equal((await bench.call('GET', `/sandboxes/${orphan}`)).status, 404)
  t.equal(engine.kept.size, 2, 'what is left of another is removed')
})

t.test('other instances are left alone', async (t) => {
  await using bench = new Bench()
  await bench.create()
  const [, kept] = [...bench.engine.kept][0]!
  bench.engine.kept.set('other', { ...kept, spec: { ...kept.spec, labels: { ...kept.spec.labels, 'sallyport.io/instance': 'another', 'opensandbox.io/id': 'x', 'sallyport.io/group': 'y' } } })
  await bench.groups.sweep(true)
  t.ok(bench.engine.kept.has('other'))
  t.equal(bench.groups.list().length, 1)
})

t.test('expiry', async (t) => {
  await using bench = new Bench()
  const id = await bench.create(policyBody)
  const renewed = await bench.create()
  await bench.call('POST', `/sandboxes/${renewed}/renew-expiration`, { expiresAt: '2026-06-01T00:00:00Z' })
  bench.clock.now += 600_001
  const gone = Promise.withResolvers<void>()
  bench.engine.after = (call) => { if (call === 'remove egress') gone.resolve() }
  await gone.promise
  await bench.groups.close(5000)
  t.equal((await bench.call('GET', `/sandboxes/${id}`)).status, 404)
  t.equal((await bench.call('GET', `/sandboxes/${renewed}`)).status, 200)
  t.equal(bench.engine.kept.size, 1)
})

t.test('a renewal while it expires: whoever was answered lives, whoever does not is told', async (t) => {
  const renew = (bench: Bench, id: string) => bench.call('POST', `/sandboxes/${id}/renew-expiration`, { expiresAt: '2026-06-01T00:00:00Z' })
  await using bench = new Bench()
  const [id, other] = [await bench.create(policyBody), await bench.create(policyBody)]
  bench.clock.now += 599_999
  t.equal((await renew(bench, other)).status, 200, 'in the last millisecond')
  bench.clock.now += 1
  const [begun, go] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()]
  bench.engine.before = async (call) => { if (call === 'list') { begun.resolve(); await go.promise } }
  t.equal((await renew(bench, id)).status, 404, 'its time is over')
  bench.groups.tick()
  await begun.promise
  t.match(await renew(bench, id), { status: 404, body: { code: 'DOCKER::SANDBOX_NOT_FOUND' } }, 'it is being removed')
  go.resolve()
  await bench.due()
  t.same(bench.groups.list().map(({ record }) => record.id), [other])
})

t.test('a pull is shared, holds nobody else up, and everybody who waits for it hears how far it is', async (t) => {
  await using bench = new Bench({ toml: atOnce })
  const [begun, over] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()]
  bench.engine.before = (call) => {
    if (!call.startsWith('pull')) return undefined
    begun.resolve()
    return over.promise
  }
  const pending = async (): Promise<string> => (await bench.call('POST', '/sandboxes', { ...createBody, image: { uri: 'far/away' } })).body.id
  const says = async (id: string): Promise<string> => (await bench.call('GET', `/sandboxes/${id}`)).body.status.message
  const first = await pending()
  await begun.promise
  t.equal(await says(first), 'Pulling image far/away: asking the registry.')
  bench.engine.pulling({ id: 'a', status: 'Downloading', progressDetail: { current: 3_000_000, total: 9_000_000 } })
  t.equal(await says(first), 'Pulling image far/away: 0 of 1 layers are here, 3 of 9 MB.')
  const others = [await pending(), await pending()]
  await bench.due()
  for (const other of others) t.equal(await says(other), await says(first), 'one that came later is as far')

  const [waiting] = await Promise.all([bench.create(), bench.create(policyBody)])
  await bench.due()
  t.equal((await bench.call('GET', `/sandboxes/${waiting}`)).body.status.state, 'Running', 'a create that needs no pull is not held up')
  t.equal((await bench.call('GET', '/health')).status, 200)
  t.equal((await bench.call('DELETE', `/sandboxes/${others[1]}`)).status, 204, 'one that waits can be deleted')

  over.resolve()
  await bench.due()
  for (const id of [first, others[0]!]) t.equal((await bench.call('GET', `/sandboxes/${id}`)).body.status.state, 'Running')
  t.equal(bench.engine.calls.filter((call) => call === 'pull far/away:latest').length, 1)
})

t.test('a failed sandbox keeps its cause for PENDING_FAILURE_TTL, but no longer than it would have lived', async (t) => {
  const cases: [why: string, timeout: number, kept: number][] = [['kept as long as configured', 600, 300], ['it would have ended before', 120, 120]]
  for (const [why, timeout, kept] of cases) {
    await using bench = new Bench({ toml: atOnce, env: { PENDING_FAILURE_TTL: '300' } })
    const gate = Promise.withResolvers<void>()
    bench.engine.before = async (call) => { if (call === 'start main') { await gate.promise; throw new EngineError('boom', 500) } }
    const id = await bench.create({ timeout })
    gate.resolve()
    await bench.due()
    bench.clock.now += kept * 1000 - 1
    await bench.due()
    t.match((await bench.call('GET', `/sandboxes/${id}`)).body.status, { state: 'Failed', reason: 'DOCKER::SANDBOX_START_FAILED', message: 'The sandbox could not be started.' }, why)
    bench.clock.now += 1
    await bench.due()
    t.equal((await bench.call('GET', `/sandboxes/${id}`)).status, 404, why)
    t.same(bench.store.all(), [], why)
  }
})

t.test('the store was lost, in direct mode: every published port is known again', async (t) => {
  const toml = '[server]\nhost = "127.0.0.1"\napi_key = "k1"\n[runtime]\nexecd_image = "execd:1"\n[egress]\nimage = "egress:1"\ndns_upstreams = ["198.51.100.53"]\n'
  const engine = new FakeEngine()
  engine.images.add('execd:1')
  for (const file of ['/execd', '/bootstrap.sh']) engine.files.set(file, 'x')
  const lost = new Bench({ toml, engine })
  const id = await lost.create(policyBody)
  const endpoints = async (bench: Bench): Promise<unknown[]> => Promise.all([8080, 44772, 18080].map(async (port) => (await bench.call('GET', `/sandboxes/${id}/endpoints/${port}`)).body))
  const before = await endpoints(lost)
  t.match(before[2], { endpoint: /^127\.0\.0\.1:\d+$/, headers: { 'OPENSANDBOX-EGRESS-AUTH': /./ } })
  lost.abandon()
  await using bench = new Bench({ toml, engine })
  await bench.groups.sweep(true)
  t.same(await endpoints(bench), before)
})

t.test('what the server itself starts is no news to it', async (t) => {
  await using bench = new Bench()
  const told: Touch[] = ['started', 'changed']
  for (const what of told) {
    bench.engine.calls.length = 0
    bench.engine.after = (call) => { if (call === 'start main') bench.groups.touch(bench.groups.list()[0]!.record.id, what) }
    const id = await bench.create()
    bench.engine.after = () => undefined
    await bench.call('DELETE', `/sandboxes/${id}`)
    t.equal(bench.engine.calls.filter((call) => call === 'list').length, what === 'started' ? 1 : 2, `${what}: looked at before it is removed, and otherwise only when there is news`)
  }
})
