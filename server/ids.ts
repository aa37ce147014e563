/** Identifiers and secrets the server makes. */
import { createHash, randomBytes, randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { resolve } from 'node:path'

export function newSandboxId(): string {
  return randomUUID()
}

/**
 * For servers that were given no name of their own: the same again when the store is lost, so that its sandboxes are still ours. Machine and
 * name of the host: clones of one machine may share the first, and two servers on one engine must never be one; hence a random name where
 * there is no machine id, and where the path does not tell one store from another. A digest, because a machine id is not to be shown
 * (machine-id(5)).
 */
export function defaultInstance(storePath: string, machine: string = machineId(), host: string = hostname()): string {
  if (machine === '' || storePath === ':memory:') return randomBytes(8).toString('hex')
  return createHash('sha256').update(JSON.stringify(['sallyport-instance', machine, host, resolve(storePath)])).digest('hex').slice(0, 16)
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

/** Empty where there is none, as in most containers. */
function machineId(): string {
  try {
    return readFileSync('/etc/machine-id', 'utf8').trim()
  } catch {
    return ''
  }
}
