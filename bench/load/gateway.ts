/**
 * The gateway against nginx, and against the bare packages it is made of, on one raw backend in a process of its own. Everything a
 * production gateway does is on: routing by header, its checks, metrics, the access line written to a file.
 */
import path from 'node:path'
import { drain, pour, type BodyLoad } from '../body-load.ts'
import { atRate, saturate, type HttpLoad } from '../http-load.ts'
import { startGoReverseProxy } from '../peers/go-reverse-proxy.ts'
import { startNginx } from '../peers/nginx.ts'
import { accepts, freePort, type Cleanups, type Program } from '../program.ts'
import type { Arena, Effort, Goal, Load, Measure, Target } from '../rounds.ts'
import { startGateway, type Proxy } from './gateway-program.ts'

const connections = 32
const peers = path.join(import.meta.dirname, '..', 'peers')

export const gateway: Target = { title: 'Gateway: HTTP through the proxy', start }

async function start({ seconds }: Effort, cleanups: Cleanups): Promise<Arena> {
  const backendPort = await freePort()
  await startNode(cleanups, path.join(peers, 'http-backend.ts'), [backendPort], backendPort)
  const proxies = {
    nginx: await startNginxProxy(cleanups, backendPort),
    'nginx, 64 KiB buffers': await startNginxProxy(cleanups, backendPort, '16 64k'),
    gateway: await startGateway(cleanups, backendPort),
    'gateway, access check': await startGateway(cleanups, backendPort, { secured: true }),
    'Go ReverseProxy': await startGo(cleanups, backendPort),
    'undici alone': await startPeer(cleanups, 'undici-proxy.ts', backendPort),
    'http-proxy-3 alone': await startPeer(cleanups, 'http-proxy-3-proxy.ts', backendPort),
  }
  const load = (name: keyof typeof proxies, file: string, count: number): HttpLoad => {
    const { program, port, headers } = proxies[name]
    return { url: `http://127.0.0.1:${port}${file}`, headers, connections: count, seconds, proxy: program }
  }
  const bodyLoad = (name: keyof typeof proxies): BodyLoad => {
    const { program, port, headers } = proxies[name]
    return { port, path: '/64m', headers, size: 64 * 1024 * 1024, connections: 4, seconds, proxy: program }
  }
  const contenders = (names: readonly (keyof typeof proxies)[], run: (name: keyof typeof proxies) => ReturnType<typeof saturate>): Load['contenders'] =>
    Object.fromEntries(names.map((name) => [name, () => run(name)]))

  // The first runs also compile the hot code.
  const names = (Object.keys(proxies) as (keyof typeof proxies)[]).filter((name) => name !== 'nginx, 64 KiB buffers')
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
        { contender: 'gateway', measure: 'cpu', against: 'Go ReverseProxy', sense: 'at most', limit: 1 },
      ],
    }, {
      title: `64 KiB body, ${connections} connections, as fast as it goes`, rounds: 7, baseline: 'nginx', measures: throughput,
      contenders: contenders(['nginx', 'gateway', 'gateway, access check', 'Go ReverseProxy', 'undici alone', 'http-proxy-3 alone'], (name) => saturate(load(name, '/64k', connections))),
      goals: both({ measure: 'throughput', sense: 'at least', limit: 0.55 }),
    }, {
      title: '64 MiB body, 4 connections, as fast as it goes', rounds: 7, baseline: 'nginx', measures: flow,
      contenders: contenders(['nginx', 'nginx, 64 KiB buffers', 'gateway', 'gateway, access check', 'Go ReverseProxy'], (name) => drain(bodyLoad(name))),
      goals: both({ measure: 'throughput', sense: 'at least', limit: 0.55 }),
      notes: ['nginx: proxy_buffering on, 16 buffers of 16 KiB, no temporary files. With larger buffers it makes fewer system calls.'],
    }, {
      title: '64 MiB upload, 4 connections, as fast as it goes', rounds: 7, baseline: 'nginx', measures: flow,
      contenders: contenders(['nginx', 'gateway', 'Go ReverseProxy'], (name) => pour(bodyLoad(name))),
      goals: [],
      notes: ['nginx: proxy_request_buffering off, as for any gateway that takes uploads of any length. Reported; there is no goal for it.'],
    }, {
      title: `small keep-alive GET at a sixth of nginx's saturation (${rate} a second), 16 connections`, rounds: 7, baseline: 'nginx', measures: measures('cpu', 'p50', 'p99'),
      contenders: contenders(['nginx', 'gateway', 'gateway, access check', 'Go ReverseProxy'], (name) => atRate(load(name, '/', 16), rate)),
      goals: both({ measure: 'p99', sense: 'at most', limit: 4 }),
    }],
    notes: [
      'nginx: one worker, upstream keep-alive, access log off, buffers that hold a whole body. Gateway: one worker, header mode, static routes, metrics and access log on.',
      'CPU is user and system time of the proxy and its children, divided by the requests of the round. The load generator, the backend and the proxy share the processors.',
    ],
  }
}

/** The same promise without and with the access check. */
function both(goal: Omit<Goal, 'contender'>): Goal[] {
  return ['gateway', 'gateway, access check'].map((contender) => ({ contender, ...goal }))
}

const flow: readonly Measure[] = [{ key: 'cpu', label: 'CPU a GiB', unit: 'ms' }, { key: 'throughput', label: 'throughput', unit: 'MiB/s' }]
const allMeasures: Readonly<Record<string, Measure>> = {
  cpu: { key: 'cpu', label: 'CPU a request', unit: 'µs' },
  throughput: { key: 'throughput', label: 'throughput', unit: '1/s' },
  p50: { key: 'p50', label: 'p50', unit: 'ms' },
  p99: { key: 'p99', label: 'p99', unit: 'ms' },
}

function measures(...keys: string[]): readonly Measure[] {
  return keys.map((key) => allMeasures[key]!)
}

async function startNginxProxy(cleanups: Cleanups, backendPort: number, buffers?: string): Promise<Proxy> {
  const port = await freePort()
  return { program: await startNginx(port, backendPort, cleanups, buffers), port, headers: [] }
}

async function startGo(cleanups: Cleanups, backendPort: number): Promise<Proxy> {
  const port = await freePort()
  return { program: await startGoReverseProxy(port, backendPort, cleanups), port, headers: [] }
}

async function startPeer(cleanups: Cleanups, file: string, backendPort: number): Promise<Proxy> {
  const port = await freePort()
  return { program: await startNode(cleanups, path.join(peers, file), [port, backendPort], port), port, headers: [] }
}

async function startNode(cleanups: Cleanups, file: string, args: readonly (string | number)[], port: number): Promise<Program> {
  return cleanups.start(process.execPath, [file, ...args.map(String)], { ready: accepts(port) })
}
