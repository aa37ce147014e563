/**
 * May this request go on, and where to? Well-formed, located, allowed, running, dialable: in this order, and nothing here waits.
 * The first no is the answer.
 */
import { performance } from 'node:perf_hooks'
import { parseAccessToken, scopeCovers } from '#policies/access-token.ts'
import { decideAccess, decideStrongAccess } from '#policies/access.ts'
import type { FaultCode } from '#policies/fault.ts'
import { parseExpiry, type Route } from '#policies/route.ts'
import type { Edge } from './edge.ts'
import { asksFromElsewhere, endOfTokenSegment, entryCookie, mayHoldToken, sameHostLocation, takeParameter, takeSegment } from './entry.ts'
import { hasToken, type Located, type NotLocated } from './locate.ts'
import { hostName } from './response-headers.ts'
import type { FailureThrottle } from './throttle.ts'
import type { Visit } from './visit.ts'

/** Why a request goes nowhere. */
export type Refused = { readonly code: FaultCode; readonly detail: string }

/** Fills in where the request goes, or says why it goes nowhere. Nothing here waits. */
export function admit(edge: Edge, visit: Visit): Refused | null {
  const { head, request } = visit
  // Node reads other versions as if they were these; TE in HTTP/1.0 is an attack (RFC 9112 §6.1).
  if (request.httpVersionMajor !== 1 || request.httpVersionMinor > 1) return { code: 'EDGE_BAD_REQUEST', detail: 'unsupported HTTP version' }
  if (head.chunked && request.httpVersionMinor === 0) return { code: 'EDGE_BAD_REQUEST', detail: 'Transfer-Encoding in HTTP/1.0' }
  if (head.problem !== '') return { code: 'EDGE_BAD_REQUEST', detail: head.problem }
  if (edge.overloaded()) return { code: 'EDGE_OVERLOADED', detail: '' }
  const origin = originForm(request.url as string)
  if (origin === null) return { code: 'EDGE_BAD_REQUEST', detail: 'invalid request target' }
  if (origin.authority !== undefined) head.host = origin.authority
  if (head.host !== undefined && !isHost(head.host)) return { code: 'EDGE_BAD_REQUEST', detail: 'malformed Host' }

  const located = edge.locator.locate(head, origin.path)
  if (!located.ok) return notLocated(edge, visit, located)
  const now = performance.now()
  visit.sandbox = located.sandbox
  visit.port = located.route.port
  visit.target = located.target
  visit.prefix = located.prefix
  visit.plainPrefix = located.plainPrefix
  if (located.by === 'host') visit.ownHost = hostName(head.host)
  visit.hidden = located.hidden
  const token = takeToken(edge, visit, located)
  visit.locatedAt = now

  if (edge.table.stale(now)) return { code: 'EDGE_ROUTES_STALE', detail: '' }
  if (edge.hideMissing || hasToken(located.sandbox)) {
    const denied = checkAccess(edge, visit, located, token, now)
    if (denied !== null) return denied
  }
  const { state, host, id } = located.sandbox.entry
  if (state !== 'Running' || host === '') {
    edge.metrics.located('not_ready')
    return { code: 'EDGE_NOT_READY', detail: `sandbox not ready: ${id} (${state === 'Running' ? 'no address yet' : state})` }
  }
  if (!edge.guard.allows(host)) return { code: 'EDGE_UPSTREAM_FORBIDDEN', detail: '' }
  edge.metrics.located('success')
  return null
}

type Carried = { readonly token: string; readonly by: 'header' | 'path' | 'query' | 'cookie' }

/** Takes our token off the request, whether or not anybody asks for it: it is nothing a sandbox should learn. */
function takeToken(edge: Edge, visit: Visit, { by, prefix, sandbox }: Located): Carried | null {
  const { head } = visit
  let found: Carried | null = null
  const cookie = by === 'host' ? head.hostCookie : by === 'path' && edge.uriCookies ? head.pathCookie : ''
  if (cookie !== '') found = { token: cookie, by: 'cookie' }
  const parameter = takeParameter(visit.target)
  if (parameter !== null) {
    found = { token: parameter.token, by: 'query' }
    visit.target = parameter.rest
  }
  const segment = by === 'path' ? takeSegment(visit.target, hasToken(sandbox)) : null
  if (segment !== null) {
    found = { token: segment.token, by: 'path' }
    visit.target = segment.rest
    visit.prefix = `${prefix}/${segment.token}`
  }
  // What is left of it, where no token is taken off a path, is nothing for the log either.
  if (visit.hidden === 0) visit.hidden = endOfTokenSegment(visit.target)
  return head.access === undefined ? found : { token: head.access.trim(), by: 'header' }
}

/** A token that did not come as a cookie of its own accord is asked before the route's signature; a cookie after it. */
function checkStrong(edge: Edge, visit: Visit, { route, sandbox, by, prefix }: Located, { token, by: carried }: Carried): Refused | null {
  const path = pathOf(visit.target)
  const method = visit.request.method as string
  const now = Date.now() / 1000
  if (carried === 'cookie' && asksFromElsewhere(visit.request.headers, method, hostsOf(visit), visit.ownHost !== '')) return { code: 'EDGE_UNAUTHORIZED', detail: 'access token in a cookie does not count for requests of another origin' }
  const keys = edge.keys()
  const answer = decideStrongAccess({ token, id: route.id, port: route.port, method, path, epoch: sandbox.entry.epoch ?? 0, keys, verified: edge.verified.under(keys), now })
  if (!answer.ok) return { code: answer.fault, detail: answer.detail }
  // A browser goes on without the token in its address bar, history and Referer; others have what they asked for.
  const browses = carried === 'query' && visit.response !== null && (method === 'GET' || method === 'HEAD') && !asksFromElsewhere(visit.request.headers, method, hostsOf(visit), visit.ownHost !== '')
  if (browses && (by === 'host' || (by === 'path' && edge.uriCookies))) {
    const outer = visit.head.forwardedPrefix
    visit.redirect = sameHostLocation(outer + prefix + visit.target)
    visit.entryCookie = entryCookie(token, prefix === '' ? '' : outer + prefix, visit.head.proto === 'https', now)
  }
  return null
}

/** What this host is called, by whoever may say so. */
function hostsOf({ head, peer, request }: Visit): string[] {
  const forwarded = peer.trusted ? request.headers['x-forwarded-host'] : undefined
  const hosts = head.host === undefined ? [] : [head.host]
  // The first of several is the one the browser used.
  return forwarded === undefined ? hosts : [...hosts, String(forwarded).split(',', 1)[0] as string]
}

/** From this length on an access token is taken to be beyond guessing: 128 bits in base64url. */
const unguessable = 22
const tooMany: Refused = { code: 'EDGE_TOO_MANY_ATTEMPTS', detail: '' }

function checkAccess(edge: Edge, visit: Visit, located: Located, carried: Carried | null, now: number): Refused | null {
  const { route, sandbox } = located
  const token = sandbox.entry.secureAccessToken?.trim() ?? ''
  const header = visit.head.secureAccess
  const strong = token !== '' && header === undefined && carried !== null && (carried.by !== 'cookie' || route.signature === undefined)
  // What can be guessed is not even asked of a client that guesses. The rest is: nobody is locked out by others behind a shared address.
  const guessable = token !== '' && (header === undefined ? route.signature !== undefined && (!strong || edge.hideMissing) : token.length < unguessable)
  if (guessable && edge.throttle.blocked(visit.client, now)) return tooMany
  const denied = strong ? checkStrong(edge, visit, located, carried) : checkShort(edge, route, token, header)
  if (denied === null) return null
  if (edge.hideMissing) return refuseHidden(edge, visit, route, now)
  return denied.code === 'EDGE_UNAUTHORIZED' && isAttempt(visit, located, strong ? carried : null) ? countAttempt(guessable ? edge.throttle : edge.proofs, visit, denied, now) : denied
}

/**
 * Was a refused request an attempt? No cookie is, which browsers send unasked, and nothing that would have been refused with the right signature,
 * too: a page whose token has expired, was revoked or is for other paths may be loaded again and again.
 */
function isAttempt({ head, request, target }: Visit, { route, sandbox }: Located, carried: Carried | null): boolean {
  if (head.secureAccess !== undefined) return true
  const now = BigInt(Math.floor(Date.now() / 1000))
  if (carried === null) return route.expires !== undefined && (parseExpiry(route.expires) ?? 0n) >= now
  if (carried.by === 'cookie') return false
  const token = parseAccessToken(carried.token)
  if (token === null) return true
  return (parseExpiry(token.expires) ?? 0n) >= now && token.epoch >= (sandbox.entry.epoch ?? 0) && scopeCovers(token.scope, request.method as string, pathOf(target))
}

/** @returns `denied`, or that there were too many before */
function countAttempt(throttle: FailureThrottle, visit: Visit, denied: Refused, now: number): Refused {
  if (throttle.blocked(visit.client, now)) return tooMany
  throttle.failed(visit.client, now)
  return denied
}

function checkShort(edge: Edge, route: Route, token: string, header: string | undefined): Refused | null {
  const keys = edge.keys()
  const answer = decideAccess({ token, header, route, keys, verified: edge.verified.under(keys), now: Date.now() / 1000 })
  return answer.ok ? null : { code: answer.fault, detail: answer.detail }
}

/** One answer to all who may not go on, whether the sandbox is there or not, and guessing is as slow: nobody learns which ids exist. */
function refuseHidden(edge: Edge, visit: Visit, route: Route, now: number): Refused {
  const denied: Refused = { code: 'EDGE_UNAUTHORIZED', detail: 'signature: signature required for this sandbox' }
  const { head, request } = visit
  // By the request alone: of a sandbox that is not there nothing is known that a token could be too old for.
  const shown = head.secureAccess !== undefined || head.access !== undefined || route.signature !== undefined || mayHoldToken(request.url as string)
  return shown ? countAttempt(edge.throttle, visit, denied, now) : denied
}

function notLocated(edge: Edge, visit: Visit, located: NotLocated): Refused {
  edge.metrics.located(located.fault === 'EDGE_NO_ROUTE' ? 'not_found' : 'error')
  visit.locatedAt = performance.now()
  if (located.fault === 'EDGE_NO_ROUTE' && edge.table.stale(visit.locatedAt)) return { code: 'EDGE_ROUTES_STALE', detail: '' }
  if (located.route !== null && edge.hideMissing) return refuseHidden(edge, visit, located.route, visit.locatedAt)
  return { code: located.fault, detail: located.detail }
}

function pathOf(target: string): string {
  const query = target.indexOf('?')
  return query === -1 ? target : target.slice(0, query)
}

type Target = { readonly path: string; readonly authority?: string }

/**
 * The path of a request target and, in absolute form, its authority, which wins over Host (RFC 9112 §3.2.2). Nothing is decoded or
 * cleaned. A fragment, user information or another scheme has no business here: null.
 */
function originForm(url: string): Target | null {
  if (url.includes('#')) return null
  if (url.charCodeAt(0) === 0x2f) return { path: url }
  const lower = url.slice(0, 8).toLowerCase()
  const start = lower.startsWith('http://') ? 7 : lower.startsWith('https://') ? 8 : 0
  if (start === 0) return null
  let end = start
  while (end < url.length && url[end] !== '/' && url[end] !== '?') end++
  const authority = url.slice(start, end)
  if (authority === '' || authority.includes('@')) return null
  const path = url.slice(end)
  return { authority, path: path.startsWith('/') ? path : `/${path}` }
}

/** Letters, digits and what else may stand in a host name, an address or an escape, with a port (RFC 3986 §3.2.2, without sub-delims). */
function isHost(host: string): boolean {
  for (let i = 0; i < host.length; i++) {
    const code = host.charCodeAt(i)
    const plain = (code >= 0x61 && code <= 0x7a) || (code >= 0x30 && code <= 0x3a) || (code >= 0x41 && code <= 0x5b)
    if (!plain && code !== 0x2d && code !== 0x2e && code !== 0x5f && code !== 0x5d && code !== 0x25 && code !== 0x7e) return false
  }
  return true
}
