/** Server and gateway as containers, started as `deploy/docker/compose.yaml` says: a sandbox is made and reached through them, and nothing stays. */
import { execa } from 'execa'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { parse, stringify } from 'smol-toml'
import t from 'tap'
import { request } from 'undici'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { createApi, type SandboxBody } from '#test/support/api.ts'
import { readCompose } from '#test/support/compose.ts'
import { docker, sandboxImage } from '#test/support/containers.ts'
import { fetchThrough, openDoor } from '#test/support/doors.ts'
import { ignoreGone, namePrefix, ownerLabel } from '#test/support/leftovers.ts'
import { eventually, freePort, root } from '#test/support/program.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

const compose = readFileSync(path.join(root, 'deploy/docker/compose.yaml'), 'utf8')

t.test('compose.yaml gives each as little as it needs', async (t) => {
  const services = readCompose(compose, { SALLYPORT_STATE: '/state' })
  t.strictSame([...services.keys()], ['server', 'gateway'])
  const { server, gateway } = Object.fromEntries(services) as Record<string, { Cmd: string[]; HostConfig: Record<string, unknown> }>
  t.match(server!.HostConfig, { NetworkMode: 'host', CapDrop: ['ALL'], CapAdd: ['NET_ADMIN'], ReadonlyRootfs: true, SecurityOpt: ['no-new-privileges:true'], Binds: ['/var/run/docker.sock:/var/run/docker.sock', '/state:/state'] })
  t.match(gateway!.HostConfig, { NetworkMode: 'host', CapDrop: ['ALL'], CapAdd: [], ReadonlyRootfs: true, Binds: ['/state/route-token:/state/route-token:ro', '/state/access-keys:/state/access-keys:ro'] })
  t.strictSame((gateway!.HostConfig['Binds'] as string[]).filter((bind) => bind.includes('docker.sock')), [], 'the gateway holds no Docker socket')
  t.ok(['--port=28888', '--server-url=http://127.0.0.1:8080'].every((flag) => gateway!.Cmd.includes(flag)), 'the ports of a fresh config.toml')
  t.throws(() => readCompose(compose, {}), /SALLYPORT_STATE is not set/)
  t.throws(() => readCompose(compose.replace('read_only: true', 'privileged: true'), { SALLYPORT_STATE: '/state' }), /what is privileged/)
})

t.test('a sandbox through both', async (t) => {
  const folder = mkdtempSync(path.join(tmpdir(), `${namePrefix}${process.pid}-containers`))
  const name = path.basename(folder)
  const bridge = `spt-${name.slice(-6)}`
  const ports = { server: await freePort(), gateway: await freePort() }
  t.teardown(() => rmSync(folder, { recursive: true }))
  t.teardown(() => docker.getNetwork(name).remove().catch(ignoreGone))
  await execa(process.execPath, ['deploy/images.ts', 'gateway', 'server'], { cwd: root, timeout: 100_000 })
  const apiKey = await prepare(folder, { name, bridge, ports })

  const services = readCompose(compose, { SALLYPORT_STATE: folder, SALLYPORT_SERVER_PORT: String(ports.server), SALLYPORT_GATEWAY_PORT: String(ports.gateway) })
  const started = new Map<string, Awaited<ReturnType<typeof docker.createContainer>>>()
  t.teardown(async () => void (await Promise.all([...started.values()].map((container) => container.remove({ force: true, v: true })))))
  t.teardown(() => removeSandboxes(name))
  // Both at once, as compose does: the gateway waits for its server by itself.
  for (const [service, options] of services) {
    const container = await docker.createContainer({ ...options, name: `${name}-${service}`, Labels: { [ownerLabel]: String(process.pid) } })
    started.set(service, container)
    await container.start()
  }
  const words = async (): Promise<string> => (await Promise.all([...started.values()].map((container) => container.logs({ stdout: true, stderr: true, tail: 20 })))).join('\n')
  const gateway = `127.0.0.1:${ports.gateway}`
  await eventually('both are ready', () => isReady(`http://127.0.0.1:${ports.server}/health/ready`, `http://${gateway}/status.ok`), 30).catch(async (error: Error) => Promise.reject(new Error(`${error.message}\n${await words()}`)))
  t.match((await execa`nft list table inet sallyport_host`).stdout, /set bridges/, 'the guard is in the host\'s kernel')

  const api = createApi(`http://127.0.0.1:${ports.server}`, apiKey)
  const body = { image: { uri: sandboxImage }, entrypoint: ['node', '/opt/sallyport/app.mjs'], resourceLimits: {}, timeout: 600, networkPolicy: { egress: [] } }
  const made = await api.call<SandboxBody>('POST', '/v1/sandboxes', body)
  t.equal(made.status, 202, 'created', { made, words: await words() })
  const door = openDoor('wildcard', gateway, made.body.id, 8080)
  const said = await eventually('the sandbox answers', async () => fetchThrough(door, '/').then((answer) => (answer.status === 200 ? answer.body.toString() : undefined)), 20)
  t.match(said, /^sallyport sandbox/, 'reached by its host name')
  t.equal((await containersOf(name)).length, 2, 'with a sidecar')

  t.equal((await api.call('DELETE', `/v1/sandboxes/${made.body.id}`)).status, 204)
  t.strictSame(await containersOf(name), [], 'its containers are gone')
  for (const [service, container] of started) {
    await container.stop({ t: 15 })
    t.equal((await container.inspect()).State.ExitCode, 0, `${service} ends well when it is asked to`)
  }
  t.notOk((await docker.listNetworks()).some((network) => network.Name === name), 'the network went with the server')
  t.notMatch((await execa`nft list ruleset`).stdout, bridge, 'and its rules')
})

/** Files as `npm start -- --prepare` writes them, with an instance, network and ports of this test. Returns the API key. */
async function prepare(folder: string, { name, bridge, ports }: { name: string; bridge: string; ports: { server: number; gateway: number } }): Promise<string> {
  await execa(process.execPath, ['deploy/start.ts', '--prepare', '--state', folder], { cwd: root })
  const file = path.join(folder, 'config.toml')
  const config = parse(readFileSync(file, 'utf8')) as Record<string, Record<string, unknown>>
  config['server']!['port'] = ports.server
  config['docker'] = { network_mode: 'bridge', network_name: name, bridge_name: bridge, instance: name }
  config['egress']!['dns_upstreams'] = ['198.51.100.53:53']
  config['ingress']!['gateway'] = { address: `*.sandbox.localhost:${ports.gateway}`, route: { mode: 'wildcard' } }
  writeFileSync(file, stringify(config))
  return String(config['server']!['api_key'])
}

async function isReady(...urls: string[]): Promise<true | undefined> {
  const answers = await Promise.all(urls.map((url) => request(url).then(async ({ statusCode, body }) => (await body.dump(), statusCode === 200), () => false)))
  return answers.every(Boolean) || undefined
}

async function containersOf(instance: string): Promise<string[]> {
  return (await docker.listContainers({ all: true, filters: { label: [`${labels.instance}=${instance}`] } })).map(({ Id }) => Id)
}

/** When the test failed in the middle. */
async function removeSandboxes(instance: string): Promise<void> {
  for (const id of await containersOf(instance)) await docker.getContainer(id).remove({ force: true, v: true }).catch(ignoreGone)
}
