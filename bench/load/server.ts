/**
 * From the create request to a sandbox that runs, with and without a policy, against the same Docker calls made by dockerode directly: the
 * same images, the same limits and capabilities, a network of the same kind, the same readiness poll.
 */
import Docker from 'dockerode'
import { BareSandboxes } from '../peers/bare-sandboxes.ts'
import type { Cleanups } from '../program.ts'
import type { Arena, Effort, Measure, Sample, Target } from '../rounds.ts'
import { asInProduction, bareNetwork, removeLeftovers, ServerProgram } from './server-program.ts'

const policy = { defaultAction: 'deny', egress: [{ action: 'allow', target: '*.bench.example' }] }
const entrypoint = ['sleep', '600']

export const server: Target = { title: 'Lifecycle server: create to running', start }

async function start(_: Effort, cleanups: Cleanups): Promise<Arena> {
  const docker = new Docker()
  await removeLeftovers(docker)
  cleanups.add(() => removeLeftovers(docker))
  const bare = new BareSandboxes(docker, bareNetwork)
  await bare.open()
  const program = await ServerProgram.start(cleanups)

  const measures: Measure[] = [{ key: 'ready', label: 'create to running', unit: 'ms' }, { key: 'removed', label: 'delete to gone', unit: 'ms' }]
  const contenders = (networkPolicy: object | null) => ({
    'dockerode directly': () => timeBoth(() => bare.create(entrypoint, networkPolicy), (sandbox) => bare.remove(sandbox)),
    server: () => timeBoth(() => program.create({ image: { uri: 'sallyport/sandbox:local' }, entrypoint, ...(networkPolicy === null ? {} : { networkPolicy }) }), (id) => program.remove(id)),
  })
  for (const networkPolicy of [null, policy]) for (const once of Object.values(contenders(networkPolicy))) await once()
  const goals = [{ contender: 'server', measure: 'ready', sense: 'at most', limit: 1.15 } as const]
  return {
    loads: [
      { title: 'sandbox with a policy: sidecar, rules confirmed, main', rounds: 7, baseline: 'dockerode directly', measures, contenders: contenders(policy), goals },
      { title: 'sandbox without a policy', rounds: 7, baseline: 'dockerode directly', measures, contenders: contenders(null), goals },
    ],
    notes: [asInProduction],
  }
}

async function timeBoth<T>(make: () => Promise<T>, remove: (made: T) => Promise<void>): Promise<Sample> {
  const begin = performance.now()
  const made = await make()
  const ready = performance.now()
  await remove(made)
  return { ready: ready - begin, removed: performance.now() - ready }
}
