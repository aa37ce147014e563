/**
 * Which header fields of a request cross the gateway. The raw headers are walked once; what routing, access and relaying need is picked
 * out on the way, and what remains is what the sandbox may see. The other direction is in `response-headers.ts`.
 */
import { headerNames } from '#policies/wire.ts'
import { cleanReferer, takeCookies } from './entry.ts'

/** What a request field means to the gateway. Everything that is not in the list passes through. */
const kinds = {
  pass: 0,
  drop: 1,
  host: 2,
  connection: 3,
  te: 4,
  transferEncoding: 5,
  contentLength: 6,
  upgrade: 7,
  ingressTo: 8,
  deprecatedIngressTo: 9,
  secureAccess: 10,
  forwardedFor: 11,
  forwarded: 12,
  requestId: 13,
  idempotencyKey: 14,
  forwardedPrefix: 15,
  expect: 16,
  access: 17,
  cookie: 18,
  trailer: 19,
  referer: 20,
} as const
type Kind = (typeof kinds)[keyof typeof kinds]

/** The one list. Hop-by-hop is RFC 9110 §7.6.1 with the older names of RFC 2616 §13.5.1. */
const requestFields: readonly (readonly [string, Kind])[] = [
  ['host', kinds.host], //                       ours: rewritten to the sandbox's own authority, RFC 9112 §3.2
  ['connection', kinds.connection], //           hop-by-hop, and names further ones
  ['keep-alive', kinds.drop], //                 hop-by-hop
  ['proxy-connection', kinds.drop], //           hop-by-hop, never standardised
  ['proxy-authenticate', kinds.drop], //         hop-by-hop
  ['proxy-authorization', kinds.drop], //        hop-by-hop
  ['te', kinds.te], //                           hop-by-hop; `trailers` is said again, RFC 9110 §10.1.4
  ['trailer', kinds.trailer], //                 announces fields behind chunks, RFC 9110 §6.6.2: said again with those
  ['transfer-encoding', kinds.transferEncoding], // framing is per connection, RFC 9112 §6
  ['content-length', kinds.contentLength], //    said again by us when there is a body
  ['upgrade', kinds.upgrade], //                 hop-by-hop; upgrades have a relay of their own
  ['http2-settings', kinds.drop], //             belongs to Upgrade: h2c, RFC 7540 §3.2.1
  ['expect', kinds.expect], //                   answered here once the sandbox takes the body, RFC 9110 §10.1.1
  [headerNames.ingressTo, kinds.ingressTo],
  [headerNames.deprecatedIngressTo, kinds.deprecatedIngressTo],
  [headerNames.secureAccess, kinds.secureAccess],
  [headerNames.access, kinds.access],
  ['cookie', kinds.cookie], //                   ours are taken out
  ['referer', kinds.referer], //                 may hold our tokens and signatures
  [headerNames.apiKey, kinds.drop], //           the lifecycle server's key is nothing a sandbox should learn
  [headerNames.requestId, kinds.requestId],
  ['x-forwarded-for', kinds.forwardedFor],
  ['x-forwarded-prefix', kinds.forwardedPrefix],
  ['x-forwarded-host', kinds.forwarded],
  ['x-forwarded-proto', kinds.forwarded],
  ['x-forwarded-port', kinds.forwarded],
  ['x-real-ip', kinds.forwarded],
  ['forwarded', kinds.forwarded], //             RFC 7239
  ['idempotency-key', kinds.idempotencyKey], //  says that a replay is safe
]

/** Names as they were spelled on the wire, so that the common case needs no lower-casing. Bounded: spellings come from clients. */
const spelled = new Map<string, Kind>()
const listed = new Map<string, Kind>(requestFields)
for (const [name, kind] of requestFields) spelled.set(name, kind).set(titleCase(name), kind)
const spellingLimit = 1024
const spellingLength = 48

function titleCase(name: string): string {
  return name.replace(/(^|-)[a-z]/g, (letters) => letters.toUpperCase())
}

function classify(name: string): Kind {
  const lower = name.toLowerCase()
  // CGI and WSGI know no hyphens: to them `X_Forwarded_For` is the field that is ours to say.
  const taken = lower.includes('_') && listed.has(lower.replaceAll('_', '-'))
  const kind = taken ? kinds.drop : (listed.get(lower) ?? kinds.pass)
  if (spelled.size < spellingLimit && name.length <= spellingLength) spelled.set(name, kind)
  return kind
}

/** Everything the gateway reads from one request's header section. `undefined` means the field is absent; empty is present. */
export class RequestHead {
  /** Name, value, name, value…: end-to-end fields as the client spelled them. */
  out: string[] = []
  /** Why the request must be refused; '' when it is well-formed. */
  problem = ''
  host: string | undefined = undefined
  ingressTo: string | undefined = undefined
  deprecatedIngressTo: string | undefined = undefined
  secureAccess: string | undefined = undefined
  /** Our strong token, as a header. */
  access: string | undefined = undefined
  /** Our strong token, as one of our cookies; '' when there is none. */
  hostCookie = ''
  pathCookie = ''
  requestId: string | undefined = undefined
  forwardedFor = ''
  /** What a proxy of ours took off the path before us, without a slash at its end. */
  forwardedPrefix = ''
  forwardedHost = false
  forwardedProto = false
  /** What the client spoke, as far as it is known. */
  proto: 'http' | 'https' = 'http'
  forwardedPort = false
  contentLength = ''
  chunked = false
  trailers = false
  /** Which fields the client announces behind its body. */
  trailer = ''
  upgrade = ''
  connection = ''
  replayable = false
  /** What is left of the Referer, until it is known how the sandbox was named; '' for none. */
  referer = ''
}

/** Most header fields of one request. Node would silently drop those behind its own limit, so that limit is off. */
export const maxFields = 256

/**
 * @param raw name, value, name, value… as node:http read them
 * @param trusted the peer is a proxy of ours, and what it says about the client is kept
 */
export function readRequestHead(raw: readonly string[], trusted: boolean): RequestHead {
  const head = new RequestHead()
  const out = head.out
  if (raw.length > 2 * maxFields) head.problem = 'too many header fields'
  for (let i = 0; i < raw.length; i += 2) {
    const name = raw[i] as string
    const value = raw[i + 1] as string
    const kind = spelled.get(name) ?? classify(name)
    if (kind === kinds.pass) {
      out.push(name, value)
      continue
    }
    switch (kind) {
      case kinds.host:
        if (head.host !== undefined) head.problem = 'more than one Host header'
        head.host = value
        break
      case kinds.connection:
        head.connection = head.connection === '' ? value : `${head.connection},${value}`
        break
      case kinds.te:
        if (value.toLowerCase().includes('trailers')) head.trailers = true
        break
      case kinds.trailer:
        head.trailer = head.trailer === '' ? value : `${head.trailer}, ${value}`
        break
      case kinds.transferEncoding:
        // Only plain chunked is undone here; any other coding would reach the sandbox undeclared. RFC 9112 §6.1.
        if (head.chunked || value.toLowerCase() !== 'chunked') head.problem = 'unsupported transfer coding'
        head.chunked = true
        break
      case kinds.contentLength:
        if (head.contentLength !== '') head.problem = 'more than one Content-Length header'
        head.contentLength = value
        break
      case kinds.upgrade:
        head.upgrade = head.upgrade === '' ? value : `${head.upgrade},${value}`
        break
      case kinds.ingressTo:
        head.ingressTo ??= value
        break
      case kinds.deprecatedIngressTo:
        head.deprecatedIngressTo ??= value
        break
      case kinds.secureAccess:
        head.secureAccess ??= value
        break
      case kinds.requestId:
        head.requestId ??= value
        break
      case kinds.forwardedFor:
        if (trusted) head.forwardedFor = head.forwardedFor === '' ? value : `${head.forwardedFor}, ${value}`
        break
      case kinds.forwardedPrefix:
        if (trusted) head.forwardedPrefix = prefixOf(value)
        break
      case kinds.forwarded:
        if (trusted) keepForwarded(head, name, value)
        break
      case kinds.idempotencyKey:
        head.replayable = true
        out.push(name, value)
        break
      case kinds.access:
        head.access ??= value
        break
      case kinds.cookie:
        keepCookies(head, name, value)
        break
      case kinds.referer:
        head.referer = value
        break
      case kinds.expect:
        // node:http finds `100-continue` anywhere in the value; it is the only expectation there is (RFC 9110 §10.1.1).
        if (value.toLowerCase() !== '100-continue') head.problem = 'unsupported expectation'
        break
      case kinds.drop:
        break
    }
  }
  if (head.chunked && head.contentLength !== '') head.problem = 'both Content-Length and Transfer-Encoding'
  if (head.chunked && head.trailer !== '') out.push('trailer', head.trailer)
  if (namesFields(head.connection)) {
    head.out = withoutNamed(out, head.connection)
    if (connectionOptions(head.connection).has('referer')) head.referer = ''
  }
  return head
}

/**
 * Fields behind a chunked body, as they go on the wire. Only those pass that would pass in front and mean nothing to the gateway: what it vouches
 * for there, or takes away, does not come in at the back. RFC 9110 §6.5.1.
 * @param raw name, value, name, value…
 * @param connection the request's Connection header: fields that it names end here
 */
export function trailerLines(raw: readonly string[], connection: string): string {
  const passing: string[] = []
  for (let i = 0; i < raw.length && i < 2 * maxFields; i += 2) {
    const name = raw[i] as string
    if ((spelled.get(name) ?? classify(name)) === kinds.pass) passing.push(name, raw[i + 1] as string)
  }
  const kept = namesFields(connection) ? withoutNamed(passing, connection) : passing
  let lines = ''
  for (let i = 0; i < kept.length; i += 2) lines += `${kept[i]}: ${kept[i + 1]}\r\n`
  return lines
}

function keepCookies(head: RequestHead, name: string, value: string): void {
  const ours = takeCookies(value)
  if (ours === null) {
    head.out.push(name, value)
    return
  }
  head.hostCookie ||= ours.host
  head.pathCookie ||= ours.path
  if (ours.rest !== '') head.out.push(name, ours.rest)
}

function keepForwarded(head: RequestHead, name: string, value: string): void {
  const lower = name.toLowerCase()
  if (lower === 'x-forwarded-host') head.forwardedHost = true
  else if (lower === 'x-forwarded-proto') {
    head.forwardedProto = true
    if (value.trim().toLowerCase() === 'https') head.proto = 'https'
  } else if (lower === 'x-forwarded-port') head.forwardedPort = true
  head.out.push(name, value)
}

/**
 * An X-Forwarded-Prefix, or '' when it is not one plain path: it comes to stand in front of references and in cookies, where two slashes would name
 * another host and a semicolon would begin an attribute.
 */
function prefixOf(value: string): string {
  return /^((?:\/[\w.~%!$&'()*+=:@-]+)+)\/?$/.exec(value.trim())?.[1] ?? ''
}

/** Does a Connection header name anything beyond the three usual options? */
function namesFields(connection: string): boolean {
  switch (connection) {
    case '':
    case 'keep-alive':
    case 'Keep-Alive':
    case 'close':
    case 'Upgrade':
    case 'upgrade':
    case 'keep-alive, Upgrade':
      return false
    default:
      return true
  }
}

/** The fields that a Connection header does not name. RFC 9110 §7.6.1: the named ones end here. */
function withoutNamed(fields: readonly string[], connection: string): string[] {
  const named = connectionOptions(connection)
  const kept: string[] = []
  for (let i = 0; i < fields.length; i += 2) {
    if (!named.has((fields[i] as string).toLowerCase())) kept.push(fields[i] as string, fields[i + 1] as string)
  }
  return kept
}

/** The lower-case tokens of a Connection or Upgrade header. */
export function connectionOptions(value: string): Set<string> {
  return new Set(value.split(',').map((token) => token.trim().toLowerCase()))
}

export type Forwarding = {
  readonly peer: string
  readonly proto: 'http' | 'https'
  /** The port the client reached us on. */
  readonly port: string
  /** What URI mode took off the path; '' in the other modes. */
  readonly prefix: string
  readonly requestId: string
}

/**
 * Adds what the sandbox is told about the outside. A trusted proxy's words are kept and added to; anybody else's are gone already.
 * The names are those in common use; RFC 7239's Forwarded is passed on from a trusted proxy but not made.
 */
export function addForwarded(head: RequestHead, forwarding: Forwarding): void {
  const out = head.out
  out.push('x-forwarded-for', head.forwardedFor === '' ? forwarding.peer : `${head.forwardedFor}, ${forwarding.peer}`)
  if (!head.forwardedHost && head.host !== undefined) out.push('x-forwarded-host', head.host)
  if (!head.forwardedProto) out.push('x-forwarded-proto', forwarding.proto)
  // A proxy of ours that said how it was reached, and not at which port: ours would be wrong, and its Host knows.
  if (!head.forwardedPort && !head.forwardedProto) out.push('x-forwarded-port', forwarding.port)
  const prefix = head.forwardedPrefix + forwarding.prefix
  if (prefix !== '') out.push('x-forwarded-prefix', prefix)
  out.push(headerNames.requestId, forwarding.requestId)
  if (head.trailers) out.push('te', 'trailers')
  if (head.referer === '') return
  const referer = cleanReferer(head.referer, forwarding.prefix !== '')
  if (referer !== null) out.push('referer', referer)
}
