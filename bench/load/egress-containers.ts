/**
 * Sidecars as containers of the one image, as the server makes them: how long from the start to ready, and what twenty of them need of the
 * machine's memory. Beside the first the same container with a Node that does nothing: what starting a container costs here is not ours.
 */
import Docker from 'dockerode'
import { readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { labels } from '#policies/wire.ts'
import { childrenOf, type Cleanups } from '../program.ts'
import type { Arena, Effort, Sample, Target } from '../rounds.ts'

const instance = 'sp-bench-egress'
const image = 'sallyport/egress:local'
const crowd = 20
const policy = { defaultAction: 'deny', egress: [{ action: 'allow', target: '*.bench.example' }] }
const kinds = { sidecar: undefined, idle: ['/usr/bin/node', '-e', 'setInterval(() => 0, 1e6)'] } as const
type Kind = keyof typeof kinds
const mebibyte = 2 ** 20

export const egressContainers: Target = { title: 'Egress sidecar: start and memory', start }

async function start(_: Effort, cleanups: Cleanups): Promise<Arena> {
  const docker = new Docker()
  await removeLeftovers(docker)
  cleanups.add(() => removeLeftovers(docker))
  await docker.createNetwork({ Name: instance, Driver: 'bridge', EnableIPv6: false, Options: { 'com.docker.network.bridge.name': 'sp-bench2', 'com.docker.network.bridge.enable_icc': 'false' } })
  for (const kind of ['sidecar', 'idle'] as const) await remove(await run(docker, kind))

  const [bare, sidecar] = ['a Node that does nothing', 'sidecar']
  return {
    loads: [{
      title: 'one container', rounds: 7, baseline: bare,
      measures: [{ key: 'started', label: 'docker start', unit: 'ms' }, { key: 'ready', label: 'docker start to ready', unit: 'ms' }, { key: 'own', label: 'its process to ready', unit: 'ms' }],
      contenders: { [bare]: () => timeStart(docker, 'idle'), [sidecar]: () => timeStart(docker, 'sidecar') },
      goals: [{ contender: sidecar, measure: 'ready', against: null, sense: 'at most', limit: 250 }, { contender: sidecar, measure: 'own', against: null, sense: 'at most', limit: 250 }],
      notes: ['Ready is 200 from /healthz, asked every 2 ms; for the Node that does nothing, when `docker start` has returned and an inspect says so. What comes before the process, whose start Docker notes, is Docker\'s: namespaces, a bridge port, rules.'],
    }, {
      title: `${crowd} sidecars at once`, rounds: 7, baseline: sidecar,
      measures: [{ key: 'pss', label: 'PSS of one', unit: 'MiB' }, { key: 'private', label: 'of it private', unit: 'MiB' }],
      contenders: { [sidecar]: () => weigh(docker) },
      goals: [{ contender: sidecar, measure: 'pss', against: null, sense: 'at most', limit: 28 }, { contender: sidecar, measure: 'pss', against: null, sense: 'at most', limit: 20 }],
      notes: ['PSS: Node and its nft child, what is shared counted in parts (smaps_rollup); the mean of all, two seconds after the last was ready. 28 is the limit, 20 the aim.'],
    }],
    notes: ['The server\'s own settings: NET_ADMIN only, cgroup exemption, one processor, 256 MiB, 128 processes, read-only.'],
  }
}

type Running = { readonly container: Docker.Container; readonly pid: number; readonly times: Sample }

async function run(docker: Docker, kind: Kind): Promise<Running> {
  const container = await docker.createContainer({
    Image: image, Labels: { [labels.instance]: instance }, ...(kinds[kind] === undefined ? {} : { Entrypoint: [...kinds[kind]] }),
    Env: [`OPENSANDBOX_EGRESS_RULES=${JSON.stringify(policy)}`, 'OPENSANDBOX_EGRESS_MODE=dns+nft', 'OPENSANDBOX_EGRESS_EXEMPTION=auto', 'OPENSANDBOX_EGRESS_DNS_UPSTREAM=198.51.100.53:53', 'OPENSANDBOX_EGRESS_TOKEN=bench'],
    HostConfig: {
      NetworkMode: instance, CapDrop: ['ALL'], CapAdd: ['NET_ADMIN'], SecurityOpt: ['no-new-privileges:true'],
      Sysctls: { 'net.ipv6.conf.all.disable_ipv6': '1', 'net.ipv6.conf.default.disable_ipv6': '1', 'net.ipv6.conf.lo.disable_ipv6': '1' },
      NanoCpus: 1e9, Memory: 256 * mebibyte, PidsLimit: 128, ReadonlyRootfs: true, ...({ CgroupnsMode: 'host' } as object),
    },
  })
  const begin = performance.now()
  await container.start()
  const started = performance.now() - begin
  const { State, NetworkSettings } = await container.inspect()
  if (kind === 'sidecar') await healthy(NetworkSettings.Networks[instance]?.IPAddress ?? '')
  return { container, pid: State.Pid, times: { started, ready: performance.now() - begin, own: Date.now() - Date.parse(State.StartedAt) } }
}

async function healthy(address: string): Promise<void> {
  for (const deadline = performance.now() + 20_000; performance.now() < deadline; await delay(2)) {
    const answer = await fetch(`http://${address}:18080/healthz`, { signal: AbortSignal.timeout(500) }).catch(() => undefined)
    await answer?.arrayBuffer()
    if (answer?.status === 200) return
  }
  throw new Error('the sidecar was not ready after 20 s')
}

async function timeStart(docker: Docker, kind: Kind): Promise<Sample> {
  const running = await run(docker, kind)
  await remove(running)
  return running.times
}

async function weigh(docker: Docker): Promise<Sample> {
  const all: Running[] = []
  // Two at a time, as many as there are processors here.
  for (let i = 0; i < crowd; i += 2) all.push(...await Promise.all([run(docker, 'sidecar'), run(docker, 'sidecar')]))
  await delay(2000)
  const sizes = all.map(({ pid }) => [pid, ...childrenOf(pid)].map(readSizes))
  await Promise.all(all.map((running) => remove(running)))
  const mean = (key: 'pss' | 'private'): number => sizes.flat().reduce((sum, size) => sum + size[key], 0) / crowd
  return { pss: mean('pss'), private: mean('private') }
}

/** MiB of one process, proc(5) smaps_rollup. */
function readSizes(pid: number): { pss: number; private: number } {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8')
  const kilobytes = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(text)?.[1] ?? NaN)
  return { pss: kilobytes('Pss') / 1024, private: (kilobytes('Private_Clean') + kilobytes('Private_Dirty')) / 1024 }
}

function remove({ container }: Running): Promise<unknown> {
  return container.remove({ force: true, v: true })
}

/** Everything of ours in the engine, also from a run that was killed. */
async function removeLeftovers(docker: Docker): Promise<void> {
  const ignoreGone = (error: { statusCode?: number }): void => {
    if (error.statusCode !== 404) throw error
  }
  const containers = await docker.listContainers({ all: true, filters: { label: [`${labels.instance}=${instance}`] } })
  await Promise.all(containers.map(({ Id }) => docker.getContainer(Id).remove({ force: true, v: true }).catch(ignoreGone)))
  await docker.getNetwork(instance).remove().catch(ignoreGone)
}
