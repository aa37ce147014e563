/**
 * How the kernel knows the sidecar's own packets. Root in the sandbox shares the network namespace, so a uid, a port that may come
 * free or a mark it could set itself are no proof. The ladder, best first:
 *   1. cgroup path, iptables   the kernel compares the socket's cgroup; a mark carries the result to our table
 *   2. cgroup path, nft        where iptables lacks the match; needs the cgroup tree mounted
 *   3. held source ports       UDP ports that stay bound to every address as long as the exemption exists; safe only where NET_RAW is dropped
 * Whatever the rung, the exemption leads to the upstream resolvers' addresses and ports only.
 */
import { readFile, readlink } from 'node:fs/promises'
import { release } from 'node:os'
import { NftError, type Nft } from './nft.ts'
import type { Exemption } from './ruleset.ts'

export type ExemptionWish = 'auto' | 'cgroup' | 'ports'

/** Set by the cgroup rule; everybody else's mark is wiped before. */
const mark = '0x1ee7'
/** Inode of the first cgroup namespace (PROC_CGROUP_INIT_INO in the kernel's proc_ns.h). */
const initialCgroupNamespace = 'cgroup:[4026531835]'

/** What the kernel says of us. */
export type Self = {
  /** `/proc/self/cgroup` */
  readonly cgroups: string
  /** Where `/proc/self/ns/cgroup` leads. */
  readonly cgroupNamespace: string
  /** Of the kernel, as `uname -r` says it. */
  readonly release: string
}

export async function readSelf(): Promise<Self> {
  return { cgroups: await readFile('/proc/self/cgroup', 'utf8'), cgroupNamespace: await readlink('/proc/self/ns/cgroup'), release: release() }
}

export type ExemptionDeps = {
  readonly nft: Nft
  readonly self: () => Promise<Self>
  /** Adds rules to a table of iptables, all or none. */
  readonly appendIptables: (program: 'iptables' | 'ip6tables', table: string, rules: readonly string[]) => Promise<void>
  /** Are we a container's process? Outside of one the sandbox may share our cgroup. */
  readonly inContainer: boolean
  /** Is one of the upstreams reached over IPv6? */
  readonly ipv6: boolean
  /** Where the exemption will lead: the ports of the upstreams, and the webhook's. */
  readonly towards: readonly { readonly protocol: 'udp' | 'tcp'; readonly port: number }[]
}

export type ChosenExemption = Exemption & { readonly kind: 'cgroup-iptables' | 'cgroup-nft' | 'ports'; readonly why: string }

/** Installs what the rung needs. @throws NftError when 'cgroup' was demanded and is not to be had */
export async function chooseExemption(wish: ExemptionWish, deps: ExemptionDeps): Promise<ChosenExemption> {
  const ports: ChosenExemption = { kind: 'ports', why: 'asked for', match: null, protocols: ['udp'] }
  if (wish === 'ports') return ports
  if (wish === 'auto' && !deps.inContainer) return { ...ports, why: 'not in a container' }
  const refusals: string[] = []
  try {
    const path = ownCgroupPath(await deps.self())
    for (const attempt of [byIptables, byNft]) {
      try {
        return await attempt(path, deps)
      } catch (error) {
        refusals.push((error as Error).message)
      }
    }
  } catch (error) {
    refusals.push((error as Error).message)
  }
  if (wish === 'cgroup') throw new NftError(`no exemption by cgroup: ${refusals.join('; ')}`)
  return { ...ports, why: refusals.join('; ') }
}

/**
 * The path under which the kernel finds our cgroup, seen from our cgroup namespace.
 * `/` is our own only in a namespace of its own, and only where the kernel resolves paths inside it (6.1); elsewhere it is everybody's.
 */
function ownCgroupPath({ cgroups, cgroupNamespace, release }: Self): string {
  const line = cgroups.split('\n').find((text) => text.startsWith('0::'))
  const path = line?.slice(3) ?? ''
  if (!path.startsWith('/') || path.includes('..') || /["\s\\]/.test(path)) throw new Error(`cgroup path ${JSON.stringify(path)} is not usable`)
  if (path !== '/') return path
  const [major = 0, minor = 0] = release.split('.').map(Number)
  if (cgroupNamespace === initialCgroupNamespace || major < 6 || (major === 6 && minor < 1)) throw new Error('the cgroup path / would exempt everybody here')
  return path
}

/**
 * In the table `raw`: a mark that changes in `mangle` has the kernel look for a route once more. Only packets towards the ports in question are
 * looked at, the only ones whose mark our table asks for; everybody else's streams pay two comparisons.
 */
async function byIptables(path: string, { ipv6, towards, appendIptables }: ExemptionDeps): Promise<ChosenExemption> {
  // Appended, so that after a restart in the same namespace the newest pair has the last word.
  const rules = towards.flatMap(({ protocol, port }) => [
    `-A OUTPUT -p ${protocol} --dport ${port} -j MARK --set-mark 0`,
    `-A OUTPUT -p ${protocol} --dport ${port} -m cgroup --path "${path}" -j MARK --set-mark ${mark}`,
  ])
  for (const program of ipv6 ? (['iptables', 'ip6tables'] as const) : (['iptables'] as const)) await appendIptables(program, 'raw', rules)
  return { kind: 'cgroup-iptables', why: path, match: `meta mark ${mark}`, protocols: ['udp', 'tcp'] }
}

async function byNft(path: string, { nft }: ExemptionDeps): Promise<ChosenExemption> {
  const parts = path.split('/').filter((part) => part !== '')
  if (parts.length === 0) throw new Error('nft needs a cgroup path below /')
  const match = `socket cgroupv2 level ${parts.length} "${parts.join('/')}"`
  await nft.apply([`add rule inet opensandbox exempt ${match} udp dport 53 continue`, 'flush chain inet opensandbox exempt'])
  return { kind: 'cgroup-nft', why: path, match, protocols: ['udp', 'tcp'] }
}
