/** The official JavaScript SDK, pointed at a stack of ours, and the containers behind what it made. */
import dns from 'node:dns'
import { ConnectionConfig } from '@alibaba-group/opensandbox'
import { labels } from '#policies/wire.ts'
import { exec, type Output } from './containers.ts'
import type { Stack } from './stack.ts'

/** A connection of its own, without the SDK's cache of endpoints: a test asks the server, not the cache. */
export function sdkConnection(stack: Stack): ConnectionConfig {
  return new ConnectionConfig({ domain: stack.api.url.replace('http://', ''), protocol: 'http', apiKey: stack.apiKey, endpointCacheDisabled: true })
}

/** Runs a program in the main container of a sandbox that somebody else created. */
export async function execIn(stack: Stack, id: string, command: readonly string[], seconds?: number): Promise<Output> {
  const main = (await stack.containers()).find((container) => container.Labels[labels.id] === id)
  if (main === undefined) throw new Error(`no container carries ${labels.id}=${id}`)
  return exec(main.Id, command, seconds)
}

/**
 * Names below `localhost` are loopback (RFC 6761 §6.3). curl, browsers and systemd's resolver know that, Node with plain glibc does
 * not; from here on this process does, so that the SDK can follow wildcard endpoints.
 */
export function resolveLocalhost(): void {
  const system = dns.lookup as Lookup
  const lookup: Lookup = (name, options, done) => {
    if (!/\.localhost\.?$/i.test(name)) return system(name, options, done)
    process.nextTick(() => (options.all === true ? done(null, [{ address: '127.0.0.1', family: 4 }]) : done(null, '127.0.0.1', 4)))
  }
  dns.lookup = lookup as typeof dns.lookup
}

type Lookup = (name: string, options: { all?: boolean }, done: (error: Error | null, found: unknown, family?: number) => void) => void
