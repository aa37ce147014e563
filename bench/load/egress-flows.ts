/**
 * What the sidecar costs a sandbox beyond its questions: the first use of a name until a connection stands, and a stream under many rules,
 * against the same sandbox without a sidecar. Each in a network namespace of its own, asking one upstream, connecting to one server.
 */
import { execa } from 'execa'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { createInterface } from 'node:readline'
import { makeIslands, type Island } from '../namespaces.ts'
import { runCommand, type Cleanups } from '../program.ts'
import { percentile, type Arena, type Effort, type Sample, type Target } from '../rounds.ts'
import { streamPorts } from '../peers/sandbox-server.ts'
import { startSidecar } from './sidecar-program.ts'

const rules = 4096
const learned = 10_000
/** First uses of one round, of each; in turns of so many. */
const [firstUses, turn] = [300, 25]
/** Connections of one round, of each and each way. */
const slices = 4
const peers = path.join(import.meta.dirname, '..', 'peers')

export const egressFlows: Target = { title: 'Egress sidecar: first use of a name, and streams', start }

/** A sandbox that carries out orders, see `sandbox-client.ts`. */
type Client = (order: string) => Promise<unknown>

async function start({ seconds }: Effort, cleanups: Cleanups): Promise<Arena> {
  const { upstream, islands } = await makeIslands(['guarded', 'free', 'tracked'], cleanups)
  const [guardedIsland, freeIsland, trackedIsland] = islands as [Island, Island, Island]
  // The addresses of dns-upstream.ts: whoever connects to one of them ends here.
  await runCommand('ip', ['-n', upstream, 'route', 'add', 'local', '198.18.0.0/15', 'dev', 'lo'])
  await cleanups.start(process.execPath, [path.join(peers, 'dns-upstream.ts')], { namespace: upstream, ready: listens(upstream, 'udp', 53) })
  await cleanups.start(process.execPath, [path.join(peers, 'sandbox-server.ts')], { namespace: upstream, ready: listens(upstream, 'tcp', streamPorts.source) })
  await startOwn(guardedIsland, cleanups)
  await trackConnections(trackedIsland)
  const [guarded, free, tracked] = [startClient(guardedIsland, cleanups), startClient(freeIsland, cleanups), startClient(trackedIsland, cleanups)]
  for (const client of [free, guarded, tracked]) {
    await client(`teach known ${learned}`)
    await client('first warm 300')
    await client('upload 0.3')
    await client('download 0.3')
  }

  const uses = sharedByRound(3, firstUse(guarded, free))
  const streams = sharedByRound(3, streamAll({ free, tracked, guarded }, seconds / 5))
  const [bare, sidecar, over] = ['bare resolver', 'sidecar', 'sidecar beyond the bare resolver']
  return {
    loads: [{
      title: `first use of a name: from the question to a connection, ${learned} addresses learned before`, rounds: 7, baseline: bare,
      measures: [{ key: 'p50', label: 'p50', unit: 'ms' }, { key: 'p99', label: 'p99', unit: 'ms' }],
      contenders: { [bare]: async () => (await uses()).free, [sidecar]: async () => (await uses()).guarded, [over]: async () => (await uses()).beyond },
      goals: [{ contender: over, measure: 'p50', against: null, sense: 'at most', limit: 1 }, { contender: over, measure: 'p99', against: null, sense: 'at most', limit: 8 }],
      notes: [`${firstUses} names a round for each, one after the other, in turns of ${turn}; the last row is the difference of the two within each round.`],
    }, {
      title: `one TCP stream to an allowed name, ${rules} rules`, rounds: 7, baseline: 'no rules',
      measures: [{ key: 'upload', label: 'upload', unit: 'MB/s' }, { key: 'download', label: 'download', unit: 'MB/s' }],
      contenders: { 'no rules': async () => (await streams()).free, 'one rule that knows connections': async () => (await streams()).tracked, sidecar: async () => (await streams()).guarded },
      goals: [{ contender: 'sidecar', measure: 'upload', sense: 'at least', limit: 0.97 }, { contender: 'sidecar', measure: 'download', sense: 'at least', limit: 0.97 }],
      notes: [`${slices} connections a round for each and each way, in turns. The row in the middle is what the kernel takes for remembering connections at all, whatever the rules.`],
    }],
    notes: [`Sidecar: dns+nft, default deny, ${rules} rules (networks, addresses, one name), ${learned} addresses learned, for both loads.`],
  }
}

type FirstUse = { readonly free: Sample; readonly guarded: Sample; readonly beyond: Sample }

function firstUse(guarded: Client, free: Client): () => Promise<FirstUse> {
  let round = 0
  return async () => {
    round++
    const times: { guarded: number[]; free: number[] } = { guarded: [], free: [] }
    for (let done = 0; done < firstUses; done += turn) {
      times.free.push(...(await free(`first r${round}t${done}n ${turn}`) as number[]))
      times.guarded.push(...(await guarded(`first r${round}t${done}n ${turn}`) as number[]))
    }
    const [own, bare] = [summary(times.guarded), summary(times.free)]
    return { guarded: own, free: bare, beyond: { p50: own.p50 - bare.p50, p99: own.p99 - bare.p99 } }
  }
}

type Streams<T> = { readonly free: T; readonly tracked: T; readonly guarded: T }

function streamAll(clients: Streams<Client>, seconds: number): () => Promise<Streams<Sample>> {
  return async () => {
    const sums = { free: { upload: 0, download: 0 }, tracked: { upload: 0, download: 0 }, guarded: { upload: 0, download: 0 } }
    for (let slice = 0; slice < slices; slice++) {
      const turns = ['free', 'tracked', 'guarded'] as const
      for (const way of ['upload', 'download'] as const) for (const name of slice % 2 === 0 ? turns : turns.toReversed()) sums[name][way] += (await clients[name](`${way} ${seconds}`) as number) / 1e6 / slices
    }
    return sums
  }
}

function summary(times: readonly number[]): { p50: number; p99: number } {
  const sorted = times.toSorted((a, b) => a - b)
  return { p50: percentile(sorted, 0.5), p99: percentile(sorted, 0.99) }
}

/** Contenders that are measured together: the first of them to be asked in a round does the work for all. */
function sharedByRound<T>(contenders: number, measure: () => Promise<T>): () => Promise<T> {
  let calls = 0
  let current: Promise<T> | undefined
  return () => {
    if (calls++ % contenders === 0) current = measure()
    return current!
  }
}

async function startOwn(island: Island, cleanups: Cleanups): Promise<void> {
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-flows-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const places = Array.from({ length: rules - 1 }, (_, i) => `10.${i >> 8}.${i & 255}.${i % 2 === 0 ? '1' : '0/24'}`)
  const file = path.join(folder, 'policy.json')
  // More than one environment variable holds.
  await writeFile(file, JSON.stringify({ defaultAction: 'deny', egress: [...places, '*.bench.example'].map((target) => ({ action: 'allow', target })) }))
  await startSidecar(island, { OPENSANDBOX_EGRESS_POLICY_FILE: file }, cleanups)
}

/** The least that any firewall with a memory does: replies of known connections pass. */
async function trackConnections({ name }: Island): Promise<void> {
  await runCommand('nft', ['add table inet tracked; add chain inet tracked out { type filter hook output priority 0; }; add rule inet tracked out ct state established accept'], { namespace: name })
}

function startClient({ name, upstream }: Island, cleanups: Cleanups): Client {
  const child = execa('ip', ['netns', 'exec', name, 'setpriv', '--pdeathsig', 'KILL', '--', process.execPath, path.join(peers, 'sandbox-client.ts'), upstream], { reject: false, buffer: false })
  let said = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (said = (said + text).slice(-2000)))
  cleanups.add(async () => void (child.stdin.end(), child.kill('SIGKILL'), await child))
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  return async (order) => {
    child.stdin.write(`${order}\n`)
    const { value, done } = await lines.next()
    if (done === true) throw new Error(`the sandbox of the bench ended at "${order}": ${said}`)
    return JSON.parse(value as string) as unknown
  }
}

/** Whether a socket is bound to the port in that namespace. */
function listens(namespace: string, protocol: 'udp' | 'tcp', port: number): () => Promise<boolean> {
  return async () => (await runCommand('ss', ['--no-header', '--listening', `--${protocol}`, '--numeric'], { namespace })).includes(`:${port} `)
}
