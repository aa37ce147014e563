/**
 * From the create request to a sandbox that runs, with and without a policy, against the same Docker calls made by dockerode directly: the
 * same images, the same limits and capabilities, a network of the same kind, the same readiness poll.
 */
import Docker from 'dockerode'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { stringify } from 'smol-toml'
import { request } from 'undici'
import { headerNames, labels } from '#policies/wire.ts'
import { BareSandboxes } from '../peers/bare-sandboxes.ts'
import { freePort, type Cleanups } from '../program.ts'
import type { Arena, Effort, Measure, Sample, Target } from '../rounds.ts'

const serverMain = path.join(import.meta.dirname, '..', '..', 'server', 'main.ts')
const instance = 'sp-bench'
const bareNetwork = 'sp-bench-bare'
const apiKey = 'a-key-that-only-the-bench-knows'
const policy = { defaultAction: 'deny', egress: [{ action: 'allow', target: '*.bench.example' }] }
const entrypoint = ['sleep', '600']

export const server: Target = { title: 'Lifecycle server: create to running', start }

async function start(_: Effort, cleanups: Cleanups): Promise<Arena> {
  const docker = new Docker()
  await removeLeftovers(docker)
  cleanups.add(() => removeLeftovers(docker))
  const bare = new BareSandboxes(docker, bareNetwork)
  await bare.open()
  const url = await startServer(cleanups)

  const measures: Measure[] = [{ key: 'ready', label: 'create to running', unit: 'ms' }, { key: 'removed', label: 'delete to gone', unit: 'ms' }]
  const contenders = (networkPolicy: object | null) => ({
    'dockerode directly': () => timeBoth(() => bare.create(entrypoint, networkPolicy), (sandbox) => bare.remove(sandbox)),
    server: () => timeBoth(() => create(url, networkPolicy), (id) => remove(url, id)),
  })
  for (const networkPolicy of [null, policy]) for (const once of Object.values(contenders(networkPolicy))) await once()
  const goals = [{ contender: 'server', measure: 'ready', sense: 'at most', limit: 1.15 } as const]
  return {
    loads: [
      { title: 'sandbox with a policy: sidecar, rules confirmed, main', rounds: 7, baseline: 'dockerode directly', measures, contenders: contenders(policy), goals },
      { title: 'sandbox without a policy', rounds: 7, baseline: 'dockerode directly', measures, contenders: contenders(null), goals },
    ],
    notes: ['The server runs as it does in production: API key, SQLite store, host guard, gateway mode (no published ports). Images are warm.'],
  }
}

async function startServer(cleanups: Cleanups): Promise<string> {
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-server-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const port = await freePort()
  const url = `http://127.0.0.1:${port}`
  const file = path.join(folder, 'config.toml')
  await writeFile(file, stringify({
    server: { host: '127.0.0.1', port, api_key: apiKey },
    docker: { network_name: instance, bridge_name: 'sp-bench0', instance },
    egress: { image: 'sallyport/egress:local', dns_upstreams: ['198.51.100.53'] },
    ingress: { mode: 'gateway', gateway: { address: '*.sandbox.localhost:28888', route: { mode: 'wildcard' } } },
    store: { path: path.join(folder, 'sallyport.db') },
  }), { mode: 0o600 })
  const ready = async (): Promise<boolean> => (await call(url, 'GET', '/health')).status === 200
  await cleanups.start(process.execPath, [serverMain, '--config', file], { ready })
  return url
}

async function create(url: string, networkPolicy: object | null): Promise<string> {
  const body = { image: { uri: 'sallyport/sandbox:local' }, entrypoint, timeout: 600, resourceLimits: {}, ...(networkPolicy === null ? {} : { networkPolicy }) }
  const { status, value } = await call(url, 'POST', '/v1/sandboxes', body)
  const sandbox = value as { id: string; status: { state: string } }
  if (status !== 202 || sandbox.status.state !== 'Running') throw new Error(`create answered ${status}: ${JSON.stringify(value)}`)
  return sandbox.id
}

async function remove(url: string, id: string): Promise<void> {
  const { status } = await call(url, 'DELETE', `/v1/sandboxes/${id}`)
  if (status !== 204) throw new Error(`delete answered ${status}`)
}

async function call(url: string, method: 'GET' | 'POST' | 'DELETE', route: string, body?: object): Promise<{ status: number; value: unknown }> {
  const answer = await request(url + route, { method, headers: { [headerNames.apiKey]: apiKey, 'content-type': 'application/json' }, body: body === undefined ? null : JSON.stringify(body) })
  const text = await answer.body.text()
  return { status: answer.statusCode, value: text.startsWith('{') ? JSON.parse(text) : text }
}

async function timeBoth<T>(make: () => Promise<T>, remove: (made: T) => Promise<void>): Promise<Sample> {
  const begin = performance.now()
  const made = await make()
  const ready = performance.now()
  await remove(made)
  return { ready: ready - begin, removed: performance.now() - ready }
}

/** Everything in the engine that carries our instances or is one of our networks, also from a run that was killed. */
async function removeLeftovers(docker: Docker): Promise<void> {
  for (const own of [instance, bareNetwork]) {
    const containers = await docker.listContainers({ all: true, filters: { label: [`${labels.instance}=${own}`] } })
    // Main before sidecar: nothing of it may run on without its rules.
    containers.sort((a, b) => Number(a.Labels[labels.role] === 'egress') - Number(b.Labels[labels.role] === 'egress'))
    for (const { Id } of containers) await docker.getContainer(Id).remove({ force: true, v: true }).catch(ignoreGone)
    await docker.getNetwork(own).remove().catch(ignoreGone)
  }
}

function ignoreGone(error: { statusCode?: number }): void {
  if (error.statusCode !== 404) throw error
}
