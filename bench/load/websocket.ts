/**
 * WebSockets through the gateway and through HAProxy, on one raw echo server in a process of its own: what a message costs, and what a
 * connection costs on which nothing happens.
 */
import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { startHaproxy } from '../peers/haproxy.ts'
import { accepts, cpuSeconds, freePort, ownMemory, type Cleanups } from '../program.ts'
import type { Arena, Effort, Load, Sample, Target } from '../rounds.ts'
import { SteadyClient } from '../steady-requests.ts'
import { WebSocketLoad } from '../websocket-load.ts'
import { startGateway, type Proxy } from './gateway-program.ts'

const talking = 200
const idle = 8_000
/** Before memory is read the first time: what every proxy needs once, it has then. */
const before = 20
const peers = path.join(import.meta.dirname, '..', 'peers')

export const websocket: Target = { title: 'Gateway: WebSockets', start }

async function start({ seconds }: Effort, cleanups: Cleanups): Promise<Arena> {
  const backendPort = await freePort()
  await cleanups.start(process.execPath, [path.join(peers, 'websocket-echo.ts'), String(backendPort)], { ready: accepts(backendPort) })
  return {
    loads: [await echoes(seconds, backendPort, cleanups), idleness(backendPort, cleanups)],
    notes: ['HAProxy: one thread, HTTP mode, no log. Gateway: one worker, header mode, static routes, metrics and access log on.'],
  }
}

/** Connections stay open over all rounds, so that a round is messages and nothing else. */
async function echoes(seconds: number, backendPort: number, cleanups: Cleanups): Promise<Load> {
  const contenders: Record<string, () => Promise<Sample>> = {}
  for (const [name, start] of Object.entries(proxies)) {
    const proxy = await start(backendPort, cleanups)
    const clients = await WebSocketLoad.open(proxy, talking)
    cleanups.add(async () => clients.close())
    for (let run = 0; run < 2; run++) await clients.echo(seconds)
    contenders[name] = async () => {
      const [cpu, begin] = [cpuSeconds(proxy.program.pid), performance.now()]
      const count = await clients.echo(seconds)
      return { cpu: ((cpuSeconds(proxy.program.pid) - cpu) * 1e6) / count, throughput: count / ((performance.now() - begin) / 1000) }
    }
  }
  return {
    title: `echoes of 128 bytes over ${talking} connections, as fast as they go`, rounds: 7, baseline: 'HAProxy', contenders,
    measures: [{ key: 'cpu', label: 'CPU an echo', unit: 'µs' }, { key: 'throughput', label: 'throughput', unit: '1/s' }],
    goals: [],
    notes: [
      'An echo is a message there and a message back: the proxy reads twice and writes twice, and with one message under way on each connection every read wakes it for 130 bytes.',
      "Those four system calls are most of the price on both sides; what we add is libuv's call into JavaScript for each read, the two streams that a piece passes (the socket's, and ours, which counts bytes and finds the ends of frames), and the callback of each write.",
    ],
  }
}

/** Every round begins with a new process: one that had as many connections before has the memory for them already. */
function idleness(backendPort: number, cleanups: Cleanups): Load {
  return {
    title: `${idle} idle connections, each after one echo`, rounds: 3, baseline: 'HAProxy',
    measures: [{ key: 'memory', label: 'memory a connection', unit: 'KiB' }, { key: 'collected', label: 'in use after a collection', unit: 'KiB' }],
    contenders: Object.fromEntries(Object.entries(proxies).map(([name, start]) => [name, async () => {
      const proxy = await start(backendPort, cleanups)
      try {
        return await measureIdle(proxy, name === 'gateway')
      } finally {
        await proxy.program.stop()
      }
    }])),
    goals: [],
    notes: [
      'In use are two sockets, a stream of ours and their states, two parsed heads and the closures of node:http and http-proxy-3, each an object of its own; what comes on top is room that V8 keeps for its collector, until it is short of memory.',
      "HAProxy's connection is a few structures of fixed size, and one on which nothing happens has given its buffers back. Buffers of the kernel, the same for both, are not counted.",
    ],
  }
}

async function measureIdle(proxy: Proxy, collects: boolean): Promise<Sample> {
  const { pid } = proxy.program
  const first = await WebSocketLoad.open(proxy, before)
  await first.echo(0)
  first.close()
  const collected = async (): Promise<number> => {
    if (collects) await collect(proxy)
    return settledMemory(pid)
  }
  const empty = await collected()
  const clients = await WebSocketLoad.open(proxy, idle)
  try {
    await clients.echo(0)
    const asItStands = await settledMemory(pid)
    const perConnection = (bytes: number): number => (bytes - empty) / idle / 1024
    return { memory: perConnection(asItStands), collected: perConnection(await collected()) }
  } finally {
    clients.close()
  }
}

/** A request that is answered was read after the signal, the first one perhaps in the same turn. */
async function collect({ program, port, headers }: Proxy): Promise<void> {
  const client = await SteadyClient.open(port)
  process.kill(program.pid, 'SIGUSR2')
  for (let turn = 0; turn < 3; turn++) await client.ask(headers.join('\r\n'), '/status.ok')
  client.close()
}

/** Memory once it has not changed by more than 1 % for half a second, or after 5 s. */
async function settledMemory(pid: number): Promise<number> {
  let bytes = 0
  for (let look = 0, still = 0; look < 50 && still < 5; look++) {
    await delay(100)
    const now = ownMemory(pid)
    still = Math.abs(now - bytes) < now / 100 ? still + 1 : 0
    bytes = now
  }
  return bytes
}

const proxies: Readonly<Record<string, (backendPort: number, cleanups: Cleanups) => Promise<Proxy>>> = {
  HAProxy: async (backendPort, cleanups) => {
    const port = await freePort()
    return { program: await startHaproxy(port, backendPort, cleanups), port, headers: [] }
  },
  gateway: (backendPort, cleanups) => startGateway(cleanups, backendPort, { node: ['--expose-gc', '--import', path.join(peers, 'collect-on-signal.ts')] }),
}
