/** What a second worker brings: every process has 30 % of one processor and no more, so that neither the machine's size nor the load generator decides. */
import { readFile } from 'node:fs/promises'
import path from 'node:path'
import { makeQuotas } from '../cgroups.ts'
import { saturate } from '../http-load.ts'
import { accepts, childrenOf, freePort, type Cleanups } from '../program.ts'
import type { Arena, Effort, Sample, Target } from '../rounds.ts'
import { startGateway, type Proxy } from './gateway-program.ts'

const connections = 32
const share = 0.3
const backendMain = path.join(import.meta.dirname, '..', 'peers', 'http-backend.ts')

export const workers: Target = { title: 'Gateway: workers', start }

async function start({ seconds }: Effort, cleanups: Cleanups): Promise<Arena> {
  const [forOne, forFirst, forSecond] = await makeQuotas(['one', 'first', 'second'], share, cleanups)
  const backendPort = await freePort()
  await cleanups.start(process.execPath, [backendMain, String(backendPort)], { ready: accepts(backendPort) })
  const one = await startGateway(cleanups, backendPort)
  const two = await startGateway(cleanups, backendPort, { workers: 2, ready: async (port) => (await listeners(port)) === 2 })
  const [first, second] = childrenOf(two.program.pid)

  const run = ({ program, port, headers }: Proxy): Promise<Sample> => saturate({ url: `http://127.0.0.1:${port}/`, headers, connections, seconds, proxy: program })
  /** Less than all of what it may use: something else was in the way. */
  const runLimited = async (proxy: Proxy, limit: number): Promise<Sample> => {
    const sample = await run(proxy)
    return { ...sample, used: (sample['throughput']! * sample['cpu']!) / 1e4 / limit }
  }
  // Hot code is compiled before there is a limit, by each worker for itself.
  for (const proxy of [one, two, one, two, two, two]) await run(proxy)
  await forOne!(one.program.pid)
  await forFirst!(first!)
  await forSecond!(second!)

  return {
    loads: [{
      title: `small keep-alive GET, ${connections} connections, each process limited to ${share * 100} % of a processor by its cgroup`, rounds: 11, baseline: 'one worker',
      measures: [{ key: 'throughput', label: 'throughput', unit: '1/s' }, { key: 'cpu', label: 'CPU a request', unit: 'µs' }, { key: 'used', label: 'of what it may use', unit: '%' }],
      contenders: { 'one worker': () => runLimited(one, share), 'two workers': () => runLimited(two, 2 * share) },
      goals: [{ contender: 'two workers', measure: 'throughput', sense: 'at least', limit: 1.8 }],
    }],
    notes: ['Gateway: header mode, static routes, metrics and access log on. The kernel spreads the connections over the workers by hash.'],
  }
}

/** How many sockets listen on a port: each worker has its own. A line of /proc/net/tcp: number, local and remote address in hexadecimal, state (0A: listening). */
async function listeners(port: number): Promise<number> {
  const tables = await Promise.all(['tcp', 'tcp6'].map((name) => readFile(`/proc/net/${name}`, 'utf8').catch(() => '')))
  const wanted = `:${port.toString(16).toUpperCase().padStart(4, '0')}`
  return tables.flatMap((table) => table.split('\n')).filter((line) => {
    const [, local, , state] = line.trim().split(/\s+/)
    return state === '0A' && local!.endsWith(wanted)
  }).length
}
