/** The lifecycle server as the benches run it, and the few calls of its API that they make. */
import type Docker from 'dockerode'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { stringify } from 'smol-toml'
import { request } from 'undici'
import { headerNames, labels } from '#policies/wire.ts'
import { freePort, type Cleanups, type Program } from '../program.ts'

const serverMain = path.join(import.meta.dirname, '..', '..', 'server', 'main.ts')
export const instance = 'sp-bench'
export const bareNetwork = 'sp-bench-bare'
export const apiKey = 'a-key-that-only-the-bench-knows'
/** In front of a load that has one: what the server is, in words. */
export const asInProduction = 'The server runs as it does in production: API key, SQLite store, host guard, gateway mode (no published ports). Images are warm.'

export type Config = Readonly<Record<string, Readonly<Record<string, unknown>>>>

export class ServerProgram {
  readonly url: string
  readonly #file: string
  readonly #env: Readonly<Record<string, string>>
  readonly #cleanups: Cleanups
  #program: Program | null = null

  private constructor(url: string, file: string, env: Readonly<Record<string, string>>, cleanups: Cleanups) {
    this.url = url
    this.#file = file
    this.#env = env
    this.#cleanups = cleanups
  }

  /** @param config laid over what the benches have in common, table by table */
  static async start(cleanups: Cleanups, config: Config = {}, env: Readonly<Record<string, string>> = {}): Promise<ServerProgram> {
    const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-server-'))
    cleanups.add(() => rm(folder, { recursive: true, force: true }))
    const port = await freePort()
    const file = path.join(folder, 'config.toml')
    await writeFile(file, stringify({
      server: { host: '127.0.0.1', port, api_key: apiKey, ...config['server'] },
      docker: { network_name: instance, bridge_name: 'sp-bench0', instance, ...config['docker'] },
      egress: { image: 'sallyport/egress:local', dns_upstreams: ['198.51.100.53'] },
      ingress: { mode: 'gateway', gateway: { address: '*.sandbox.localhost:28888', route: { mode: 'wildcard' } } },
      store: { path: path.join(folder, 'sallyport.db') },
    }), { mode: 0o600 })
    const program = new ServerProgram(`http://127.0.0.1:${port}`, file, env, cleanups)
    await program.restart()
    return program
  }

  get pid(): number {
    return this.#program?.pid ?? 0
  }

  /** Ends it, if it runs, and starts it with the same store. */
  async restart(): Promise<void> {
    await this.#program?.stop()
    const ready = async (): Promise<boolean> => (await this.call('GET', '/health')).status === 200
    this.#program = await this.#cleanups.start(process.execPath, [serverMain, '--config', this.#file], { ready, env: this.#env })
  }

  /** @returns its id, when it runs */
  async create(body: object): Promise<string> {
    const { status, value } = await this.call('POST', '/v1/sandboxes', { timeout: 3600, resourceLimits: {}, ...body })
    const sandbox = value as { id: string; status: { state: string } }
    if (status !== 202 || sandbox.status.state !== 'Running') throw new Error(`create answered ${status}: ${JSON.stringify(value)}`)
    return sandbox.id
  }

  async remove(id: string): Promise<void> {
    const { status } = await this.call('DELETE', `/v1/sandboxes/${id}`)
    if (status !== 204) throw new Error(`delete answered ${status}`)
  }

  async call(method: 'GET' | 'POST' | 'DELETE', route: string, body?: object): Promise<{ status: number; value: unknown }> {
    const answer = await request(this.url + route, { method, headers: { [headerNames.apiKey]: apiKey, 'content-type': 'application/json' }, body: body === undefined ? null : JSON.stringify(body) })
    const text = await answer.body.text()
    return { status: answer.statusCode, value: text.startsWith('{') ? JSON.parse(text) : text }
  }
}

/** Everything in the engine that carries our instances or is one of our networks, also from a run that was killed. */
export async function removeLeftovers(docker: Docker): Promise<void> {
  for (const own of [instance, bareNetwork]) {
    const containers = await docker.listContainers({ all: true, filters: { label: [`${labels.instance}=${own}`] } })
    // Main before sidecar: nothing of it may run on without its rules.
    containers.sort((a, b) => Number(a.Labels[labels.role] === 'egress') - Number(b.Labels[labels.role] === 'egress'))
    for (const { Id } of containers) await docker.getContainer(Id).remove({ force: true, v: true }).catch(ignoreGone)
    // Docker 20.10 may lose count of a network's endpoints when containers go while they start; such a network stays, and serves the next run.
    await docker.getNetwork(own).remove().catch((error: Failure) => { if (error.statusCode !== 403) ignoreGone(error) })
  }
}

type Failure = { readonly statusCode?: number }

function ignoreGone(error: Failure): void {
  if (error.statusCode !== 404) throw error
}
