/**
 * The sidecar is killed with -9 at random points: while it starts, while its sandbox asks and connects as fast as it can, while its policy
 * changes. One sandbox after the other, then several at once. What counts is what arrived outside, and what is left of the group. `SEED=<n>` repeats a run.
 */
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { request } from 'undici'
import { headerNames, labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { attackCommand, packetsTo, questionsFor } from '#test/support/attack.ts'
import { docker, sandboxImage } from '#test/support/containers.ts'
import { fetchThrough, openDoor } from '#test/support/doors.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { randomOf } from '#test/support/random.ts'
import { sized } from '#test/support/size.ts'
import { startStack, type Stack } from '#test/support/stack.ts'
import { findTraces, readMarks, type Marks } from '#test/support/traces.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(sized(235_000, 1_800_000))

const denied = '198.51.100.31'
const zones = { '*.allowed.example': { a: ['198.51.100.32'] }, '*.leak.example': { a: ['198.51.100.33'] } }
/** Seconds after which a group must be gone. */
const promised = 2
/** So many sandboxes at a time, and how many of them keep the promise: storms that compete for two processors may make some of them late. */
const crowds = [{ lanes: 1, share: 0.5, most: 1 }, { lanes: 4, share: 0.5, most: sized(0.9, 1) }] as const
/** Seconds within which the latest is gone. */
const patience = 20

/** Within so many ms behind the start of the sidecar, the first packet outside, the first of many changes of the policy. */
const points = { 'start-up': 900, load: 400, 'policy change': 250 } as const
type Point = keyof typeof points
type Kill = { readonly number: number; readonly point: Point; readonly after: number }
type Sidecar = { readonly sandbox: string; readonly group: string; readonly pid: number; readonly token: string; readonly marks: Marks }

t.test('killed at random points', async (t) => {
  const random = randomOf(t)
  const count = sized(20, 200)
  const kills = Array.from({ length: count }, (_, number): Kill => {
    const point = (Object.keys(points) as Point[])[number % 3]!
    return { number, point, after: random.between(0, points[point]) }
  })
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet, gateways: ['uri'] })
  await stormIsReal(t, internet, stack)
  await using starts = await watchStarts(stack)

  for (const { lanes, share, most } of crowds) {
    const waiting = kills.splice(0, Math.round(count * share))
    const wanted = waiting.length
    const times: number[] = []
    await Promise.all(Array.from({ length: lanes }, async () => {
      for (let kill = waiting.shift(); kill !== undefined; kill = waiting.shift()) times.push(await killOne(t, { internet, stack, starts }, kill))
    }))
    t.equal(times.length, wanted)
    times.sort((a, b) => a - b)
    const late = times.filter((time) => time > promised).length
    t.comment(`${times.length} kills, ${lanes} at a time: gone after ${times[times.length >> 1]?.toFixed(2)} s (median), ${times.at(-1)?.toFixed(2)} s at most`)
    t.ok(late <= times.length * (1 - most), `${lanes} at a time: ${late} of ${times.length} took longer than ${promised} s`)
  }
  t.equal(kills.length, 0)
  t.equal(packetsTo(await internet.flows(), denied), 0, 'at no moment did anything reach the denied place')
  t.equal(questionsFor(await internet.questions(), 'leak.example'), 0, 'nor was a denied name asked for')
  t.equal(await internet.strays(), 0)

  const after = await stack.create({ networkPolicy: policyOf(count) })
  t.match((await after.run(['curl', '-sS', '-m', '5', 'http://new.allowed.example/works'])).stdout, 'GET /works', 'and a new sandbox works')
})

type Range = { readonly internet: Internet; readonly stack: Stack; readonly starts: Starts }

/** Makes a sandbox, kills its sidecar at the wanted moment; seconds until no container, address or route of the group was left. */
async function killOne(t: Test, { internet, stack, starts }: Range, { number, point, after }: Kill): Promise<number> {
  const why = `kill ${number}, ${point}, after ${after} ms`
  const body = { image: { uri: sandboxImage }, entrypoint: storm(number), resourceLimits: {}, timeout: 600, networkPolicy: policyOf(number) }
  const created = stack.api.call<{ id?: string }>('POST', '/v1/sandboxes', body)
  const sidecar = await starts.of(number)
  if (point !== 'start-up') await eventually(`${why}: the sandbox is heard`, async () => packetsTo(await internet.flows(), ownPlace(number)) || undefined, 30)
  const changes = changesOf(sidecar, number)
  if (point === 'policy change') t.equal((await changes.next()).done, false, `${why}: its policy changes`)
  const changing = point === 'policy change' ? changeUntilRefused(changes) : Promise.resolve()
  await delay(after)
  killNow(sidecar)
  const killed = performance.now()

  const left = (): Promise<string[]> => leftOf(stack, sidecar)
  const remains = await eventually(why, async () => ((await left()).length === 0 ? [] : undefined), patience).catch(left)
  const seconds = (performance.now() - killed) / 1000
  t.same(remains, [], `${why}: no container, address or route is left`)
  t.ok([202, 500].includes((await created).status), `${why}: the create was answered, with ${(await created).status}`)
  // What hangs on the bridge may be another sandbox's.
  const traces = async (): Promise<string[]> => Object.entries(await findTraces(stack, sidecar.marks)).flatMap(([kind, found]) => (kind === 'links' ? [] : found.map((one) => `${kind}: ${one}`)))
  t.same(await eventually(why, async () => ((await traces()).length === 0 ? [] : undefined), patience).catch(traces), [], `${why}: nor anything else`)
  await changing
  return seconds
}

function ownPlace(number: number): string {
  return `198.18.${70 + (number >> 8)}.${number & 255}`
}

/** From its first moment to its last the sandbox does everything it can to be heard at its own place and at the denied one. */
function storm(number: number): string[] {
  return attackCommand('storm', ownPlace(number), denied, 'allowed.example', 'leak.example')
}

function policyOf(number: number): object & { egress: { action: string; target: string }[]; defaultAction: string } {
  return { defaultAction: 'deny', egress: [ownPlace(number), '*.allowed.example'].map((target) => ({ action: 'allow', target })) }
}

async function stormIsReal(t: Test, internet: Internet, stack: Stack): Promise<void> {
  const open = await stack.create({ entrypoint: storm(255) })
  const heard = await eventually('a sandbox without a policy is heard everywhere', async () => {
    const flows = await internet.flows()
    const all = flows.some(({ to, protocol }) => to === denied && protocol === 'tcp') && flows.some(({ to, protocol }) => to === denied && protocol === 'udp')
    return all && questionsFor(await internet.questions(), 'leak.example') > 0 ? true : undefined
  })
  t.ok(heard, 'the storm is real')
  await open.remove()
  await internet.forget()
}

/** Containers of the group, its address in Docker's network, a way to it through the gateway. */
async function leftOf(stack: Stack, { sandbox, group, marks }: Sidecar): Promise<string[]> {
  const [containers, network, door] = await Promise.all([
    docker.listContainers({ all: true, filters: { label: [`${labels.group}=${group}`] } }),
    docker.getNetwork(stack.network).inspect() as Promise<{ Containers?: object }>,
    fetchThrough(openDoor('uri', stack.gateways.get('uri')!.url.replace('http://', ''), sandbox, 8080), '/'),
  ])
  return [
    ...containers.map(({ Names, State }) => `${Names.join()} ${State}`),
    ...Object.keys(network.Containers ?? {}).filter((id) => marks.containers.includes(id)),
    ...(door.status === 404 || /not ready: \S+ \(Failed\)/.test(door.body.toString()) ? [] : [`route: ${door.status} ${door.body.toString()}`]),
  ]
}

/** New rules, many and few in turn, one change each; ends when nobody takes them any more. */
async function* changesOf({ token, marks }: Sidecar, number: number): AsyncGenerator<number, void> {
  const { egress, defaultAction } = policyOf(number)
  const many = Array.from({ length: 200 }, (_, i) => ({ action: 'allow', target: i % 2 === 0 ? `10.1.${i >> 8}.${i & 255}` : `10.2.${i & 255}.0/24` }))
  for (let taken = 0; ; taken++) {
    const body = JSON.stringify({ defaultAction, egress: taken % 2 === 0 ? [...egress, ...many] : egress })
    const answer = await request(`http://${marks.address}:18080/policy`, { method: 'POST', headers: { [headerNames.egressAuth]: token }, body, headersTimeout: 10_000 }).catch(() => undefined)
    if (answer?.statusCode !== 200) return
    await answer.body.dump()
    yield taken
  }
}

async function changeUntilRefused(changes: AsyncGenerator<number, void>): Promise<void> {
  while ((await changes.next()).done === false);
}

/** Only when that process is still the one of the container: this machine is not ours alone. */
function killNow({ pid, marks }: Sidecar): void {
  if (readFileSync(`/proc/${pid}/cgroup`, 'utf8').includes(marks.containers[0]!)) process.kill(pid, 'SIGKILL')
}

type Starts = AsyncDisposable & {
  /** The sidecar of the sandbox of that number, the moment its container has started. */
  of(number: number): Promise<Sidecar>
}

/** Learns from Docker's own events which sidecars start; told apart by the place that their policy allows. */
async function watchStarts(stack: Stack): Promise<Starts> {
  const stream = (await docker.getEvents({ filters: JSON.stringify({ type: ['container'], event: ['start'], label: [`${labels.instance}=${stack.instance}`] }) })) as Readable & { destroy(): void }
  const found = new Map<string, (sidecar: Sidecar) => void>()
  createInterface({ input: stream }).on('line', (line) => {
    const { id } = JSON.parse(line) as { id: string }
    void look(id).catch(() => undefined)
  })

  async function look(id: string): Promise<void> {
    const { Config, State } = await docker.getContainer(id).inspect()
    const sandbox = Config.Labels[labels.egressSidecarFor]
    const place = /"(198\.18\.\d+\.\d+)"/.exec(Config.Env.join('\n'))?.[1]
    if (sandbox === undefined || place === undefined) return
    const token = Config.Env.find((entry) => entry.startsWith('OPENSANDBOX_EGRESS_TOKEN='))?.split('=')[1] ?? ''
    found.get(place)?.({ sandbox, token, group: Config.Labels[labels.group] ?? '', pid: State.Pid, marks: await readMarks(stack, [id]) })
  }

  return {
    of: (number) => new Promise((resolve) => found.set(ownPlace(number), resolve)),
    async [Symbol.asyncDispose]() {
      stream.destroy()
    },
  }
}
