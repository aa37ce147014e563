/**
 * A whole Sallyport for one test: a lifecycle server and its gateways as processes of their own, with their own folder, keys,
 * Docker network and instance, on the tests' internet. `await using` ends the processes and removes every Docker object of the
 * instance, also when the test failed or killed the server.
 */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { appendFile, mkdir, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { request } from 'undici'
import { stringify } from 'smol-toml'
import type Docker from 'dockerode'
import { labels } from '#policies/wire.ts'
import { createApi, type Api, type SandboxBody } from './api.ts'
import { docker, exec, sandboxImage, type Output } from './containers.ts'
import type { Internet } from './internet.ts'
import { ignoreGone, namePrefix, programsFile, sweepLeftovers } from './leftovers.ts'
import { eventually, freePort, startProgram, type Program } from './program.ts'

export type GatewayMode = 'wildcard' | 'uri' | 'header' | 'auto'
export type NetworkPolicyBody = { readonly defaultAction?: string; readonly egress?: readonly { readonly action: string; readonly target: string }[] }

export type StackOptions = {
  /** Where sandboxes are let out to: the tests' internet, or a fence. */
  readonly internet: Pick<Internet, 'dns' | 'fence'>
  /** Gateways to start; the first is the one endpoints name. Default: none. */
  readonly gateways?: readonly GatewayMode[]
  /** Ports to take when they are free, for people who type them. Default: any. */
  readonly ports?: { readonly server: number; readonly gateway: number }
  /** Laid over the generated configuration, table by table. */
  readonly config?: Readonly<Record<string, Readonly<Record<string, unknown>>>>
  /** Environment of the server: DOCKER_HOST for a test that sits between server and engine. */
  readonly env?: Readonly<Record<string, string>>
}

export type CreateOptions = { readonly networkPolicy?: NetworkPolicyBody; readonly entrypoint?: readonly string[]; readonly [field: string]: unknown }

export interface Sandbox {
  readonly id: string
  /** Container ids; the sidecar's is undefined without a policy. */
  readonly main: string
  readonly sidecar: string | undefined
  /** IPv4 address of its network namespace. */
  readonly address: string
  /** Runs a program in the main container, as its root. */
  run(command: readonly string[], seconds?: number): Promise<Output>
  remove(): Promise<void>
}

export interface Stack extends AsyncDisposable {
  readonly api: Api
  readonly apiKey: string
  readonly instance: string
  readonly network: string
  readonly bridge: string
  readonly folder: string
  readonly server: Program
  readonly gateways: ReadonlyMap<GatewayMode, { readonly url: string; readonly program: Program }>
  /** Starts the server again after it ended, same configuration and port. */
  startServer(): Promise<Program>
  /** Creates a sandbox and waits until it runs. By default it runs the trial application on 8080. */
  create(options?: CreateOptions): Promise<Sandbox>
  /** Everything of this instance in the engine, running or not. */
  containers(): Promise<Docker.ContainerInfo[]>
}

export async function startStack({ internet, gateways = [], ports: wanted = { server: 0, gateway: 0 }, config = {}, env = {} }: StackOptions): Promise<Stack> {
  await sweepLeftovers(docker)
  const tag = randomBytes(3).toString('hex')
  const name = `${namePrefix}${process.pid}-${tag}`
  const folder = join(tmpdir(), name)
  await mkdir(folder)
  const names = { instance: name, network: name, bridge: `spt-${tag}` }
  const secrets = { apiKey: randomBytes(24).toString('base64url'), routeToken: randomBytes(24).toString('base64url') }
  const ports = { server: await freePort(wanted.server), gateways: await Promise.all(gateways.map(() => freePort(wanted.gateway))) }
  const merged = mergeTables(serverConfig({ folder, names, secrets, internet, port: ports.server, gateway: gatewayAddress(gateways[0], ports.gateways[0]) }), config)
  const file = join(folder, 'config.toml')
  await writeFile(file, stringify(merged), { mode: 0o600 })
  await internet.fence(names.bridge)

  const api = createApi(`http://127.0.0.1:${ports.server}`, secrets.apiKey)
  const stack = new RunningStack({ api, apiKey: secrets.apiKey, folder, ...names, file, env })
  try {
    await stack.startServer()
    for (const [index, mode] of gateways.entries()) await stack.startGateway(mode, ports.gateways[index]!, secrets.routeToken)
    return stack
  } catch (error) {
    await stack[Symbol.asyncDispose]()
    throw error
  }
}

async function listens(host: string, port: number): Promise<true | undefined> {
  const socket = connect({ host, port, timeout: 1000 })
  try {
    await once(socket, 'connect')
    return true
  } catch {
    return undefined
  } finally {
    socket.destroy()
  }
}

type Names = { readonly instance: string; readonly network: string; readonly bridge: string }
type ConfigParts = { folder: string; names: Names; secrets: { apiKey: string; routeToken: string }; internet: StackOptions['internet']; port: number; gateway: Record<string, unknown> | undefined }
type Tables = Record<string, Record<string, unknown>>

function serverConfig({ folder, names, secrets, internet, port, gateway }: ConfigParts): Tables {
  return {
    server: { host: '127.0.0.1', port, api_key: secrets.apiKey },
    runtime: { type: 'docker' },
    docker: { network_mode: 'bridge', network_name: names.network, bridge_name: names.bridge, instance: names.instance },
    egress: { image: 'sallyport/egress:local', dns_upstreams: [internet.dns] },
    ingress: { mode: gateway === undefined ? 'direct' : 'gateway', route_token: secrets.routeToken, ...(gateway === undefined ? {} : { gateway }) },
    store: { path: join(folder, 'sallyport.db') },
  }
}

function gatewayAddress(mode: GatewayMode | undefined, port: number | undefined): Record<string, unknown> | undefined {
  if (mode === undefined) return undefined
  const named = mode === 'auto' ? 'wildcard' : mode
  return { address: named === 'wildcard' ? `*.sandbox.localhost:${port}` : `127.0.0.1:${port}`, route: { mode: named } }
}

function mergeTables(base: Tables, over: StackOptions['config'] = {}): Tables {
  const merged = { ...base }
  for (const [table, values] of Object.entries(over)) merged[table] = { ...merged[table], ...values }
  return merged
}

class RunningStack implements Stack {
  readonly api: Api
  readonly apiKey: string
  readonly instance: string
  readonly network: string
  readonly bridge: string
  readonly folder: string
  readonly gateways = new Map<GatewayMode, { url: string; program: Program }>()
  readonly #file: string
  readonly #env: Readonly<Record<string, string>>
  #server: Program | undefined

  constructor(parts: Names & { api: Api; apiKey: string; folder: string; file: string; env: Readonly<Record<string, string>> }) {
    this.api = parts.api
    this.apiKey = parts.apiKey
    this.instance = parts.instance
    this.network = parts.network
    this.bridge = parts.bridge
    this.folder = parts.folder
    this.#file = parts.file
    this.#env = parts.env
  }

  get server(): Program {
    if (this.#server === undefined) throw new Error('the server was not started')
    return this.#server
  }

  async startServer(): Promise<Program> {
    const args = ['server/main.ts', '--config', this.#file]
    const ready = async (): Promise<boolean> => (await request(`${this.api.url}/health`)).body.text().then(() => true)
    const started = (pid: number): Promise<void> => this.#note(pid)
    this.#server = await startProgram({ args, env: this.#env, ready, started, seconds: 60 })
    return this.#server
  }

  async startGateway(mode: GatewayMode, port: number, routeToken: string): Promise<void> {
    const args = ['gateway/main.ts', '--port', String(port), '--mode', mode, '--base-domain', 'sandbox.localhost', '--provider', 'server', '--server-url', this.api.url, '--server-token', routeToken]
    const url = `http://127.0.0.1:${port}`
    const ready = async (): Promise<boolean> => {
      const answer = await request(`${url}/status.ok`)
      await answer.body.text()
      return answer.statusCode === 200
    }
    const started = (pid: number): Promise<void> => this.#note(pid)
    this.gateways.set(mode, { url, program: await startProgram({ args, ready, started }) })
  }

  /** So that the next run finds the program, should this one be killed. */
  async #note(pid: number): Promise<void> {
    await appendFile(join(this.folder, programsFile), `${pid}\n`)
  }

  async create(options: CreateOptions = {}): Promise<Sandbox> {
    const body = { image: { uri: sandboxImage }, entrypoint: ['node', '/opt/sallyport/app.mjs'], resourceLimits: {}, timeout: 600, ...options }
    const reply = await this.api.call<SandboxBody>('POST', '/v1/sandboxes', body)
    if (reply.status !== 202) throw new Error(`create answered ${reply.status}: ${JSON.stringify(reply.body)}\n${this.#words()}`)
    const { id } = reply.body
    await eventually(`sandbox ${id} runs`, async () => {
      const now = await this.api.get(id)
      if (now === undefined || now.status.state === 'Failed') throw new Error(`sandbox ${id} failed: ${JSON.stringify(now)}\n${this.#words()}`)
      return now.status.state === 'Running' ? true : undefined
    }, 30)
    const sandbox = await this.#find(id, options.networkPolicy !== undefined)
    // Running means that the container runs; the application inside needs a moment more.
    if (options.entrypoint === undefined) await eventually(`the application of ${id} listens`, () => listens(sandbox.address, 8080))
    return sandbox
  }

  /** What the server said last, without its line per request. */
  #words(): string {
    return this.server.log().split('\n').filter((line) => !line.includes('"event":"request"')).slice(-12).join('\n')
  }

  async #find(id: string, guarded: boolean): Promise<Sandbox> {
    const all = await this.containers()
    const main = all.find((container) => container.Labels[labels.id] === id)
    const sidecar = all.find((container) => container.Labels[labels.egressSidecarFor] === id)
    if (main === undefined) throw new Error(`no container carries ${labels.id}=${id}`)
    if (guarded && sidecar === undefined) throw new Error(`no container carries ${labels.egressSidecarFor}=${id}`)
    return {
      id,
      main: main.Id,
      sidecar: sidecar?.Id,
      address: Object.values((sidecar ?? main).NetworkSettings.Networks)[0]?.IPAddress ?? '',
      run: (command, seconds) => exec(main.Id, command, seconds),
      remove: async () => {
        const reply = await this.api.call('DELETE', `/v1/sandboxes/${id}`)
        if (reply.status !== 204) throw new Error(`delete answered ${reply.status}: ${JSON.stringify(reply.body)}`)
      },
    }
  }

  containers(): Promise<Docker.ContainerInfo[]> {
    return docker.listContainers({ all: true, filters: { label: [`${labels.instance}=${this.instance}`] } })
  }

  /** First as a user would, so that the server also takes its network and rules away; then by force whatever is left. */
  async [Symbol.asyncDispose](): Promise<void> {
    const failures: unknown[] = []
    const step = async (work: () => PromiseLike<unknown>): Promise<void> => void (await work().then(undefined, (error: unknown) => failures.push(error)))
    for (const { program } of this.gateways.values()) await step(() => program[Symbol.asyncDispose]())
    if (this.#server?.running === true) {
      await step(async () => Promise.all((await this.api.list()).map(({ id }) => this.api.call('DELETE', `/v1/sandboxes/${id}`))))
      await step(() => this.server[Symbol.asyncDispose]())
    }
    const left = await this.containers()
    await Promise.all(left.map((container) => step(() => docker.getContainer(container.Id).remove({ force: true, v: true }).catch(ignoreGone))))
    await step(() => docker.getNetwork(this.network).remove().catch(ignoreGone))
    await rm(this.folder, { recursive: true, force: true })
    if (failures.length > 0) throw new AggregateError(failures, 'the stack did not end cleanly')
  }
}
