/** What goes to the engine over the wire, and an engine that does not answer. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { mainSpec, type ContainerSpec } from '../../server/container-spec.ts'
import { readCreateRequest } from '../../server/create-request.ts'
import { Docker } from '../../server/docker.ts'
import type { SandboxRecord } from '../../server/group.ts'
import { sidecarSpec } from '../../server/sidecar.ts'
import { createBody, gatewayToml, policyBody, readToml } from './bench.ts'

type Asked = { url: string; body: any; auth: string | undefined }

/** An engine on a port of its own. @param answer null: none, ever */
async function startEngine(t: Test, answer: object | null): Promise<{ engine: (timeout: number) => Docker; asked: Asked[] }> {
  const asked: Asked[] = []
  const server = createServer((request, response) => {
    void request.toArray().then((chunks: Buffer[]) => {
      asked.push({ url: request.url ?? '', auth: request.headers['x-registry-auth'] as string | undefined, body: request.headers['content-type'] === 'application/json' ? JSON.parse(Buffer.concat(chunks).toString()) : null })
      if (answer !== null) response.writeHead(/^.images/.test(request.url ?? '') ? 200 : 201, { 'content-type': 'application/json' }).end(JSON.stringify(answer))
    })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  const engine = (timeout: number): Docker => {
    const before = process.env.DOCKER_HOST
    process.env.DOCKER_HOST = `tcp://127.0.0.1:${(server.address() as AddressInfo).port}`
    try {
      return new Docker(timeout)
    } finally {
      if (before === undefined) delete process.env.DOCKER_HOST
      else process.env.DOCKER_HOST = before
    }
  }
  return { engine, asked }
}

function specs(toml = gatewayToml): ContainerSpec[] {
  const config = readToml(toml)
  const request = readCreateRequest({ ...createBody, ...policyBody }, config, 0)
  const record: SandboxRecord = {
    id: 'a', phase: 'creating', announced: false, reason: null, message: null, createdAt: 0, changedAt: 0, keepUntil: null, expiresAt: null, image: request.image, entrypoint: request.command,
    metadata: null, platform: null, egress: { token: 'token', policy: request.networkPolicy! }, secureAccessToken: null, hostPorts: {}, renewExtendSeconds: null,
  }
  return [sidecarSpec(config, 'i', 'n', record), mainSpec(config, 'i', 'n', record, request, 'owner')]
}

t.test('names are asked for in a random case unless the operator says otherwise', async (t) => {
  const told = (toml?: string): string[] => specs(toml)[0]!.env.filter((entry) => entry.includes('RANDOM_CASE'))
  t.same([told(), told(gatewayToml.replace('[egress]\n', '[egress]\nrandom_case = false\n'))], [[], ['OPENSANDBOX_EGRESS_DNS_RANDOM_CASE=off']])
})

t.test("what a sandbox prints does not fill the host's disk", async (t) => {
  const { engine, asked } = await startEngine(t, { Id: 'c1' })
  for (const spec of specs()) {
    t.equal(await engine(5000).create(spec), 'c1')
    t.same(asked.at(-1)?.body.HostConfig.LogConfig, { Type: 'json-file', Config: { 'max-size': '10m', 'max-file': '2' } }, spec.name)
  }
})

t.test('credentials of a pull', async (t) => {
  const { engine, asked } = await startEngine(t, { status: 'Downloaded' })
  const docker = engine(5000)
  const auth = { username: 'user', password: 'the-password' }
  await docker.pull('registry.example/a:1', { platform: 'linux/amd64', auth }, () => undefined)
  await docker.pull('registry.example/a:1', { platform: null, auth: null }, () => undefined)
  const [first, second] = asked
  t.match(JSON.parse(Buffer.from(first?.auth ?? '', 'base64').toString()), auth, 'go to the engine in a header')
  t.match(first?.url, /fromImage=registry\.example%2Fa(&tag=1|%3A1).*platform=linux%2Famd64|platform=linux%2Famd64.*fromImage=registry/)
  t.notMatch(first?.url, /the-password/, 'never in the request line')
  t.notMatch(Buffer.from(second?.auth ?? '', 'base64').toString(), /the-password/, 'and are not kept for the next')
})

t.test('every call has a time limit', { timeout: 20_000 }, async (t) => {
  const { engine } = await startEngine(t, null)
  const docker = engine(100)
  const calls: [name: string, call: () => Promise<unknown>][] = [
    ['create', () => docker.create(specs()[1]!)], ['start', () => docker.start('c1')], ['list', () => docker.list([])], ['examine', () => docker.examine([])], ['address', () => docker.address('c1')], ['last words', () => docker.lastWords('c1')],
    ['remove', () => docker.remove('c1')], ['pause', () => docker.pause('c1')], ['resume', () => docker.resume('c1')], ['image', () => docker.image('a')], ['machine', () => docker.machine()],
    ['network', () => docker.network('n')], ['read', () => docker.read('c1', '/a')], ['write', () => docker.write('c1', Buffer.alloc(512))],
  ]
  for (const [name, call] of calls) await t.rejects(call(), { name: 'EngineError', status: 0 }, name)
})
