/** The lifecycle server on a real engine: what ends a sandbox, what leaves it alone, and what is left afterwards. */
import { once } from 'node:events'
import { createServer } from 'node:net'
import { execa } from 'execa'
import t from 'tap'
import { request } from 'undici'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { createNetwork, docker, exec } from '#test/support/containers.ts'
import type { Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { ignoreGone } from '#test/support/leftovers.ts'
import { startStack, type Sandbox } from '#test/support/stack.ts'

t.setTimeout(600_000)
await needs('root', 'docker', 'nft')

/** Nothing here leaves the sandboxes' own bridge, so no internet is needed. */
const nowhere = { dns: '198.51.100.53:53', fence: async () => undefined } as Pick<Internet, 'dns' | 'fence'> as Internet
const policy = { networkPolicy: { egress: [] } }

t.test('what ends a sandbox', { timeout: 180_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  const state = async (sandbox: Sandbox): Promise<string> => {
    const found = await stack.api.get(sandbox.id)
    return found === undefined ? 'gone' : `${found.status.state} ${found.status.reason}`
  }
  const becomes = async (sandbox: Sandbox, wanted: string, why: string): Promise<void> => {
    const last = await eventually(why, async () => ((await state(sandbox)) === wanted ? wanted : undefined), 30).catch(() => state(sandbox))
    t.equal(await last, wanted, why)
  }

  const guarded = await stack.create(policy)
  t.match((await guarded.run(['curl', '-s', '-m', '3', 'http://127.0.0.1:8080/'])).stdout, /./, 'its own loopback works')
  await docker.getContainer(guarded.sidecar!).kill()
  await becomes(guarded, 'Failed EGRESS_GONE', 'its sidecar was killed')
  t.equal((await stack.containers()).length, 0, 'and nothing of it runs on')
  await guarded.remove()
  await becomes(guarded, 'gone', 'then it was deleted')

  await t.test('its main container removed by hand: the sandbox is gone, with its sidecar', async (t) => {
    const byHand = await stack.create(policy)
    await docker.getContainer(byHand.main).remove({ force: true })
    await becomes(byHand, 'gone', 'as clients see it')
    t.same((await stack.containers()).map(({ Names }) => Names), [])
  })

  for (const [code, wanted] of [['0', 'Terminated CONTAINER_EXITED'], ['3', 'Failed CONTAINER_EXITED_ERROR']] as const) {
    const ending = await stack.create({ ...policy, entrypoint: ['sh', '-c', `sleep 2; exit ${code}`] })
    await becomes(ending, wanted, `its program ended with ${code}`)
    await eventually('its sidecar goes', async () => ((await stack.containers()).some((container) => container.Id === ending.sidecar) ? undefined : true))
  }

  const paused = await stack.create(policy)
  await stack.api.call('POST', `/v1/sandboxes/${paused.id}/pause`)
  t.equal(await state(paused), 'Paused CONTAINER_PAUSED')
  await docker.getContainer(paused.main).unpause()
  await becomes(paused, 'Running CONTAINER_RUNNING', 'resumed by hand')
})

t.test('on time, also when the server was away', { timeout: 180_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  const [short, renewed, missed] = [await stack.create(policy), await stack.create(policy), await stack.create(policy)]
  const renew = async (sandbox: Sandbox, milliseconds: number): Promise<number> => {
    const at = Date.now() + milliseconds
    t.equal((await stack.api.call('POST', `/v1/sandboxes/${sandbox.id}/renew-expiration`, { expiresAt: new Date(at).toISOString() })).status, 200)
    return at
  }
  await renew(renewed, 60_000)
  const end = await renew(short, 2000)
  await eventually('the first expires', async () => ((await stack.api.get(short.id)) === undefined ? true : undefined))
  t.ok(Date.now() - end < 5000, `${Date.now() - end} ms after its time`)
  t.equal((await stack.containers()).length, 4, 'with its containers')

  await renew(missed, 1000)
  await stack.server.stop('SIGKILL')
  await new Promise((resolve) => setTimeout(resolve, 1500))
  await stack.startServer()
  const back = Date.now()
  await eventually('the missed one expires', async () => ((await stack.api.get(missed.id)) === undefined ? true : undefined))
  t.ok(Date.now() - back < 5000, `${Date.now() - back} ms after the server's return`)
  t.equal((await stack.api.get(renewed.id))?.status.state, 'Running', 'the renewed one lives: renewals survive')
})

t.test('metadata survives, and so does the sandbox, when the server stops', { timeout: 180_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  const sandbox = await stack.create({ ...policy, metadata: { a: '1', b: '2' } })
  await stack.api.call('PATCH', `/v1/sandboxes/${sandbox.id}/metadata`, { a: null, c: '3' })
  t.equal(await stack.server.stop('SIGTERM'), 0)
  t.equal((await stack.containers()).filter((container) => container.State === 'running').length, 2, 'sandboxes run on')
  t.match((await execa('nft', ['list', 'table', 'inet', 'sallyport_host'])).stdout, stack.bridge, 'guarded')
  await stack.startServer()
  t.same((await stack.api.get(sandbox.id))?.metadata, { b: '2', c: '3' })
  await sandbox.remove()
  t.equal(await stack.server.stop('SIGTERM'), 0)
  t.equal((await docker.listNetworks()).some((network) => network.Name === stack.network), false, 'the last one takes the network along')
  t.notMatch((await execa('nft', ['list', 'ruleset'])).stdout, stack.bridge, 'and its rules')
})

t.test('what a sandbox reaches without a policy, and with one', { timeout: 180_000 }, async (t) => {
  await using plain = await createNetwork('isolation')
  await using stack = await startStack({ internet: nowhere })
  const service = createServer((socket) => void socket.on('error', () => undefined).end('host')).listen(0, '::')
  t.teardown(() => service.close())
  await once(service, 'listening')
  const port = (service.address() as { port: number }).port
  const loose = await plain.run()
  const published = await plain.run({ Entrypoint: ['node', '/opt/sallyport/app.mjs'], ExposedPorts: { '8080/tcp': {} }, HostConfig: { PortBindings: { '8080/tcp': [{ HostIp: '', HostPort: '' }] } } })
  const publishedPort = (await docker.getContainer(published.id).inspect()).NetworkSettings.Ports['8080/tcp']?.[0]?.HostPort ?? ''
  const [open, guarded, neighbour] = [await stack.create(), await stack.create(policy), await stack.create()]
  const addressOf = async (id: string): Promise<string> => Object.values((await docker.getContainer(id).inspect()).NetworkSettings.Networks)[0]?.IPAddress ?? ''
  const gatewayOf = async (name: string): Promise<string> => (await docker.getNetwork(name).inspect()).IPAM?.Config?.[0]?.Gateway ?? ''
  const own = await gatewayOf(stack.network)
  const neighbourAt = await addressOf(neighbour.main)

  const places: [why: string, from: (network: 'plain' | 'own') => Promise<string>, port: string][] = [
    ['a service of the host, by the gateway of the bridge', (network) => (network === 'plain' ? gatewayOf(plain.name) : Promise.resolve(own)), String(port)],
    ['a service of the host, by another bridge', () => gatewayOf(plain.name), String(port)],
    ['a published port of somebody else', () => gatewayOf(plain.name), publishedPort],
    ['a neighbour', (network) => Promise.resolve(network === 'plain' ? published.address : neighbourAt), '8080'],
  ]
  for (const [why, address, at] of places) {
    // The server in a container needs a moment to listen.
    t.ok(await eventually(`${why}: reached from a plain container`, async () => (await connects(loose.id, await address('plain'), at)) || undefined), `${why}: reached from a plain container`)
    for (const [kind, sandbox] of [['without', open], ['with', guarded]] as const) t.equal(await connects(sandbox.main, await address('own'), at), false, `${why}: not from a sandbox ${kind} a policy`)
  }
  t.equal(await connects(open.main, '127.0.0.1', '8080'), true, 'itself, of course')
  for (const sandbox of [open, guarded]) t.notMatch((await sandbox.run(['cat', '/proc/net/if_inet6'])).stdout, /eth0/, 'no IPv6 towards anybody')

  await t.test("neighbours' names tell no ids", async (t) => {
    const ask = ['python3', '-c', `import socket; print(socket.gethostbyaddr("${neighbourAt}")[0])`]
    const name = (await open.run(ask)).stdout.trim()
    t.match(name, /^sallyport-[0-9a-f]{24}-main\./, 'they are told')
    t.notMatch(name, neighbour.id.slice(0, 8))
  })
  await t.test('what the main container may do', async (t) => {
    const status = (await guarded.run(['cat', '/proc/1/status'])).stdout
    const effective = BigInt(`0x${/^CapBnd:\s*(\w+)/m.exec(status)?.[1]}`)
    t.equal(effective & (1n << 12n), 0n, 'no NET_ADMIN')
    t.equal(effective & (1n << 13n), 0n, 'no NET_RAW')
    t.match(status, /^NoNewPrivs:\s*1/m)
    t.match(status, /^Seccomp:\s*2/m)
    t.not((await guarded.run(['sh', '-c', 'echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6'])).code, 0, 'sysctls cannot be written')
  })
})

t.test('bad requests create nothing', { timeout: 180_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  const body = { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '1'], resourceLimits: {} }
  const cases: [Record<string, unknown>, number][] = [
    [{ ...body, timeout: 1 }, 400], [{ ...body, networkPolicy: { egress: [{ action: 'allow', target: 'http://a' }] } }, 400],
    [{ ...body, resourceLimits: { cpu: '4000' } }, 400], [{ ...body, image: { uri: 'sallyport/none:1' } }, 500], [{ ...body, entrypoint: ['/no/such/program'] }, 400],
  ]
  for (const [given, status] of cases) t.equal((await stack.api.call('POST', '/v1/sandboxes', given)).status, status, JSON.stringify(given))
  t.same([await stack.api.list(), await stack.containers()], [[], []])
  const ready = await request(`${stack.api.url}/health/ready`)
  t.match(await ready.body.json(), { status: 'ready', checks: { isolation: 'isolated', host_guard: 'ok' } })
})

t.test('the policy of a running sandbox', { timeout: 180_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  const sandbox = await stack.create({ networkPolicy: { egress: [{ action: 'allow', target: 'a.example' }] }, entrypoint: ['sleep', '3600'] })
  const path = `/v1/sandboxes/${sandbox.id}/network-policy`
  t.match((await stack.api.call('GET', path)).body, { enforcementMode: 'dns+nft', policy: { defaultAction: 'deny', egress: [{ action: 'allow', target: 'a.example' }] } })
  t.match(await stack.api.call('PATCH', path, [{ action: 'deny', target: 'b.example' }]), { status: 200, body: { policy: { egress: [{ action: 'deny', target: 'b.example' }, { action: 'allow', target: 'a.example' }] } } })
  await docker.getContainer(sandbox.sidecar!).pause()
  await docker.getContainer(sandbox.sidecar!).unpause()
  t.equal((await stack.api.get(sandbox.id))?.status.state, 'Running', 'a sidecar that was held for a moment is still the same')
})

t.test('an egress image that holds nothing back is found out', { timeout: 180_000 }, async (t) => {
  await using image = await commitImage({ ENTRYPOINT: ['node', '-e', 'require("http").createServer((request, response) => response.end("ok")).listen(18080)'] })
  await using stack = await startStack({ internet: nowhere, config: { egress: { image: image.name } } })
  const reply = await stack.api.call('POST', '/v1/sandboxes', { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '1'], resourceLimits: {}, ...policy })
  t.match(reply, { status: 500, body: { code: 'DOCKER::SANDBOX_START_FAILED', message: /does not hold a sandbox back/ } })
  t.same([await stack.api.list(), await stack.containers()], [[], []], 'and nothing of it is left')
  await stack.create({ entrypoint: ['sleep', '3600'] })
  t.equal((await stack.containers()).length, 1, 'without a policy nobody relies on it')
})

t.test('a sidecar that ends at once: how is answered, why stands in the log', { timeout: 180_000 }, async (t) => {
  await using image = await commitImage({ ENTRYPOINT: ['node', '-e', 'console.log(JSON.stringify({ level: "fatal", msg: "no rights for nft" })); process.exit(77)'] })
  await using stack = await startStack({ internet: nowhere, config: { egress: { image: image.name, probe: 'off' } } })
  const reply = await stack.api.call('POST', '/v1/sandboxes', { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '1'], resourceLimits: {}, ...policy })
  t.match(reply, { status: 500, body: { code: 'DOCKER::SANDBOX_START_FAILED', message: 'The egress sidecar ended with exit code 77 before the sandbox was complete.' } })
  const line = await eventually('the failure is logged', async () => /\{[^\n]*"create-failed"[^\n]*\}/.exec(stack.server.log())?.[0])
  t.match(JSON.parse(line), { sidecar_exit_code: 77, sidecar_log: 'no rights for nft' })
  t.same(await stack.containers(), [])
})

t.test('an egress image that is no sidecar: the proof says so', { timeout: 180_000 }, async (t) => {
  await using image = await commitImage({ ENTRYPOINT: ['node', '-e', 'console.log("waiting for work"); setInterval(() => undefined, 1000)'] })
  await using stack = await startStack({ internet: nowhere, config: { egress: { image: image.name, ready_seconds: 1 } } })
  const reply = await stack.api.call('POST', '/v1/sandboxes', { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '1'], resourceLimits: {}, ...policy })
  t.match(reply, { status: 500, body: { code: 'DOCKER::SANDBOX_START_FAILED', message: /^Egress sidecar did not become ready within 1s/ } })
  const line = await eventually('the failure is logged', async () => /\{[^\n]*"egress-probe-failed"[^\n]*\}/.exec(stack.server.log())?.[0])
  t.match(JSON.parse(line), { error: /^Egress sidecar did not become ready within 1s/, sidecar_exit_code: null, sidecar_log: 'waiting for work' })
  t.notMatch(stack.server.log(), /orphan-removed/)
  t.same(await stack.containers(), [])
})

t.test('its image removed by hand: a sandbox goes on, is told and can be deleted; the next create hears that there is no such image', { timeout: 180_000 }, async (t) => {
  await using image = await commitImage({ ENTRYPOINT: [] })
  await using stack = await startStack({ internet: nowhere })
  const options = { image: { uri: image.name }, entrypoint: ['sleep', '3600'], ...policy }
  const sandbox = await stack.create(options)
  await docker.getImage(image.name).remove({ force: true })
  await stack.server.stop('SIGKILL')
  await stack.startServer()
  t.match(await stack.api.get(sandbox.id), { image: { uri: image.name }, status: { state: 'Running' } })
  t.match(await stack.api.list(), [{ id: sandbox.id, status: { state: 'Running' } }])
  for (const verb of ['pause', 'resume']) t.equal((await stack.api.call('POST', `/v1/sandboxes/${sandbox.id}/${verb}`)).status, 202, verb)
  t.match(await stack.api.call('POST', '/v1/sandboxes', { resourceLimits: {}, ...options }), { status: 500, body: { code: 'DOCKER::SANDBOX_IMAGE_PULL_FAILED', message: new RegExp(`^Failed to pull image ${image.name}: `) } })
  await sandbox.remove()
  t.same(await stack.containers(), [])
})

t.test('labels', { timeout: 180_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  const sandbox = await stack.create({ ...policy, metadata: { team: 'x' } })
  const { Config, Name } = await docker.getContainer(sandbox.main).inspect()
  t.match(Config.Labels, { [labels.id]: sandbox.id, [labels.expiresAt]: /\+00:00$/, [labels.instance]: stack.instance, [labels.role]: 'main', team: 'x', [labels.egressAuthToken]: /./ })
  t.notMatch(Name, sandbox.id.slice(0, 8))
})

/** An image like the sandbox's, with another entry. */
async function commitImage(changes: Readonly<Record<string, unknown>>): Promise<{ name: string } & AsyncDisposable> {
  const [repo, tag] = ['sallyport/test-no-guard', String(process.pid)]
  const base = await docker.createContainer({ Image: 'sallyport/sandbox:local' })
  await base.commit({ repo, tag, changes: Object.entries(changes).map(([key, value]) => `${key} ${JSON.stringify(value)}`) })
  await base.remove()
  return { name: `${repo}:${tag}`, [Symbol.asyncDispose]: async () => void (await docker.getImage(`${repo}:${tag}`).remove({ force: true }).catch(ignoreGone)) }
}

async function connects(container: string, address: string, port: string): Promise<boolean> {
  const script = `import socket; socket.create_connection(("${address}",${port}),timeout=1)`
  return (await exec(container, ['python3', '-c', script], 5)).code === 0
}
