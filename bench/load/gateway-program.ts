/** The gateway as a production host would run it: header mode, metrics, the access line written to a file. */
import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { headerNames } from '#policies/wire.ts'
import { accepts, freePort, type Cleanups, type Program } from '../program.ts'

export type StaticSandbox = { readonly id: string; readonly host: string; readonly secureAccessToken?: string }

/** A proxy that is ready, and what a request must carry to get through it. */
export type Proxy = { readonly program: Program; readonly port: number; readonly headers: readonly string[] }

export type GatewayStart = {
  /** The sandboxes of the routes file; one named `bench` on loopback when absent. */
  readonly sandboxes?: readonly StaticSandbox[]
  /** URL of a lifecycle server that tells the routes, instead of the file. */
  readonly server?: string
  /** Every request must carry the sandbox's token. */
  readonly secured?: boolean
  readonly workers?: number
  /** Options of Node itself. */
  readonly node?: readonly string[]
  /** Asked until it answers true; when absent, until the port accepts. */
  readonly ready?: (port: number) => Promise<boolean>
}

const main = path.join(import.meta.dirname, '..', '..', 'gateway', 'main.ts')
const secureToken = 'a-token-that-only-the-bench-knows'

/** @returns the proxy, and the path of its routes file */
export async function startGateway(cleanups: Cleanups, backendPort: number, { sandboxes, server, secured = false, workers = 1, node = [], ready }: GatewayStart = {}): Promise<Proxy & { readonly routes: string }> {
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-gateway-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const routes = path.join(folder, 'routes.json')
  const one: StaticSandbox = { id: 'bench', host: '127.0.0.1', ...(secured ? { secureAccessToken: secureToken } : {}) }
  await writeRoutes(routes, sandboxes ?? [one])
  const port = await freePort()
  const provider = server === undefined ? ['--provider', 'static', '--routes', routes] : ['--provider', 'server', '--server-url', server, '--server-token', 'bench', '--renew-interval', '0']
  const args = ['--port', String(port), '--mode', 'header', ...provider, '--allow-loopback-upstreams', '--access-log', path.join(folder, 'access.log'), '--admin-port', '0', '--workers', String(workers)]
  const program = await cleanups.start(process.execPath, [...node, main, ...args], { ready: ready === undefined ? accepts(port) : () => ready(port) })
  const token = secured ? [`${headerNames.secureAccess}: ${secureToken}`] : []
  return { program, port, routes, headers: [`${headerNames.ingressTo}: bench-${backendPort}`, ...token] }
}

/** In one step, as whoever changes the routes of a running gateway should. */
export async function writeRoutes(file: string, sandboxes: readonly StaticSandbox[]): Promise<void> {
  await writeFile(`${file}.new`, JSON.stringify({ sandboxes }))
  await rename(`${file}.new`, file)
}
