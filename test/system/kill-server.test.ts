/**
 * The lifecycle server is killed with -9 while clients create, renew, pause, resume, change and delete sandboxes and others expire, and started
 * again: at any time, at any call it makes to Docker (before the engine gets it and after it has carried it out), and while it comes back.
 * Sandboxes live through many kills. Whatever the moment: what was answered is so, every sandbox is complete and has its rules or there is
 * nothing of it, none ends early, and none lives longer than 2 s past its time or the server's return. What counts as reached is what was
 * counted on the sandboxes' bridge.
 */
import { readdir, readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { execa } from 'execa'
import t from 'tap'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { attackCommand, packetsTo } from '#test/support/attack.ts'
import { docker, sandboxImage } from '#test/support/containers.ts'
import { startEngineProxy, type EngineProxy } from '#test/support/engine-proxy.ts'
import { startFence, type Fence } from '#test/support/fence.ts'
import { namePrefix, programsFile } from '#test/support/leftovers.ts'
import { eventually } from '#test/support/program.ts'
import { randomOf, type Random } from '#test/support/random.ts'
import { sized } from '#test/support/size.ts'
import { startStack, type Stack } from '#test/support/stack.ts'
import { Store } from '../../server/store.ts'
import { Load } from './kill-load.ts'

await needs('root', 'docker', 'nft', 'iptables')
t.setTimeout(sized(235_000, 2_300_000))

const [allowed, denied] = ['198.51.100.30', '198.51.100.31']
/** Knocks at both places from its first moment on: one that ever ran without its rules was heard at the wrong one. */
const knocking = { image: { uri: sandboxImage }, entrypoint: attackCommand('beacon', allowed, denied), resourceLimits: {}, timeout: 600 }
const guarded = { ...knocking, networkPolicy: { egress: [{ action: 'allow', target: allowed }] } }
const plain = { ...knocking, entrypoint: ['sleep', '3600'] }
/** ms a sandbox may live on, beside the time the engine takes. */
const late = 2000

t.test('killed at any moment of a mixed load', async (t) => {
  const random = randomOf(t)
  await using fence = await startFence()
  await using proxy = await startEngineProxy(join(tmpdir(), `${namePrefix}${process.pid}-engine.sock`))
  await using stack = await startStack({ internet: fence, env: { DOCKER_HOST: proxy.dockerHost } })
  const open = await stack.create({ entrypoint: knocking.entrypoint })
  t.ok(await eventually('a sandbox without a policy is heard', async () => packetsTo(await fence.flows(), denied) || undefined), 'the knocking is real')
  await open.remove()
  await fence.forget()

  const watch = await watchEnds(stack, proxy)
  t.teardown(() => watch.close())
  const load = new Load(stack, random, [guarded, guarded, plain])
  const addresses = new Set<string>()
  for (let kill = 1; kill <= sized(20, 200); kill++) {
    // The first one may also meet the proof that sidecars hold, which is done once.
    if (kill > 1) await load.fill()
    if (kill % 4 === 0) await load.shorten(random.between(300, 2500))
    const moment = momentOf(random)
    const gone = killAt(moment, proxy, stack)
    await Promise.all([gone, load.run(gone)])
    watch.away()
    if (random.between(1, 4) === 1) await killWhileItStarts(stack, random.between(0, 900))
    await stack.startServer()
    watch.back()
    const problems = await settled(stack, load, fence)
    t.same([...problems, ...load.faults, ...watch.faults(load)], [], `kill ${kill}, ${moment.text}`)
    for (const { NetworkSettings } of await stack.containers()) for (const { IPAddress } of Object.values(NetworkSettings.Networks)) if (IPAddress !== '') addresses.add(IPAddress)
  }
  t.comment(JSON.stringify({ sandboxes: load.known.size, answered: load.answered, ends: watch.ends }))
  for (const what of ['create', 'renew', 'patch', 'pause', 'resume', 'delete']) t.ok((load.answered[what] ?? 0) > 0, `the load holds ${what}`)
  t.ok(watch.ends.expired > 0, 'and sandboxes that expire')

  for (const { id } of await stack.api.list()) t.equal((await stack.api.call('DELETE', `/v1/sandboxes/${id}`)).status, 204)
  t.same((await stack.containers()).map(({ Names, State }) => [Names, State]), [], 'deleted: no container is left')
  t.same(await endpoints(stack), [], 'no network endpoint')
  t.same((await execa({ reject: false })`ip -o link show master ${stack.bridge}`).stdout, '', 'no link')
  t.ok(addresses.size > 0)
  t.same((await execa`ps -eo args`).stdout.split('\n').filter((line) => /^\S*docker-proxy /.test(line) && line.split(' ').some((word) => addresses.has(word))), [], 'no host port')
  await stack.server.stop()
  const store = new Store(join(stack.folder, 'sallyport.db'))
  t.same(store.all(), [], 'no record')
  store.close()
  t.same((await docker.listNetworks()).filter(({ Name }) => Name === stack.network), [], 'the server ended: no network')
  const rules = (await Promise.all([execa`iptables-save`, execa`nft list table inet sallyport_host`.catch(() => ({ stdout: '' }))])).flatMap(({ stdout }) => stdout.split('\n'))
  t.same(rules.filter((line) => line.includes(stack.bridge)), [], 'no rule')
  t.same((await readdir(stack.folder)).filter((name) => !/^(config\.toml|programs|sallyport\.db(-wal|-shm)?)$/.test(name)), [], 'no file')
})

type Moment = { readonly text: string; readonly after: number; readonly call: number; readonly side: 'before' | 'after' }

/** Half of them by the clock, half at a call to the engine; a call that does not come is not waited for. */
function momentOf(random: Random): Moment {
  const after = random.between(0, 1200)
  const call = random.between(0, 40)
  const side = random.pick(['before', 'after'] as const)
  return random.pick([{ text: `after ${after} ms`, after, call: Infinity, side }, { text: `${side} call ${call}`, after: 1500, call, side }])
}

/** Resolves when the server is dead. The engine finishes what it was told before. */
async function killAt({ after, call, side }: Moment, proxy: EngineProxy, stack: Stack): Promise<void> {
  const [due, asked] = [new AbortController(), proxy.hook]
  let seen = -1
  let dead: Promise<unknown> | undefined
  proxy.hook = (each, when) => {
    asked(each, when)
    if (dead !== undefined) return 'drop'
    if (when === 'before') seen++
    if (seen !== call || when !== side) return 'pass'
    dead = stack.server.stop('SIGKILL')
    due.abort()
    return 'drop'
  }
  await delay(after, undefined, { signal: due.signal }).catch(() => undefined)
  dead ??= stack.server.stop('SIGKILL')
  await dead
  proxy.hook = asked
}

/** Once more, while it reads its store or compares it with what there is. */
async function killWhileItStarts(stack: Stack, after: number): Promise<void> {
  const started = stack.startServer().then(() => undefined, () => undefined)
  await delay(after)
  const pids = (await readFile(join(stack.folder, programsFile), 'utf8')).trim().split('\n')
  process.kill(Number(pids.at(-1)), 'SIGKILL')
  await started
}

/** Waits until server, engine and clients agree, and says where they do not. What an engine carried out after the server's return is found within half a minute. */
async function settled(stack: Stack, load: Load, fence: Fence): Promise<string[]> {
  const before = await fence.flows()
  let problems: string[] = []
  await eventually('server, engine and clients agree', async () => {
    problems = await disagreements(stack, load, before, fence)
    return problems.length === 0 ? true : undefined
  }, 45).catch(() => undefined)
  return problems
}

async function disagreements(stack: Stack, load: Load, before: Awaited<ReturnType<Fence['flows']>>, fence: Fence): Promise<string[]> {
  const [listed, containers, attached] = [await stack.api.list(), await stack.containers(), await endpoints(stack)]
  const problems: string[] = []
  const now = Date.now()
  for (const body of listed) {
    if (body.status.reason === 'CREATE_INTERRUPTED' && !load.known.has(body.id) && !containers.some(({ Labels }) => Labels[labels.id] === body.id || Labels[labels.egressSidecarFor] === body.id)) {
      // Its client was told Pending, and is told now what became of it: nothing is there.
      await stack.api.call('DELETE', `/v1/sandboxes/${body.id}`)
      continue
    }
    if (body.status.state !== 'Running' && body.status.state !== 'Paused') {
      problems.push(`${body.id} is ${JSON.stringify(body.status)}`)
      continue
    }
    const known = load.known.get(body.id) ?? load.adopt(body)
    const expiresAt = Date.parse(body.expiresAt ?? '')
    if (known.deletion === 'answered') problems.push(`${body.id} was deleted`)
    if (known.most + late < now) problems.push(`${body.id} lives on ${now - known.most} ms after its time`)
    if (!(expiresAt >= known.least && expiresAt <= known.most)) problems.push(`${body.id} expires at ${expiresAt}, not ${known.least}–${known.most}`)
    if (!known.metadata.includes(JSON.stringify(body.metadata))) problems.push(`${body.id} has the metadata ${JSON.stringify(body.metadata)}, not ${known.metadata.join(' or ')}`)
    if (known.paused !== 'perhaps' && known.paused !== (body.status.state === 'Paused')) problems.push(`${body.id} is ${body.status.state}`)
    known.paused = body.status.state === 'Paused'
    // A delete that was not heard was not done.
    if (known.deletion === 'asked') known.deletion = 'no'
  }
  for (const known of load.known.values()) {
    if (listed.some(({ id }) => id === known.id)) continue
    if (known.deletion === 'no' && known.least > now) problems.push(`${known.id} is not there`)
    else if (known.deletion !== 'no' || known.most < now) known.deletion = 'answered'
  }
  const flows = await fence.flows()
  const ours = new Set(containers.map(({ Id }) => Id))
  for (const id of attached) if (!ours.has(id)) problems.push(`endpoint of ${id}`)
  for (const { Names, Labels } of containers) if (!listed.some(({ id }) => id === (Labels[labels.id] ?? Labels[labels.egressSidecarFor]))) problems.push(`container ${Names.join()} belongs to no sandbox`)
  for (const { id, status } of listed.filter((each) => load.known.has(each.id))) {
    const main = containers.find(({ Labels }) => Labels[labels.id] === id)
    if (main?.State !== status.state.toLowerCase()) problems.push(`${id} is ${status.state}, its container ${main?.State}`)
    if (main?.Labels[labels.egressAuthToken] === undefined) continue
    const gate = containers.find(({ Labels }) => Labels[labels.egressSidecarFor] === id)
    if (gate?.State !== 'running') problems.push(`${id}: its sidecar is ${gate?.State}`)
    const from = Object.values(gate?.NetworkSettings.Networks ?? {})[0]?.IPAddress
    const heard = (all: typeof flows): number => packetsTo(all.filter((flow) => flow.from === from), allowed)
    if (status.state === 'Running' && heard(flows) <= heard(before)) problems.push(`${id} is not heard where it may go`)
  }
  if (packetsTo(flows, denied) > 0) problems.push('something was heard at the denied place')
  return problems
}

async function endpoints(stack: Stack): Promise<string[]> {
  const network = await docker.getNetwork(stack.network).inspect().catch(() => ({})) as { Containers?: object }
  return Object.keys(network.Containers ?? {})
}

type Watch = { readonly ends: { expired: number; deleted: number }; away(): void; back(): void; faults(load: Load): string[]; close(): void }

/**
 * When main containers end, from the engine's events, and when the server asked for it: the time between is the engine's. Its slowest answer
 * comes on top: before it asks for an end the server asks what there is.
 */
async function watchEnds(stack: Stack, proxy: EngineProxy): Promise<Watch> {
  const stream = await docker.getEvents({ filters: JSON.stringify({ type: ['container'], event: ['die'], label: [`${labels.instance}=${stack.instance}`, `${labels.role}=main`] }) })
  const [asked, calls, died] = [new Map<string, number>(), new Map<object, number>(), new Map<string, { at: number; container: string; up: number }>()]
  const ends = { expired: 0, deleted: 0 }
  let [up, slowest, rest] = [Date.now(), 0, '']
  proxy.hook = (call, moment) => {
    const removed = /^\/containers\/([0-9a-f]{64})\?/.exec(call.path)?.[1]
    if (call.method === 'DELETE' && removed !== undefined && moment === 'before') asked.set(removed, Math.min(asked.get(removed) ?? Infinity, Date.now()))
    if (moment === 'before') calls.set(call, Date.now())
    else slowest = Math.max(slowest, Date.now() - (calls.get(call) ?? Infinity))
    return 'pass'
  }
  stream.setEncoding('utf8')
  stream.on('data', (chunk: string) => {
    const lines = (rest + chunk).split('\n')
    rest = lines.pop() ?? ''
    for (const line of lines.filter(Boolean)) {
      const { timeNano, Actor } = JSON.parse(line) as { timeNano: number; Actor: { ID: string; Attributes: Record<string, string> } }
      died.set(Actor.Attributes[labels.id] ?? '', { at: Math.floor(timeNano / 1e6), container: Actor.ID, up })
    }
  })
  return {
    ends,
    away: () => void (up = Infinity),
    back: () => void (up = Date.now()),
    faults(load) {
      const faults: string[] = []
      for (const [id, { at, container, up: since }] of died) {
        const known = load.known.get(id)
        died.delete(id)
        // Of a create that nobody was told of.
        if (known === undefined) continue
        if (known.deletion === 'asked' || (known.deletion === 'answered' && known.most > at)) {
          ends.deleted++
          continue
        }
        ends.expired++
        if (at < known.least) faults.push(`${id} ended ${known.least - at} ms early`)
        const waited = Math.min(asked.get(container) ?? at, at) - Math.max(known.most, since)
        if (waited > late + slowest) faults.push(`${id} was ended ${waited} ms late (the engine's slowest answer took ${slowest} ms)`)
      }
      slowest = 0
      return faults
    },
    close: () => (stream as unknown as { destroy(): void }).destroy(),
  }
}
