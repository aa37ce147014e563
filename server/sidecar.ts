/** The egress sidecar: what it is made with, and the question whether its rules are in the kernel. */
import { setTimeout as delay } from 'node:timers/promises'
import { Agent, request } from 'undici'
import { headerNames, labels, wellKnownPorts } from '#policies/wire.ts'
import { ApiError } from './api-error.ts'
import type { Config } from './config.ts'
import { groupLabels, publishedPorts, type ContainerSpec } from './container-spec.ts'
import { egressMember, type SandboxRecord } from './group.ts'
import { containerName } from './ids.ts'

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
      `OPENSANDBOX_EGRESS_RULES=${JSON.stringify(record.egress.policy)}`,
      `OPENSANDBOX_EGRESS_MODE=${config.egress.mode}`,
      `OPENSANDBOX_EGRESS_TOKEN=${record.egress.token}`,
      'OPENSANDBOX_EGRESS_EXEMPTION=auto',
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
    nanoCpus: 0,
    pids: config.egress.pids_limit,
    gpus: 0,
    readOnly: true,
    platform: null,
    cgroupns: 'host',
  }
}

/** Asks a sidecar; a seam for tests. Rejects when it does not answer `ok` in time. */
export type ConfirmRules = (address: string, token: string, signal: AbortSignal) => Promise<void>

const askPause = 15
const askTimeout = 1000

/** Polls `/healthz`, which says 200 only when the rules are in the kernel. @param budget ms */
export function createConfirmRules(budget: number, port: number = wellKnownPorts.egressApi): ConfirmRules & { close(): Promise<void> } {
  const agent = new Agent({ connect: { timeout: askTimeout }, headersTimeout: askTimeout, bodyTimeout: askTimeout, keepAliveTimeout: 1, maxResponseSize: 4096 })
  const confirm: ConfirmRules = async (address, token, signal) => {
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(budget)])
    let last = 'no answer'
    while (!deadline.aborted) {
      try {
        const { statusCode, body } = await request(`http://${address}:${port}/healthz`, { dispatcher: agent, headers: { [headerNames.egressAuth]: token }, signal: deadline })
        await body.dump()
        if (statusCode >= 200 && statusCode < 300) return
        last = `status ${statusCode}`
      } catch (error) {
        last = (error as { code?: string }).code ?? (error as Error).name
      }
      await delay(askPause, undefined, { signal: deadline }).catch(() => undefined)
    }
    signal.throwIfAborted()
    throw new ApiError('DOCKER::SANDBOX_START_FAILED', `Egress sidecar did not become ready within ${budget / 1000}s (${last}).`)
  }
  return Object.assign(confirm, { close: () => agent.close() })
}
