/** What an egress sidecar is made with. Pure. */
import type { NetworkPolicy } from '#policies/document.ts'
import { labels } from '#policies/wire.ts'
import type { Config } from './config.ts'
import { groupLabels, publishedPorts, type ContainerSpec } from './container-spec.ts'
import { egressMember, type SandboxRecord } from './group.ts'
import { containerName } from './ids.ts'

/** One environment string may have 131,072 bytes (MAX_ARG_STRLEN of Linux, with name and NUL); more, and no program can be started. */
const mostInEnvironment = 100_000
const denyAll: NetworkPolicy = { defaultAction: 'deny', egress: [] }

/** The sidecar starts with this policy. Too large a one comes afterwards, over its API; until then everything is denied. */
export function bootPolicy(policy: NetworkPolicy): NetworkPolicy {
  return Buffer.byteLength(JSON.stringify(policy)) > mostInEnvironment ? denyAll : policy
}

/** The same configuration with sidecars made from this image. */
export function fromImage(config: Config, image: string): Config {
  return { ...config, egress: { ...config.egress, image } }
}

/** @param network the Docker network the sandbox is on; the sidecar owns the sandbox's namespace */
export function sidecarSpec(config: Config, instance: string, network: string, record: SandboxRecord): ContainerSpec {
  if (record.egress === null || config.egress.image === undefined) throw new Error('a sidecar needs a policy and an image')
  const upstreams = config.upstreams.map((u) => (u.address.includes(':') ? `[${u.address}]:${u.port}` : `${u.address}:${u.port}`))
  const off = { 'net.ipv6.conf.all.disable_ipv6': '1', 'net.ipv6.conf.default.disable_ipv6': '1', 'net.ipv6.conf.lo.disable_ipv6': '1' }
  return {
    name: containerName(record.id, egressMember),
    image: config.egress.image,
    labels: { ...groupLabels(instance, record.id, egressMember), [labels.egressSidecarFor]: record.id },
    env: [
      `OPENSANDBOX_EGRESS_RULES=${JSON.stringify(bootPolicy(record.egress.policy))}`,
      `OPENSANDBOX_EGRESS_MAX_RULES=${config.egress.max_rules}`,
      `OPENSANDBOX_EGRESS_MODE=${config.egress.mode}`,
      `OPENSANDBOX_EGRESS_TOKEN=${record.egress.token}`,
      `OPENSANDBOX_EGRESS_SANDBOX_ID=${record.id}`,
      'OPENSANDBOX_EGRESS_EXEMPTION=auto',
      ...(config.egress.random_case ? [] : ['OPENSANDBOX_EGRESS_DNS_RANDOM_CASE=off']),
      ...(config.docker.floor.length > 0 ? [`OPENSANDBOX_EGRESS_FLOOR=${config.docker.floor.join(',')}`] : []),
      ...(upstreams.length > 0 ? [`OPENSANDBOX_EGRESS_DNS_UPSTREAM=${upstreams.join(',')}`] : []),
    ],
    entrypoint: null,
    cmd: null,
    network: { name: network },
    capAdd: ['NET_ADMIN'],
    capDrop: ['ALL'],
    securityOpt: ['no-new-privileges:true'],
    sysctls: config.egress.disable_ipv6 ? off : {},
    publish: publishedPorts(record.hostPorts),
    publishAddress: config.server.host,
    dns: [],
    memory: config.egress.memory_bytes,
    nanoCpus: Math.round(config.egress.cpus * 1e9),
    pids: config.egress.pids_limit,
    gpus: 0,
    readOnly: true,
    platform: null,
    runtime: null,
    cgroupns: 'host',
  }
}
