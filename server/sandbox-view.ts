/** A group as clients see it: the Sandbox of the API, and the entry of the route stream. Pure. */
import type { RouteEntry, SandboxState } from '#policies/wire.ts'
import { mainMember, type Fact, type Group } from './group.ts'

export type Status = { readonly state: SandboxState; readonly reason: string; readonly message: string }

/** Words of the original, so that what clients match on stays. */
export function statusOf(group: Group): Status {
  const { record, facts, progress } = group
  if (record.phase === 'creating') return { state: 'Pending', reason: 'CONTAINER_STARTING', message: progress ?? 'Sandbox container is starting.' }
  if (record.phase === 'failed') return { state: 'Failed', reason: record.reason ?? 'PROVISIONING_ERROR', message: record.message ?? 'The sandbox failed.' }
  const main = facts.find((fact) => fact.member === mainMember)
  switch (main?.state) {
    case 'running': return { state: 'Running', reason: 'CONTAINER_RUNNING', message: 'Sandbox container is running.' }
    case 'paused': return { state: 'Paused', reason: 'CONTAINER_PAUSED', message: 'Sandbox container is paused.' }
    case 'restarting': return { state: 'Running', reason: 'CONTAINER_RESTARTING', message: 'Sandbox container is restarting.' }
    case 'created': return { state: 'Pending', reason: 'CONTAINER_STARTING', message: 'Sandbox container is starting.' }
    case 'exited': case 'dead': return exited(main)
    default: return { state: 'Unknown', reason: 'CONTAINER_STATE_UNKNOWN', message: `Sandbox container is in state '${main?.state ?? 'unknown'}'.` }
  }
}

/** Address of the namespace's owner; empty while there is none. */
export function addressOf(group: Group): string {
  return group.facts.find((fact) => fact.address !== '')?.address ?? ''
}

export function toSandbox(group: Group): Record<string, unknown> {
  const { record } = group
  return {
    id: record.id,
    image: { uri: record.image },
    ...(record.platform === null ? {} : { platform: record.platform }),
    status: { ...statusOf(group), lastTransitionAt: toTimestamp(record.changedAt) },
    ...(record.metadata === null || Object.keys(record.metadata).length === 0 ? {} : { metadata: record.metadata }),
    entrypoint: record.entrypoint,
    ...(record.expiresAt === null ? {} : { expiresAt: toTimestamp(record.expiresAt) }),
    createdAt: toTimestamp(record.createdAt),
  }
}

export function toRoute(group: Group): RouteEntry {
  const host = addressOf(group)
  const owner = group.facts.find((fact) => fact.address !== '')
  return {
    id: group.record.id,
    host,
    state: statusOf(group).state,
    lifecycle: owner === undefined ? '' : `${owner.containerId.slice(0, 16)}@${host}`,
    ...(group.record.secureAccessToken === null ? {} : { secureAccessToken: group.record.secureAccessToken, epoch: group.record.accessEpoch ?? 0 }),
    ...(group.record.renewExtendSeconds === null || group.record.expiresAt === null ? {} : { renewOnAccess: true }),
  }
}

/** RFC 3339, UTC. */
export function toTimestamp(milliseconds: number): string {
  return new Date(milliseconds).toISOString()
}

function exited(main: Fact): Status {
  if (main.exitCode === 0) return { state: 'Terminated', reason: 'CONTAINER_EXITED', message: 'Sandbox container exited successfully.' }
  return { state: 'Failed', reason: 'CONTAINER_EXITED_ERROR', message: `Sandbox container exited with code ${main.exitCode ?? 'unknown'}.` }
}
