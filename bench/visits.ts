/** Requests for the micro-benches of the gateway's stages, without a socket: what each stage reads of node:http's objects, and no more. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import { NetworkTable } from '#policies/address.ts'
import type { AccessKeys } from '#policies/access.ts'
import type { RouteEntry } from '#policies/wire.ts'
import type { Edge } from '../gateway/edge.ts'
import { readRequestHead } from '../gateway/headers.ts'
import { InFlight } from '../gateway/in-flight.ts'
import { Locator } from '../gateway/locate.ts'
import { Metrics } from '../gateway/metrics.ts'
import type { Tunnels } from '../gateway/relay.ts'
import { RouteTable } from '../gateway/routes.ts'
import { FailureThrottle } from '../gateway/throttle.ts'
import { UpstreamGuard } from '../gateway/upstream-guard.ts'
import { VerifiedMemory } from '../gateway/verified.ts'
import { Visit } from '../gateway/visit.ts'

/** What a browser sends, with a routing header. */
export const browserFields = [
  'Host', 'gateway.example', 'User-Agent', 'Mozilla/5.0 (X11; Linux x86_64)', 'Accept', 'text/html,application/xhtml+xml', 'Accept-Language', 'en', 'Accept-Encoding', 'gzip, br',
  'Connection', 'keep-alive', 'Cookie', 'session=abcdef', 'Sec-Fetch-Mode', 'navigate', 'OpenSandbox-Ingress-To', 'sandbox5-8080',
]

/** A gateway's surroundings, header mode, nothing behind them. */
export function edgeWith(sandboxes: readonly RouteEntry[], keys: AccessKeys = new Map()): Edge {
  const table = new RouteTable(() => false)
  for (const sandbox of sandboxes) table.put(sandbox)
  table.alive(Infinity)
  let requests = 0
  return {
    table, keys: () => keys, locator: new Locator({ mode: 'header', baseDomain: '' }, table), guard: new UpstreamGuard(false), throttle: new FailureThrottle(30), proofs: new FailureThrottle(30),
    metrics: new Metrics({ routes: () => table.size, tunnels: () => 0, connections: () => 0, active: () => 0 }), openRelay: () => null, relays: new InFlight(), tunnels: null as unknown as Tunnels,
    renewals: null, trustedProxies: new NetworkTable(), verified: new VerifiedMemory(), hideMissing: false, uriCookies: false,
    draining: () => false, overloaded: () => false, access: null, nextRequestId: () => `bench-${requests++}`,
  }
}

/** @param fields raw header fields */
export function visitOf(fields: readonly string[], url = '/a/path?query'): Visit {
  const request = { method: 'GET', url, httpVersionMajor: 1, httpVersionMinor: 1, headers: {}, socket: {} } as unknown as IncomingMessage
  const visit = new Visit(request, {} as ServerResponse, { address: '192.0.2.7', trusted: false, localPort: '28888', closing: false, ignored: 0, open: [], unread: null }, readRequestHead(fields, false))
  visit.requestId = 'bench-1'
  return visit
}
