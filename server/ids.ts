/** Identifiers and secrets the server makes. */
import { createHash, randomBytes, randomUUID } from 'node:crypto'

export function newSandboxId(): string {
  return randomUUID()
}

/** For servers that were given no name of their own. */
export function newInstance(): string {
  return randomBytes(8).toString('hex')
}

/** 24 random bytes, URL-safe, 32 characters: the form the original uses for its tokens. */
export function newToken(): string {
  return randomBytes(24).toString('base64url')
}

/**
 * Names the group in Docker without telling the id: Docker's embedded DNS hands container names to every neighbour,
 * and an id opens a sandbox's ports at the gateway. 96 bits of a digest of 122 random ones.
 */
export function groupHash(sandboxId: string): string {
  return createHash('sha256').update(`sallyport-group:${sandboxId}`).digest('hex').slice(0, 24)
}

export function containerName(sandboxId: string, member: string): string {
  return `sallyport-${groupHash(sandboxId)}-${member}`
}
