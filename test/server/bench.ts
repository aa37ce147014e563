/** A server without Docker, without nft and without a port: real store, real plan, real API, a fake engine behind them. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { FastifyInstance } from 'fastify'
import { createWorkshop } from '../../server/carry-out.ts'
import { Clock, type Clocks } from '../../server/clock.ts'
import { readConfig, type Config } from '../../server/config.ts'
import { Execd } from '../../server/execd.ts'
import { Groups } from '../../server/groups.ts'
import type { Group } from '../../server/group.ts'
import { HostGuard } from '../../server/host-guard.ts'
import { HostPorts } from '../../server/host-ports.ts'
import { Images } from '../../server/images.ts'
import { SandboxNetwork } from '../../server/network.ts'
import { RouteStream } from '../../server/route-stream.ts'
import { toRoute } from '../../server/sandbox-view.ts'
import { createServer } from '../../server/server.ts'
import type { AskPolicy, ConfirmRules } from '../../server/sidecar-client.ts'
import { Store } from '../../server/store.ts'
import { FakeEngine } from './fake-engine.ts'

export const gatewayToml = `
[server]
host = "127.0.0.1"
api_key = "k1"
[egress]
image = "egress:1"
dns_upstreams = ["198.51.100.53"]
[ingress]
mode = "gateway"
route_token = "route token"
[ingress.gateway]
address = "*.sandbox.localhost:28888"
route.mode = "wildcard"
[ingress.secure_access]
active_key = "a"
keys = [{ key_id = "a", key = "c2VjcmV0" }]
`

export function readToml(text: string, env: Record<string, string> = {}): Config {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-config-'))
  try {
    writeFileSync(join(folder, 'config.toml'), `${text}\n[store]\npath = "${join(folder, 'unused.db')}"\n`)
    return readConfig(join(folder, 'config.toml'), env)
  } finally {
    rmSync(folder, { recursive: true })
  }
}

export type Options = { toml?: string; store?: string; engine?: FakeEngine; confirm?: ConfirmRules; askPolicy?: AskPolicy; probe?: { ensure(): Promise<string> }; inUse?: (id: string) => boolean; clock?: { now: number }; clocks?: Clocks; env?: Record<string, string>; oldMetadata?: (id: string) => Readonly<Record<string, string>> | null }

export class Bench {
  readonly engine: FakeEngine
  readonly store: Store
  readonly groups: Groups
  readonly routes = new RouteStream()
  readonly app: FastifyInstance
  readonly clock: { now: number }
  readonly events: string[] = []
  /** The same with what is told of them. */
  readonly details: Record<string, unknown>[] = []
  readonly clientEvents: unknown[] = []

  constructor(options: Options = {}) {
    const config = readToml(options.toml ?? gatewayToml, options.env)
    this.engine = options.engine ?? new FakeEngine()
    this.store = new Store(options.store ?? ':memory:')
    this.clock = options.clock ?? { now: Date.UTC(2026, 0, 1) }
    const network = new SandboxNetwork(config, { engine: this.engine, guard: new HostGuard(async () => '', async () => '') })
    const images = new Images(this.engine)
    const reference = config.runtime.execd_image
    const execd = reference === undefined ? null : new Execd(reference, { engine: this.engine, images, instance: 'bench' })
    const stepping = options.clocks === undefined ? null : new Clock(options.clocks, this.store.note('clock'), (milliseconds, note) => this.groups.stepped(milliseconds, note))
    const now = stepping?.now ?? ((): number => this.clock.now)
    this.groups = new Groups({
      config, instance: 'bench', store: this.store, engine: this.engine, ports: new HostPorts('127.0.0.1'),
      workshop: createWorkshop(config, { machine: () => this.engine.machine(), images, network, execd, probe: options.probe ?? null, confirm: options.confirm ?? (async () => undefined) }),
      oldMetadata: options.oldMetadata ?? (() => null),
      inUse: options.inUse ?? (() => false),
      now,
      changed: (id: string, group: Group | null) => (group === null ? this.routes.delete(id) : this.routes.put(toRoute(group))),
      report: (event, _id, detail) => {
        this.events.push(event)
        this.details.push({ event, ...detail })
      },
    })
    this.app = createServer({
      config, groups: this.groups, routes: this.routes, askPolicy: options.askPolicy ?? (async () => { throw new Error('no sidecar here') }), now, finished: () => undefined, clientEvent: (event) => void this.clientEvents.push(event),
      readiness: async () => ({ ready: true, checks: { engine: 'ok', store: 'ok', host_guard: 'ok', isolation: 'isolated' } }),
    })
    // As main.ts does.
    if (stepping !== null) {
      stepping.now()
      this.store.setNote('clock', stepping.note)
    }
  }

  async call(method: 'GET' | 'POST' | 'PATCH' | 'DELETE' | 'PUT' | 'OPTIONS', url: string, body?: unknown, headers: Record<string, string> = {}): Promise<{ status: number; body: any; headers: Record<string, unknown> }> {
    const answer = await this.app.inject({
      method, url,
      headers: { 'open-sandbox-api-key': 'k1', ...(body === undefined ? {} : { 'content-type': 'application/json' }), ...headers },
      ...(body === undefined ? {} : { payload: typeof body === 'string' ? body : JSON.stringify(body) }),
    })
    return { status: answer.statusCode, headers: answer.headers, body: answer.body === '' ? null : readJson(answer.body) }
  }

  /** Creates a sandbox by the API. */
  async create(more: Record<string, unknown> = {}): Promise<string> {
    const answer = await this.call('POST', '/v1/sandboxes', { ...createBody, ...more })
    if (answer.status !== 202) throw new Error(`create answered ${answer.status} ${JSON.stringify(answer.body)}`)
    return answer.body.id
  }

  /** Does what the clock calls for, and waits until it is done: nothing here takes longer than a few turns of the event loop. */
  async due(): Promise<void> {
    this.groups.tick()
    for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate)
  }

  /** As if the process had been killed: the store's file is let go, what hangs keeps hanging. */
  abandon(): void {
    this.routes.close()
    void this.groups.close(0)
    this.store.close()
  }

  async close(): Promise<void> {
    this.routes.close()
    await this.app.close()
    await this.groups.close(0)
    this.store.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }
}

export const createBody = { image: { uri: 'image:1' }, entrypoint: ['sleep', '1'], timeout: 600, resourceLimits: {} }
export const policyBody = { networkPolicy: { egress: [{ action: 'allow', target: 'a.example' }] } }

function readJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}
