/** Everything a sandbox leaves on a machine, found by looking and not by asking the server that made it. */
import { execa } from 'execa'
import { readdir, readFile, readlink, realpath, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { docker } from './containers.ts'
import type { Stack } from './stack.ts'

/** What a sandbox was known by while it ran. */
export type Marks = {
  readonly containers: readonly string[]
  /** Inode of its network namespace and the file Docker pins it with. */
  readonly namespace: string
  readonly pin: string
  readonly address: string
  /** Where their file systems are mounted. */
  readonly roots: readonly string[]
  readonly volumes: readonly string[]
}

export type Traces = Readonly<Record<'containers' | 'endpoints' | 'links' | 'processes' | 'namespaces' | 'cgroups' | 'files' | 'mounts' | 'rules' | 'volumes', readonly string[]>>

/** @param containers the owner of the namespace first; running */
export async function readMarks(stack: Stack, containers: readonly string[]): Promise<Marks> {
  const inspected = await Promise.all(containers.map((id) => docker.getContainer(id).inspect()))
  const owner = inspected[0]!
  return {
    containers,
    namespace: await readlink(`/proc/${owner.State.Pid}/ns/net`),
    pin: await realpath(owner.NetworkSettings.SandboxKey),
    roots: inspected.map(({ GraphDriver }) => (GraphDriver.Data as { MergedDir?: string }).MergedDir ?? ''),
    address: owner.NetworkSettings.Networks[stack.network]?.IPAddress ?? '',
    volumes: inspected.flatMap(({ Mounts }) => Mounts.flatMap((mount) => (mount.Type === 'volume' && mount.Name !== undefined ? [mount.Name] : []))),
  }
}

export async function findTraces(stack: Stack, marks: Marks): Promise<Traces> {
  const named = (text: string): boolean => marks.containers.some((id) => text.includes(id))
  const root = (await docker.info() as { DockerRootDir: string }).DockerRootDir
  const [containers, endpoints, links, volumes, mounts, rules] = await Promise.all([
    docker.listContainers({ all: true }).then((all) => all.map(({ Id }) => Id).filter(named)),
    docker.getNetwork(stack.network).inspect().then((network) => Object.keys((network as { Containers?: object }).Containers ?? {}).filter(named)),
    execa({ reject: false })`ip -o link show master ${stack.bridge}`.then(({ stdout }) => stdout.split('\n').filter(Boolean)),
    docker.listVolumes().then(({ Volumes }) => Volumes.map(({ Name }) => Name).filter((name) => marks.volumes.includes(name))),
    readFile('/proc/self/mounts', 'utf8').then((text) => text.split('\n').filter((line) => named(line) || [marks.pin, ...marks.roots].includes(line.split(' ')[1] ?? ''))),
    rulesWith(marks.address),
  ])
  return {
    containers,
    endpoints,
    links,
    volumes,
    mounts,
    rules,
    processes: await processesIn(marks.namespace),
    namespaces: await pinned(marks),
    cgroups: (await execa({ reject: false })`find /sys/fs/cgroup -maxdepth 4 -type d -path */docker/*`).stdout.split('\n').filter(named),
    files: (await readdir(join(root, 'containers'))).filter(named),
  }
}

async function rulesWith(address: string): Promise<string[]> {
  const listed = await Promise.all([execa`iptables-save`, execa`nft list ruleset`])
  const word = new RegExp(`(^|[^0-9.])${address.replaceAll('.', '\\.')}([^0-9.]|$)`)
  return listed.flatMap(({ stdout }) => stdout.split('\n')).filter((line) => word.test(line))
}

async function processesIn(namespace: string): Promise<string[]> {
  const pids = (await readdir('/proc')).filter((name) => /^\d+$/.test(name))
  const links = await Promise.all(pids.map((pid) => readlink(`/proc/${pid}/ns/net`).catch(() => '')))
  return pids.filter((_, index) => links[index] === namespace)
}

/** Docker takes an empty file away a minute later; what counts is whether the namespace is still mounted on it. */
async function pinned({ pin, namespace }: Marks): Promise<string[]> {
  const file = await stat(pin).catch(() => undefined)
  return file !== undefined && namespace === `net:[${file.ino}]` ? [pin] : []
}
