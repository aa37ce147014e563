/**
 * What the original server was seen to answer, call by call, held against ours: status, headers, body, and what Docker has afterwards.
 * `deviation` says where we differ and why; everything else is the original's, field for field. Same set-up as there: direct mode,
 * one API key, execd configured.
 */
import type { ContainerInspectInfo } from 'dockerode'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import type { Reply } from '#test/support/api.ts'
import { docker, sandboxImage } from '#test/support/containers.ts'
import { spyImage } from '#test/support/execd-image.ts'
import { startFence } from '#test/support/fence.ts'
import { startStack, type Stack } from '#test/support/stack.ts'
import { labels } from '#policies/wire.ts'
import { groupHash } from '../../server/ids.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

const timestamp = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3,6})?Z$/
const uuid = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/
const entrypoint = ['tail', '-f', '/dev/null']
const metadata = { team: 'x', 'example.com/k': 'v' }
const body = {
  image: { uri: sandboxImage }, entrypoint, timeout: 600, resourceLimits: { cpu: '500m', memory: '64Mi' }, env: { A: 'b', N: null, EMPTY: '' },
  metadata, extensions: { 'access.renew.extend.seconds': '300' }, unknownField: 1,
}
const egressRules = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'first.example' }] }
const renewal = new Date(Date.now() + 86_400_000).toISOString().slice(0, 19)

type Call = {
  readonly why: string
  readonly method: string
  /** Below /v1; `{id}` is the sandbox without a policy, `{guarded}` the one with. */
  readonly path: string
  readonly send?: unknown
  readonly status: number
  /** Matched with tap's match; `exact` compares every key. */
  readonly body?: unknown
  readonly exact?: boolean
  readonly headers?: Record<string, unknown>
  readonly deviation?: string
}

const calls: Call[] = [
  { why: 'get', method: 'GET', path: '/sandboxes/{id}', status: 200, body: { id: uuid, image: { uri: sandboxImage }, status: { state: 'Running', reason: 'CONTAINER_RUNNING', message: 'Sandbox container is running.', lastTransitionAt: timestamp }, metadata, entrypoint, expiresAt: timestamp, createdAt: timestamp } },
  { why: 'execd keeps its port in the path', method: 'GET', path: '/sandboxes/{id}/endpoints/44772', status: 200, body: { endpoint: '127.0.0.1:{execd}/proxy/44772' }, exact: true },
  { why: 'the application port', method: 'GET', path: '/sandboxes/{id}/endpoints/8080', status: 200, body: { endpoint: '127.0.0.1:{http}' }, exact: true },
  { why: 'the egress port without a sidecar', method: 'GET', path: '/sandboxes/{id}/endpoints/18080', status: 200, body: { endpoint: '127.0.0.1:{execd}/proxy/18080' }, exact: true },
  { why: 'the egress port with a sidecar', method: 'GET', path: '/sandboxes/{guarded}/endpoints/18080', status: 200, body: { endpoint: '127.0.0.1:{egress}', headers: { 'OPENSANDBOX-EGRESS-AUTH': /^[\w-]{32}$/ } }, deviation: "the sidecar's own host port: through execd the sandbox would read the token" },
  { why: 'an endpoint by the server proxy', method: 'GET', path: '/sandboxes/{id}/endpoints/44772?use_server_proxy=true', status: 501, body: { code: 'NOT_IMPLEMENTED', message: /\w/ }, deviation: 'not built yet' },
  { why: 'a signed endpoint', method: 'GET', path: '/sandboxes/{id}/endpoints/44772?expires=1', status: 400, body: { code: 'SANDBOX::API_NOT_SUPPORTED', message: /\w/ } },
  { why: 'no port', method: 'GET', path: '/sandboxes/{id}/endpoints/0', status: 400, body: { code: 'DOCKER::INVALID_PORT', message: /\w/ } },
  { why: 'the server proxy', method: 'GET', path: '/sandboxes/{id}/proxy/9999/x', status: 501, body: { code: 'NOT_IMPLEMENTED', message: /\w/ }, deviation: 'not built yet' },
  { why: 'an unknown id', method: 'GET', path: '/sandboxes/abc', status: 404, body: { code: 'DOCKER::SANDBOX_NOT_FOUND', message: 'Sandbox abc not found.' }, exact: true },
  { why: 'pause', method: 'POST', path: '/sandboxes/{id}/pause', status: 202, body: '', exact: true, headers: { 'content-length': '0' } },
  { why: 'pause again', method: 'POST', path: '/sandboxes/{id}/pause', status: 409, body: { code: 'DOCKER::SANDBOX_NOT_RUNNING', message: /\w/ }, deviation: '409 instead of 500: it is the caller who is wrong' },
  { why: 'endpoints while paused', method: 'GET', path: '/sandboxes/{id}/endpoints/8080', status: 200, body: { endpoint: '127.0.0.1:{http}' }, exact: true },
  { why: 'resume', method: 'POST', path: '/sandboxes/{id}/resume', status: 202, body: '', exact: true, headers: { 'content-length': '0' } },
  { why: 'resume again', method: 'POST', path: '/sandboxes/{id}/resume', status: 409, body: { code: 'DOCKER::SANDBOX_NOT_PAUSED', message: /\w/ } },
  { why: 'renew, with an offset and nanoseconds', method: 'POST', path: '/sandboxes/{id}/renew-expiration', send: { expiresAt: `${renewal}.123456789+08:00` }, status: 200, body: { expiresAt: new Date(Date.parse(`${renewal}+08:00`)).toISOString().replace('.000Z', '.123Z') }, exact: true, deviation: 'milliseconds, where the original keeps microseconds' },
  { why: 'renew into the past', method: 'POST', path: '/sandboxes/{id}/renew-expiration', send: { expiresAt: '2020-01-01T00:00:00Z' }, status: 400, body: { code: 'DOCKER::INVALID_EXPIRATION', message: /\w/ } },
  { why: 'a snapshot', method: 'POST', path: '/sandboxes/{id}/snapshots', send: {}, status: 501, body: { code: 'SNAPSHOT::NOT_IMPLEMENTED', message: /\w/ }, deviation: 'not built yet' },
  { why: 'create of nothing', method: 'POST', path: '/sandboxes', send: {}, status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER', message: /image/ }, deviation: '400 {code, message} instead of 422: no SDK reads the latter, and it echoes secrets' },
  { why: 'a filter that is none', method: 'GET', path: '/sandboxes?metadata=broken', status: 400, body: { code: 'INVALID_METADATA_FORMAT', message: /^Invalid metadata format: bad query field: .broken.$/ } },
]

await t.test('golden transcripts', async (t) => {
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence, config: { runtime: { type: 'docker', execd_image: await spyImage() } } })
  const empty = await stack.api.call('GET', '/v1/sandboxes')
  t.strictSame(empty.body, { items: [], pagination: { page: 1, pageSize: 20, totalItems: 0, totalPages: 0, hasNextPage: false } }, 'an empty list')

  const since = Date.now() / 1000
  const plain = await create(t, stack, {})
  const guarded = await create(t, stack, { networkPolicy: egressRules })
  const ports = await containersAsSeen(t, stack, plain)
  const egress = await sidecarAsSeen(t, stack, guarded)
  await stepsInOrder(t, stack, since, [plain, guarded])
  for (const call of calls) await runCall(t, stack, call, { id: plain, guarded, ...ports, egress })

  const list = await stack.api.call<{ items: { id: string }[] }>('GET', '/sandboxes?pageSize=1')
  t.match(list.body, { items: [{ id: guarded }], pagination: { page: 1, pageSize: 1, totalItems: 2, totalPages: 2, hasNextPage: true } }, 'newest first, also without /v1')
  const gone = await stack.api.call('DELETE', `/v1/sandboxes/${plain}`)
  t.match(gone, { status: 204, body: '' })
  envelope(t, gone, 'delete')
})

async function create(t: Test, stack: Stack, more: object): Promise<string> {
  const reply = await stack.api.call<{ id: string; createdAt: string; expiresAt: string }>('POST', '/v1/sandboxes', { ...body, ...more })
  t.equal(reply.status, 202)
  const { id, createdAt, expiresAt } = reply.body
  t.strictSame(reply.body, { id, status: { state: 'Running', reason: 'CONTAINER_RUNNING', message: 'Sandbox container started successfully.', lastTransitionAt: createdAt }, metadata, expiresAt, createdAt, entrypoint } as unknown, 'create: these fields and no others')
  t.match([id, createdAt, expiresAt], [uuid, timestamp, timestamp])
  t.equal(Date.parse(expiresAt) - Date.parse(createdAt), 600_000)
  envelope(t, reply, 'create')
  return id
}

async function runCall(t: Test, stack: Stack, call: Call, names: Readonly<Record<string, string>>): Promise<void> {
  const fill = (text: string): string => text.replaceAll(/\{(\w+)\}/g, (whole, name: string) => names[name] ?? whole)
  const title = `${call.why}: ${call.method} ${call.path}${call.deviation === undefined ? '' : ` (differs: ${call.deviation})`}`
  const reply = await stack.api.call<unknown>(call.method, `/v1${fill(call.path)}`, call.send)
  t.equal(reply.status, call.status, title, { body: reply.body })
  const wanted = mapTexts(call.body, fill)
  if (call.exact === true) t.strictSame(reply.body, wanted, title)
  else t.match(reply.body, wanted, title)
  if (call.headers !== undefined) t.match(reply.headers, call.headers, title)
  envelope(t, reply, title)
}

function mapTexts(value: unknown, change: (text: string) => string): unknown {
  if (typeof value === 'string') return change(value)
  if (typeof value !== 'object' || value === null || value instanceof RegExp) return value
  if (Array.isArray(value)) return value.map((item) => mapTexts(item, change))
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, mapTexts(inner, change)]))
}

/** On every answer. An error is never empty: a client would take that for success. */
function envelope(t: Test, { status, headers, body }: Reply<unknown>, title: string): void {
  t.match(headers, { vary: 'Origin', 'x-request-id': /^[0-9a-f]{32}$/ }, `${title}: headers`)
  if (status === 204) return
  t.match(headers['content-length'], /^\d+$/, `${title}: length`)
  if (status === 202 && body === '') return
  t.match(headers['content-type'], /^application\/json/, `${title}: JSON`)
  if (status >= 400) t.strictSame(Object.keys(body as object), ['code', 'message'], `${title}: an error of two fields`)
}

async function inspect(stack: Stack, label: string, id: string): Promise<ContainerInspectInfo> {
  const found = (await stack.containers()).find((container) => container.Labels[label] === id)
  return docker.getContainer(found!.Id).inspect()
}

function portsOf({ HostConfig }: ContainerInspectInfo): Record<string, { HostIp?: string; HostPort: string }[]> {
  return HostConfig.PortBindings as Record<string, { HostIp?: string; HostPort: string }[]>
}

async function containersAsSeen(t: Test, stack: Stack, id: string): Promise<{ http: string; execd: string }> {
  const main = await inspect(stack, labels.id, id)
  const { Config, HostConfig } = main
  t.strictSame([Config.Entrypoint, Config.Cmd], [['/opt/opensandbox/bootstrap.sh'], entrypoint])
  t.ok(['A=b', 'EMPTY='].every((entry) => Config.Env.includes(entry)) && !Config.Env.some((entry) => /^N(=|$)/.test(entry)), 'environment: null is left out, empty is kept', { env: Config.Env })
  t.match(HostConfig, { NanoCpus: 500_000_000, Memory: 67_108_864, PidsLimit: 4096, SecurityOpt: ['no-new-privileges:true'] })
  t.strictSame([...(HostConfig.CapDrop ?? [])].sort(), ['AUDIT_WRITE', 'MKNOD', 'NET_ADMIN', 'NET_RAW', 'SYS_ADMIN', 'SYS_MODULE', 'SYS_PTRACE', 'SYS_TIME', 'SYS_TTY_CONFIG'])
  const ports = portsOf(main)
  t.strictSame(Object.keys(ports).sort(), ['44772/tcp', '8080/tcp'])
  const [http, execd] = ['8080/tcp', '44772/tcp'].map((name) => ports[name]![0]!)
  for (const port of [http, execd]) {
    t.equal(port!.HostIp, '127.0.0.1', "published on server.host (differs: the original's 0.0.0.0 shows every sandbox to the network)")
    t.ok(Number(port!.HostPort) >= 40_000 && Number(port!.HostPort) <= 60_000)
  }
  const { expiresAt } = (await stack.api.get(id))!
  t.match(Config.Labels, {
    [labels.id]: id, [labels.embeddingProxyPort]: execd!.HostPort, [labels.httpPort]: http!.HostPort, [labels.accessRenewExtendSeconds]: '300', ...metadata,
    [labels.expiresAt]: expiresAt!.replace('Z', '000+00:00'),
  }, 'labels the other server can read')
  return { http: http!.HostPort, execd: execd!.HostPort }
}

async function sidecarAsSeen(t: Test, stack: Stack, id: string): Promise<string> {
  const [sidecar, main] = [await inspect(stack, labels.egressSidecarFor, id), await inspect(stack, labels.id, id)]
  t.match(sidecar.HostConfig, { CapAdd: [/^(CAP_)?NET_ADMIN$/], Sysctls: { 'net.ipv6.conf.all.disable_ipv6': '1', 'net.ipv6.conf.default.disable_ipv6': '1', 'net.ipv6.conf.lo.disable_ipv6': '1' } })
  t.notOk(labels.id in sidecar.Config.Labels, 'the sidecar is not a sandbox')
  const variable = (name: string): string | undefined => sidecar.Config.Env.find((entry) => entry.startsWith(`${name}=`))?.slice(name.length + 1)
  t.strictSame(JSON.parse(variable('OPENSANDBOX_EGRESS_RULES') ?? 'null'), egressRules)
  t.equal(variable('OPENSANDBOX_EGRESS_MODE'), 'dns+nft')
  const ports = portsOf(sidecar)
  t.strictSame(Object.keys(ports).sort(), ['18080/tcp', '44772/tcp', '8080/tcp'])
  t.equal(main.HostConfig.NetworkMode, `container:${sidecar.Id}`)
  t.strictSame(portsOf(main), {}, 'the main container publishes nothing')
  t.match(main.Config.Labels, { [labels.embeddingProxyPort]: ports['44772/tcp']![0]!.HostPort, [labels.httpPort]: ports['8080/tcp']![0]!.HostPort, [labels.egressAuthToken]: variable('OPENSANDBOX_EGRESS_TOKEN') })
  return ports['18080/tcp']![0]!.HostPort
}

/** As the engine tells it. The original takes execd out of its image between create and start of the first sandbox; here it is at hand before. */
async function stepsInOrder(t: Test, stack: Stack, since: number, ids: readonly string[]): Promise<void> {
  const until = Date.now() / 1000 + 1
  const stream = await docker.getEvents({ since, until, filters: JSON.stringify({ type: ['container'], label: [`${labels.instance}=${stack.instance}`] }) })
  let text = ''
  for await (const chunk of stream) text += String(chunk)
  const events = text.split('\n').filter(Boolean).map((line) => JSON.parse(line) as { Action: string; Actor: { Attributes: Record<string, string> } })
  const steps = (of: (attributes: Record<string, string>) => boolean): string[] => events.filter(({ Actor }) => of(Actor.Attributes)).map(({ Action, Actor }) => `${Action} ${Actor.Attributes[labels.role]}`)
  t.strictSame(steps((attributes) => attributes[labels.role] === 'staging'), ['create staging', 'archive-path staging', 'archive-path staging', 'destroy staging'], 'execd is read once, out of a container that never runs')
  const [plain, guarded] = ids.map((id) => steps((attributes) => attributes[labels.group] === groupHash(id)))
  t.strictSame(plain, ['create main', 'extract-to-dir main', 'start main'], 'execd before the start')
  t.strictSame(guarded, ['create egress', 'start egress', 'create main', 'extract-to-dir main', 'start main'], 'and the rules before the sandbox')
}
