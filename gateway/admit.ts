/**
 * May this request go on, and where to? Well-formed, located, allowed, running, dialable: in this order, and nothing here waits.
 * The first no is the answer.
 */
import { performance } from 'node:perf_hooks'
import { decideAccess, decideStrongAccess } from '#policies/access.ts'
import type { FaultCode } from '#policies/fault.ts'
import type { Route } from '#policies/route.ts'
import type { Edge } from './edge.ts'
import { endOfTokenSegment, entryCookie, sameHostLocation, takeParameter, takeSegment } from './entry.ts'
import { hasToken, type Located, type NotLocated } from './locate.ts'
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
  const query = visit.target.indexOf('?')
  const path = query === -1 ? visit.target : visit.target.slice(0, query)
  const method = visit.request.method as string
  const now = Date.now() / 1000
  const keys = edge.keys()
  const answer = decideStrongAccess({ token, id: route.id, port: route.port, method, path, epoch: sandbox.entry.epoch ?? 0, keys, verified: edge.verified.under(keys), now })
  if (!answer.ok) return { code: answer.fault, detail: answer.detail }
  // A browser goes on without the token in its address bar, history and Referer; others have what they asked for.
  const browses = carried === 'query' && visit.response !== null && (method === 'GET' || method === 'HEAD')
  if (browses && (by === 'host' || (by === 'path' && edge.uriCookies))) {
    visit.redirect = sameHostLocation(prefix + visit.target)
    visit.entryCookie = entryCookie(token, prefix, visit.head.proto === 'https', now)
  }
  return null
}

function checkAccess(edge: Edge, visit: Visit, located: Located, carried: Carried | null, now: number): Refused | null {
  const { route, sandbox } = located
  const token = sandbox.entry.secureAccessToken?.trim() ?? ''
  const header = visit.head.secureAccess
  const strong = token !== '' && header === undefined && carried !== null && (carried.by !== 'cookie' || route.signature === undefined)
  // Only short signatures can be guessed; a wrong header alone locks nobody out behind a shared address.
  const guess = token !== '' && header === undefined && route.signature !== undefined && (!strong || edge.hideMissing)
  if (guess && edge.throttle.blocked(visit.client, now)) return { code: 'EDGE_TOO_MANY_ATTEMPTS', detail: '' }
  const denied = strong ? checkStrong(edge, visit, located, carried) : checkShort(edge, route, token, header)
  if (denied === null) return null
  if (edge.hideMissing) return refuseHidden(edge, visit, route, now)
  if (!strong && denied.code === 'EDGE_UNAUTHORIZED' && route.signature !== undefined) edge.throttle.failed(visit.client, now)
  return denied
}

function checkShort(edge: Edge, route: Route, token: string, header: string | undefined): Refused | null {
  const keys = edge.keys()
  const answer = decideAccess({ token, header, route, keys, verified: edge.verified.under(keys), now: Date.now() / 1000 })
  return answer.ok ? null : { code: answer.fault, detail: answer.detail }
}

/** One answer to all who may not go on, whether the sandbox is there or not, and guessing is as slow: nobody learns which ids exist. */
function refuseHidden(edge: Edge, visit: Visit, route: Route, now: number): Refused {
  if (route.signature !== undefined && visit.head.secureAccess === undefined) {
    if (edge.throttle.blocked(visit.client, now)) return { code: 'EDGE_TOO_MANY_ATTEMPTS', detail: '' }
    edge.throttle.failed(visit.client, now)
  }
  return { code: 'EDGE_UNAUTHORIZED', detail: 'signature: signature required for this sandbox' }
}

function notLocated(edge: Edge, visit: Visit, located: NotLocated): Refused {
  edge.metrics.located(located.fault === 'EDGE_NO_ROUTE' ? 'not_found' : 'error')
  visit.locatedAt = performance.now()
  if (located.fault === 'EDGE_NO_ROUTE' && edge.table.stale(visit.locatedAt)) return { code: 'EDGE_ROUTES_STALE', detail: '' }
  if (located.route !== null && edge.hideMissing) return refuseHidden(edge, visit, located.route, visit.locatedAt)
  return { code: located.fault, detail: located.detail }
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
