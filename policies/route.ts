/**
 * The route grammar: how a request names a sandbox and a port, and how an endpoint is written so that it comes back that way.
 *
 *     host or header   <id>-<port>   <id>-<port>-<expiry>-<signature>   (a domain may follow the first dot)
 *     path             /<id>/<port>/…   /<id>/<port>/<expiry>/<signature>/…
 */
import type { FaultCode } from './fault.ts'

export const routeModes = ['header', 'wildcard', 'uri', 'auto'] as const
export type RouteMode = (typeof routeModes)[number]

/** `expires` is base36 Unix seconds, literally as written: the signature covers the text. */
export type Route = { readonly id: string; readonly port: number; readonly expires?: string; readonly signature?: string }

export type BadRoute = { readonly ok: false; readonly fault: FaultCode; readonly detail: string }
export type HostRoute = { readonly ok: true; readonly route: Route }
/** `rest` is the raw path for the sandbox; `legacyRest` the one when expiry and signature are segments of the sandbox's own path. */
export type PathRoute = { readonly ok: true; readonly route: Route; readonly rest: string; readonly legacyRest: string }

const signatureShape = /^[0-9a-f]{8}[0-9a-z]$/
const expiryShape = /^(0|[1-9a-z][0-9a-z]{0,12})$/
const maxExpiry = 2n ** 64n - 1n

/** A decimal port 1–65535 without sign or leading zeros, else 0. */
export function parsePort(text: string): number {
  if (!/^[1-9]\d{0,4}$/.test(text)) return 0
  const port = Number(text)
  return port <= 65_535 ? port : 0
}

/** Base36 Unix seconds as they stand in a signed route (1 to 13 of [0-9a-z], no leading zero, at most 2^64-1), or null. */
export function parseExpiry(text: string): bigint | null {
  if (!expiryShape.test(text)) return null
  let value = 0n
  for (const digit of text) value = value * 36n + BigInt(parseInt(digit, 36))
  return value <= maxExpiry ? value : null
}

export function isSignature(text: string): boolean {
  return signatureShape.test(text)
}

/** Reads the value of the routing header or the Host. A domain or `:port` behind the first dot is not looked at. */
export function parseHostToken(text: string): HostRoute | BadRoute {
  const bare = stripPrefix(stripPrefix(text, 'https://'), 'http://')
  const dot = bare.indexOf('.')
  const parts = (dot === -1 ? bare : bare.slice(0, dot)).split('-')
  const signed = signedToken(parts)
  if (signed !== null) return { ok: true, route: signed }
  const last = parts.at(-1) as string
  if (parts.length < 2 || parts[0] === '') return badRoute(`invalid host: ${shorten(text)}`)
  const port = parsePort(last)
  if (port === 0) return badRoute(`invalid port format: invalid port "${shorten(last)}"`)
  return { ok: true, route: { id: parts.slice(0, -1).join('-'), port } }
}

function signedToken(parts: readonly string[]): Route | null {
  if (parts.length < 4) return null
  const [port, expires, signature] = parts.slice(-3) as [string, string, string]
  const id = parts.slice(0, -3).join('-')
  if (id === '' || parsePort(port) === 0 || parseExpiry(expires) === null || !isSignature(signature)) return null
  return { id, port: parsePort(port), expires, signature }
}

/**
 * Reads the raw path of a request target (no query). Segments are split at literal slashes; only id and port are decoded, and
 * neither may hold an encoded slash, so `%2F` further on stays what the client wrote.
 */
export function parseUriPath(rawPath: string): PathRoute | BadRoute {
  const cuts = segmentStarts(rawPath, 6)
  const segment = (n: number): string => rawPath.slice(cuts[n], cuts[n + 1] === undefined ? undefined : (cuts[n + 1] as number) - 1)
  if (!rawPath.startsWith('/') || cuts.length < 2) return badRoute(`invalid URI path format: expected '/<sandbox-id>/<sandbox-port>/<path-to-request>', got: ${shorten(rawPath)}`)
  const id = decodeSegment(segment(0))
  const portText = decodeSegment(segment(1))
  if (id === null || portText === null) return badRoute('invalid URI path format: sandbox-id and sandbox-port must not hold an encoded slash or a broken escape')
  if (id === '' || portText === '') return badRoute('missing sandbox-id or sandbox-port in URI path')
  const port = parsePort(portText)
  if (port === 0) return badRoute(`invalid port format: ${/^0\d+$/.test(portText) ? 'port must not have leading zeros' : `invalid port "${shorten(portText)}"`}`)

  const restFrom = (n: number): string => (cuts[n] === undefined ? '/' : rawPath.slice(cuts[n] - 1))
  const legacyRest = restFrom(2)
  if (cuts.length >= 4) {
    const expires = segment(2)
    const signature = segment(3)
    if (parseExpiry(expires) !== null && isSignature(signature)) return { ok: true, route: { id, port, expires, signature }, rest: restFrom(4), legacyRest }
  }
  return { ok: true, route: { id, port }, rest: legacyRest, legacyRest }
}

/** Where the first `most` segments begin: behind each literal slash. */
function segmentStarts(path: string, most: number): number[] {
  const starts: number[] = []
  for (let slash = path.indexOf('/'); slash !== -1 && starts.length < most; slash = path.indexOf('/', slash + 1)) starts.push(slash + 1)
  return starts
}

function decodeSegment(segment: string): string | null {
  if (!segment.includes('%')) return segment
  try {
    const decoded = decodeURIComponent(segment)
    return decoded.includes('/') ? null : decoded
  } catch {
    return null
  }
}

function stripPrefix(text: string, prefix: string): string {
  return text.startsWith(prefix) ? text.slice(prefix.length) : text
}

function badRoute(reason: string): BadRoute {
  return { ok: false, fault: 'EDGE_BAD_ROUTE', detail: `invalid ingress route: ${reason}` }
}

function shorten(text: string): string {
  return text.length > 120 ? `${text.slice(0, 120)}…` : text
}

/** An endpoint as the lifecycle API answers it: no scheme, and headers the client must send along. */
export type Endpoint = { readonly endpoint: string; readonly headers?: Readonly<Record<string, string>> }

/** `<id>-<port>`, or with expiry and signature: what stands in a host label and in the routing header. */
export function formatToken(route: Route): string {
  const signed = route.expires === undefined || route.signature === undefined ? '' : `-${route.expires}-${route.signature}`
  return `${route.id}-${route.port}${signed}`
}

/** @param address as `parseGatewayAddress` accepted it for this mode */
export function formatEndpoint(mode: Exclude<RouteMode, 'auto'>, address: string, route: Route): Endpoint {
  if (mode === 'wildcard') return { endpoint: `${formatToken(route)}${address.slice(1)}` }
  if (mode === 'header') return { endpoint: address, headers: { 'OpenSandbox-Ingress-To': formatToken(route) } }
  const signed = route.expires === undefined || route.signature === undefined ? '' : `/${route.expires}/${route.signature}`
  return { endpoint: `${address}/${encodeURIComponent(route.id)}/${route.port}${signed}` }
}

const domain = '[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)'
const wildcardAddress = new RegExp(`^\\*\\.${domain}+(?::(\\d+))?$`)
const hostAddress = new RegExp(`^${domain}*(?::(\\d+))?$`)

/** What is wrong with a configured gateway address, or null. No scheme; a port is optional in every mode; `uri` may hold a base path. */
export function gatewayAddressProblem(mode: Exclude<RouteMode, 'auto'>, address: string): string | null {
  if (address.includes('://')) return 'must not contain a scheme'
  if (mode === 'wildcard') {
    const match = wildcardAddress.exec(address)
    return match !== null && portOk(match[1]) ? null : 'must look like "*.sandbox.example.com" or "*.sandbox.example.com:28888" in wildcard mode'
  }
  const slash = address.indexOf('/')
  const host = mode === 'header' || slash === -1 ? address : address.slice(0, slash)
  const match = hostAddress.exec(host)
  if (match === null || !portOk(match[1])) return 'must be a host name or IPv4 address with an optional port'
  return mode === 'uri' && /[\s?#*]|\/$/.test(address) ? 'must not contain spaces, "*", "?", "#" or end with "/"' : null
}

function portOk(text: string | undefined): boolean {
  return text === undefined || parsePort(text) !== 0
}
