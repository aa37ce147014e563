/** What a container of ours is made with, and how the main container of a sandbox follows from its request. Pure. */
import { labels, wellKnownPorts } from '#policies/wire.ts'
import type { Config } from './config.ts'
import type { CreateRequest } from './create-request.ts'
import { mainMember, type HostPorts, type Platform, type SandboxRecord } from './group.ts'
import { containerName, groupHash } from './ids.ts'

export type ContainerSpec = {
  readonly name: string
  readonly image: string
  readonly labels: Readonly<Record<string, string>>
  readonly env: readonly string[]
  /** null: the image's own. */
  readonly entrypoint: readonly string[] | null
  readonly cmd: readonly string[] | null
  /** A Docker network, or the container whose namespace is joined. */
  readonly network: { readonly name: string } | { readonly join: string }
  readonly capAdd: readonly string[]
  readonly capDrop: readonly string[]
  readonly securityOpt: readonly string[]
  readonly sysctls: Readonly<Record<string, string>>
  /** Container port → host port, published on `publishAddress`. */
  readonly publish: ReadonlyMap<number, number>
  readonly publishAddress: string
  /** Resolvers for Docker's embedded DNS server; empty: the host's. */
  readonly dns: readonly string[]
  /** Bytes, 10^-9 CPUs, processes; 0 means no limit. */
  readonly memory: number
  readonly nanoCpus: number
  readonly pids: number
  /** -1 all, 0 none. */
  readonly gpus: number
  /** The image cannot be written; `/run` and `/tmp` are small, in memory. */
  readonly readOnly: boolean
  readonly platform: Platform | null
  /** OCI runtime; null: the engine's own choice. */
  readonly runtime: string | null
  /** Private: a cgroup namespace of its own. Host: it sees its real path, which the sidecar's exemption needs. */
  readonly cgroupns: 'private' | 'host'
}

/** Starts execd beside the command of a sandbox; `execd.ts` puts it there. */
export const bootstrapPath = '/opt/opensandbox/bootstrap.sh'

/** Labels on every container of a group. They never change, so they tell a sweep everything it needs. */
export function groupLabels(instance: string, id: string, role: string): Record<string, string> {
  return { [labels.instance]: instance, [labels.group]: groupHash(id), [labels.role]: role }
}

/** The sandbox's own container. `owner` is the container whose namespace it joins, null when it owns its own. */
export function mainSpec(config: Config, instance: string, network: string, record: SandboxRecord, request: CreateRequest, owner: string | null): ContainerSpec {
  const docker = config.docker
  return {
    name: containerName(record.id, mainMember),
    image: record.image,
    labels: { ...request.metadata, ...groupLabels(instance, record.id, mainMember), ...sandboxLabels(record) },
    env: Object.entries(request.env).flatMap(([key, value]) => (value === null ? [] : [`${key}=${value}`])),
    entrypoint: config.runtime.execd_image === undefined ? [] : [bootstrapPath],
    cmd: record.entrypoint,
    network: owner === null ? { name: network } : { join: owner },
    capAdd: [],
    // Without NET_ADMIN nobody in the sandbox changes rules; with NET_RAW packets would go around them.
    capDrop: [...new Set([...docker.drop_capabilities, 'NET_ADMIN', 'NET_RAW'])],
    securityOpt: securityOptions(docker),
    // Our own network carries IPv4 only; without this, neighbours would still have link-local IPv6 among themselves.
    sysctls: owner === null ? { 'net.ipv6.conf.default.disable_ipv6': '1' } : {},
    publish: owner === null ? publishedPorts(record.hostPorts) : new Map(),
    publishAddress: config.server.host,
    dns: owner === null ? embeddedDns(config) : [],
    ...request.limits,
    pids: docker.pids_limit,
    readOnly: false,
    platform: record.platform,
    runtime: config.secureRuntime,
    cgroupns: 'private',
  }
}

export function securityOptions(docker: Config['docker']): string[] {
  const options: string[] = []
  if (docker.no_new_privileges) options.push('no-new-privileges:true')
  if (docker.apparmor_profile !== undefined && docker.apparmor_profile !== '') options.push(`apparmor=${docker.apparmor_profile}`)
  if (docker.seccomp_profile !== undefined && docker.seccomp_profile !== '') options.push(`seccomp=${docker.seccomp_profile}`)
  return options
}

/** Container port → host port. */
export function publishedPorts(ports: HostPorts): Map<number, number> {
  const published = new Map<number, number>()
  if (ports.http !== undefined) published.set(wellKnownPorts.http, ports.http)
  if (ports.execd !== undefined) published.set(wellKnownPorts.execd, ports.execd)
  if (ports.egress !== undefined) published.set(wellKnownPorts.egressApi, ports.egress)
  return published
}

/** Configured resolvers also serve sandboxes without a policy; Docker's embedded server only asks port 53. */
export function embeddedDns(config: Config): string[] {
  return config.egress.dns_upstreams === undefined ? [] : config.upstreams.filter((u) => u.port === 53).map((u) => u.address)
}

function sandboxLabels(record: SandboxRecord): Record<string, string> {
  // Both always: an image brings labels of its own, and one of them might say "true".
  const found: Record<string, string> = { [labels.id]: record.id, [labels.manualCleanup]: String(record.expiresAt === null) }
  if (record.expiresAt !== null) found[labels.expiresAt] = new Date(record.expiresAt).toISOString().replace('Z', '000+00:00')
  if (record.platform !== null) {
    found[labels.platformOs] = record.platform.os
    found[labels.platformArch] = record.platform.arch
  }
  if (record.hostPorts.http !== undefined) found[labels.httpPort] = String(record.hostPorts.http)
  if (record.hostPorts.execd !== undefined) found[labels.embeddingProxyPort] = String(record.hostPorts.execd)
  if (record.egress !== null) found[labels.egressAuthToken] = record.egress.token
  if (record.secureAccessToken !== null) found[labels.secureAccessToken] = record.secureAccessToken
  if (record.renewExtendSeconds !== null) found[labels.accessRenewExtendSeconds] = String(record.renewExtendSeconds)
  return found
}
