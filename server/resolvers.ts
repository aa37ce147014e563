/** The resolvers a sandbox should ask: the host's, with loopback stubs replaced by what stands behind them. */
import { readFileSync } from 'node:fs'
import ipaddr from 'ipaddr.js'
import type { Upstream } from './config.ts'

/**
 * Where the real servers of a local stub are written (systemd-resolved, NetworkManager, resolvconf).
 * A loopback address in a sandbox means the sandbox itself, so a stub must never be handed on.
 */
const candidates = ['/etc/resolv.conf', '/run/systemd/resolve/resolv.conf', '/run/NetworkManager/no-stub-resolv.conf', '/run/dnsmasq/resolv.conf']

/** Port 53 of at most three servers; empty when the host knows none that a sandbox could reach. */
export function hostUpstreams(read: (path: string) => string = (path) => readFileSync(path, 'utf8')): Upstream[] {
  for (const path of candidates) {
    let content: string
    try {
      content = read(path)
    } catch {
      continue
    }
    const found = parseNameservers(content)
    if (found.length > 0) return found.map((address) => ({ address, port: 53 }))
  }
  return []
}

/** `nameserver` lines that are not loopback, not a zone-bound link-local address, not Docker's embedded server. */
function parseNameservers(content: string): string[] {
  const found: string[] = []
  for (const line of content.split('\n')) {
    const address = /^\s*nameserver\s+(\S+)/.exec(line)?.[1] ?? ''
    if (!ipaddr.isValid(address) || address.includes('%')) continue
    const parsed = ipaddr.process(address)
    if (parsed.range() === 'loopback' || parsed.range() === 'unspecified') continue
    found.push(parsed.toString())
  }
  // Three, as resolv.conf(5): libc ignores the rest.
  return [...new Set(found)].slice(0, 3)
}
