/**
 * The gateway against nginx, and against the bare packages it is made of, on one raw backend in a process of its own. Everything a
 * production gateway does is on: routing by header, its checks, metrics, the access line written to a file.
 */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { atRate, saturate, type HttpLoad } from '../http-load.ts'
import { startNginx } from '../peers/nginx.ts'
import { accepts, freePort, type Cleanups, type Program } from '../program.ts'
import type { Arena, Effort, Load, Measure, Target } from '../rounds.ts'

const connections = 32
const peers = path.join(import.meta.dirname, '..', 'peers')
const gatewayMain = path.join(import.meta.dirname, '..', '..', 'gateway', 'main.ts')
const secureToken = 'a-token-that-only-the-bench-knows'

type Proxy = { readonly program: Program; readonly port: number; readonly headers: readonly string[] }

export const gateway: Target = { title: 'Gateway: HTTP through the proxy', start }

async function start({ seconds }: Effort, cleanups: Cleanups): Promise<Arena> {
  const backendPort = await freePort()
  await startNode(cleanups, path.join(peers, 'http-backend.ts'), [backendPort], backendPort)
  const proxies = {
    nginx: await startNginxProxy(cleanups, backendPort),
    gateway: await startGateway(cleanups, backendPort, false),
    'gateway, access check': await startGateway(cleanups, backendPort, true),
    'undici alone': await startPeer(cleanups, 'undici-proxy.ts', backendPort),
    'http-proxy-3 alone': await startPeer(cleanups, 'http-proxy-3-proxy.ts', backendPort),
  }
  const load = (name: keyof typeof proxies, file: string, count: number): HttpLoad => {
    const { program, port, headers } = proxies[name]
    return { url: `http://127.0.0.1:${port}${file}`, headers, connections: count, seconds, proxy: program }
  }
  const contenders = (names: readonly (keyof typeof proxies)[], run: (name: keyof typeof proxies) => ReturnType<typeof saturate>): Load['contenders'] =>
    Object.fromEntries(names.map((name) => [name, () => run(name)]))

  // The first runs also compile the hot code.
  const names = Object.keys(proxies) as (keyof typeof proxies)[]
  for (let run = 0; run < 2; run++) for (const name of names) await saturate(load(name, '/', connections))
  const saturation = (await saturate(load('nginx', '/', connections))).throughput!
  const rate = Math.round(saturation / 6)

  const throughput = measures('cpu', 'throughput', 'p50', 'p99')
  return {
    loads: [{
      title: `small keep-alive GET, ${connections} connections, as fast as it goes`, rounds: 7, baseline: 'nginx', measures: throughput,
      contenders: contenders(names, (name) => saturate(load(name, '/', connections))),
      goals: [
        { contender: 'gateway', measure: 'cpu', sense: 'at most', limit: 3.3 },
        { contender: 'gateway, access check', measure: 'cpu', sense: 'at most', limit: 3.3 },
      ],
    }, {
      title: `64 KiB body, ${connections} connections, as fast as it goes`, rounds: 7, baseline: 'nginx', measures: throughput,
      contenders: contenders(['nginx', 'gateway', 'undici alone', 'http-proxy-3 alone'], (name) => saturate(load(name, '/64k', connections))),
      goals: [{ contender: 'gateway', measure: 'throughput', sense: 'at least', limit: 0.55 }],
    }, {
      title: `small keep-alive GET at a sixth of nginx's saturation (${rate} a second), 16 connections`, rounds: 7, baseline: 'nginx', measures: measures('cpu', 'p50', 'p99'),
      contenders: contenders(['nginx', 'gateway'], (name) => atRate(load(name, '/', 16), rate)),
      goals: [{ contender: 'gateway', measure: 'p99', sense: 'at most', limit: 4 }],
    }],
    notes: [
      'nginx: one worker, upstream keep-alive, access log off, buffers that hold a whole body. Gateway: one worker, header mode, static routes, metrics and access log on.',
      'CPU is user and system time of the proxy and its children, divided by the requests of the round. The load generator, the backend and the proxy share the processors.',
    ],
  }
}

const allMeasures: Readonly<Record<string, Measure>> = {
  cpu: { key: 'cpu', label: 'CPU a request', unit: 'µs' },
  throughput: { key: 'throughput', label: 'throughput', unit: '1/s' },
  p50: { key: 'p50', label: 'p50', unit: 'ms' },
  p99: { key: 'p99', label: 'p99', unit: 'ms' },
}

function measures(...keys: string[]): readonly Measure[] {
  return keys.map((key) => allMeasures[key]!)
}

async function startNginxProxy(cleanups: Cleanups, backendPort: number): Promise<Proxy> {
  const port = await freePort()
  return { program: await startNginx(port, backendPort, cleanups), port, headers: [] }
}

async function startPeer(cleanups: Cleanups, file: string, backendPort: number): Promise<Proxy> {
  const port = await freePort()
  return { program: await startNode(cleanups, path.join(peers, file), [port, backendPort], port), port, headers: [] }
}

/** A gateway in front of one static sandbox on loopback. With `secured` every request must carry the sandbox's token. */
async function startGateway(cleanups: Cleanups, backendPort: number, secured: boolean): Promise<Proxy> {
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-gateway-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const routes = path.join(folder, 'routes.json')
  await writeFile(routes, JSON.stringify({ sandboxes: [{ id: 'bench', host: '127.0.0.1', ...(secured ? { secureAccessToken: secureToken } : {}) }] }))
  const port = await freePort()
  const program = await startNode(cleanups, gatewayMain, ['--port', port, '--mode', 'header', '--provider', 'static', '--routes', routes, '--allow-loopback-upstreams', '--admin-port', 0, '--access-log', path.join(folder, 'access.log')], port)
  return { program, port, headers: [`OpenSandbox-Ingress-To: bench-${backendPort}`, ...(secured ? [`OpenSandbox-Secure-Access: ${secureToken}`] : [])] }
}

async function startNode(cleanups: Cleanups, file: string, args: readonly (string | number)[], port: number): Promise<Program> {
  return cleanups.start(process.execPath, [file, ...args.map(String)], { ready: accepts(port) })
}
