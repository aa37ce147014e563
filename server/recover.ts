/** Rebuilds what the store should have known about a sandbox from the labels of its containers. Pure. */
import { labels, wellKnownPorts } from '#policies/wire.ts'
import type { Found } from './docker.ts'
import { egressMember, mainMember, type HostPorts, type SandboxRecord } from './group.ts'
import { isReserved } from './metadata.ts'

/** Label prefixes that come with images or tools and are nobody's metadata. */
const foreign = ['org.opencontainers.image.', 'com.docker.', 'desktop.docker.']

/**
 * null when the group is not complete: then it must go. A main container that has been started proves that its
 * sidecar had confirmed the rules; one that is only created proves nothing.
 * @param now ms since 1970. Which tokens were revoked went with the store, so those minted before now are.
 */
export function recordFromLabels(id: string, found: readonly Found[], now: number): SandboxRecord | null {
  const main = found.find((container) => container.member === mainMember)
  if (main === undefined || main.state === 'created' || id === '') return null
  const label = main.labels
  const token = label[labels.egressAuthToken]
  const gate = found.find((container) => container.member === egressMember)
  if (token !== undefined && gate === undefined) return null
  const expiresAt = Date.parse(label[labels.expiresAt] ?? '')
  const metadata = Object.fromEntries(Object.entries(label).filter(([key]) => !isReserved(key) && !foreign.some((prefix) => key.startsWith(prefix))))
  return {
    id, phase: 'ready', announced: true, reason: null, message: null,
    createdAt: main.createdAt, changedAt: main.createdAt, keepUntil: null,
    // Manual cleanup wins: a label inherited from a snapshot's source must not kill.
    expiresAt: label[labels.manualCleanup] === 'true' || Number.isNaN(expiresAt) ? null : expiresAt,
    image: main.image, entrypoint: main.command, metadata,
    platform: label[labels.platformOs] === undefined ? null : { os: label[labels.platformOs] ?? '', arch: label[labels.platformArch] ?? '' },
    egress: token === undefined ? null : { token, policy: { defaultAction: 'deny', egress: [] } },
    secureAccessToken: label[labels.secureAccessToken] ?? null,
    accessEpoch: Math.floor(now / 1000),
    hostPorts: { ...port('http', label[labels.httpPort]), ...port('execd', label[labels.embeddingProxyPort]), ...port('egress', gate?.published.get(wellKnownPorts.egressApi)) },
    renewExtendSeconds: Number(label[labels.accessRenewExtendSeconds]) || null,
  }
}

function port(name: keyof HostPorts, text: string | number | undefined): HostPorts {
  const value = Number(text)
  return Number.isInteger(value) && value >= 1 && value <= 65535 ? { [name]: value } : {}
}
