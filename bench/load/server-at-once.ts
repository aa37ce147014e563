/**
 * Fifty creates at once, against fifty of the same sequences by dockerode at the same concurrency; and how long the server's other answers
 * take meanwhile, against a bare node:http server beside those fifty sequences.
 */
import Docker from 'dockerode'
import path from 'node:path'
import { headerNames } from '#policies/wire.ts'
import { BareSandboxes } from '../peers/bare-sandboxes.ts'
import { startProber } from '../peers/prober.ts'
import { accepts, freePort, type Cleanups } from '../program.ts'
import { percentile, type Arena, type Effort, type Measure, type Sample, type Target } from '../rounds.ts'
import { apiKey, asInProduction, bareNetwork, removeLeftovers, ServerProgram } from './server-program.ts'

const atOnce = 50
const entrypoint = ['sleep', '600']

export const serverAtOnce: Target = { title: 'Lifecycle server: fifty creates at once', start }

async function start(_: Effort, cleanups: Cleanups): Promise<Arena> {
  const docker = new Docker()
  await removeLeftovers(docker)
  cleanups.add(() => removeLeftovers(docker))
  const bare = new BareSandboxes(docker, bareNetwork)
  await bare.open()
  // POST answers when the sandbox runs, however long fifty of them take.
  const program = await ServerProgram.start(cleanups, { server: { create_wait_seconds: 120 } })
  const create = (): Promise<string> => program.create({ image: { uri: 'sallyport/sandbox:local' }, entrypoint })
  const known = await create()
  await bare.remove(await bare.create(entrypoint, null))
  const port = await freePort()
  await cleanups.start(process.execPath, [path.join(import.meta.dirname, '..', 'peers', 'bare-http.ts'), String(port)], { ready: accepts(port) })

  const measures: Measure[] = [{ key: 'throughput', label: 'creates', unit: '1/s' }, { key: 'health', label: 'p99 of /health', unit: 'ms' }, { key: 'get', label: 'p99 of GET of a sandbox', unit: 'ms' }]
  return {
    loads: [{
      title: 'fifty sandboxes without a policy', rounds: 3, baseline: 'dockerode directly, bare node:http beside it', measures,
      contenders: {
        'dockerode directly, bare node:http beside it': () => round([`http://127.0.0.1:${port}/health`, `http://127.0.0.1:${port}/`], () => bare.create(entrypoint, null), (made) => bare.remove(made)),
        server: () => round([`${program.url}/health`, `${program.url}/v1/sandboxes/${known}`], create, (id) => program.remove(id)),
      },
      goals: [
        { contender: 'server', measure: 'throughput', sense: 'at least', limit: 0.9 },
        { contender: 'server', measure: 'health', sense: 'at most', limit: 1.5 },
        { contender: 'server', measure: 'get', sense: 'at most', limit: 1.5 },
      ],
    }],
    notes: [asInProduction, 'Three rounds, not seven: each makes and removes a hundred containers. A thread of the bench asks both URLs 125 times a second each, meanwhile; making and asking end together.'],
  }
}

/** Times fifty that are made together; takes them away again untimed. */
async function round<T>(urls: readonly string[], make: () => Promise<T>, remove: (made: T) => Promise<void>): Promise<Sample> {
  const prober = await startProber(urls, { [headerNames.apiKey]: apiKey })
  const begin = performance.now()
  const made = await Promise.all(Array.from({ length: atOnce }, make))
  const seconds = (performance.now() - begin) / 1000
  const [health, get] = await prober.stop()
  await Promise.all(made.map(remove))
  return { throughput: atOnce / seconds, health: percentile(health!, 0.99), get: percentile(get!, 0.99) }
}
