/** Which header fields of a sandbox's response cross the gateway, and what changes on the way: cookies too wide, references in URI mode. */
import { Fault } from '#policies/fault.ts'
import { connectionOptions } from './headers.ts'
import type { Visit } from './visit.ts'

/** 1xx answers of one exchange. Nothing holds up who sends them, and the client may not read. */
export const mostInformed = 16

/** Response fields that end here. RFC 9110 §7.6.1; `trailer` is decided by the relay, which knows the framing. */
const responseHops = new Set(['connection', 'keep-alive', 'proxy-connection', 'proxy-authenticate', 'proxy-authorization', 'te', 'transfer-encoding', 'upgrade'])

export type ResponseFields = Readonly<Record<string, string | string[] | undefined>>

/**
 * The end-to-end fields of a sandbox's response as a flat list for writeHead; repeated ones stay apart.
 * @param fields lower-case names, as undici parsed them
 * @param rewrite null outside URI mode: what to do with Location, Refresh and the Path of cookies
 * @param ownHost the host that is the sandbox's alone: a cookie may name it, and no other; '' when there is none
 */
export function responseFields(fields: ResponseFields, rewrite: ((name: string, value: string) => string) | null, ownHost: string): string[] {
  const out: string[] = []
  const named = fields['connection']
  const dropped = named !== undefined && named !== 'keep-alive' && named !== 'close' ? connectionOptions(String(named)) : null
  for (const name in fields) {
    if (responseHops.has(name) || (dropped !== null && dropped.has(name))) continue
    const value = fields[name] as string | string[]
    if (typeof value === 'string') out.push(name, rewriteField(name, value, rewrite, ownHost))
    else for (const one of value) out.push(name, rewriteField(name, one, rewrite, ownHost))
  }
  return out
}

/**
 * Only plain chunks are undone here; any other coding would reach the client undeclared. RFC 9112 §6.1.
 * @throws Fault
 */
export function checkTransferCoding(fields: ResponseFields): void {
  const coding = fields['transfer-encoding']
  // Said twice by some, and meant once.
  if (coding !== undefined && !String(coding).split(',').every((one) => one.trim().toLowerCase() === 'chunked')) throw new Fault('EDGE_UPSTREAM_BROKEN', 'the sandbox sent a body in a transfer coding other than chunked')
}

function rewriteField(name: string, value: string, rewrite: ((name: string, value: string) => string) | null, ownHost: string): string {
  if (name === 'set-cookie') {
    const narrowed = narrowCookie(value, ownHost)
    return rewrite === null ? narrowed : rewrite(name, narrowed)
  }
  return rewrite !== null && (name === 'location' || name === 'refresh' || name === 'content-location') ? rewrite(name, value) : value
}

/** The host a client named, for the cookies of the answer: without the port, lower-case; '' when there is no Host. */
export function hostName(host: string | undefined): string {
  if (host === undefined) return ''
  const colon = host.lastIndexOf(':')
  return (colon > host.lastIndexOf(']') ? host.slice(0, colon) : host).toLowerCase()
}

/**
 * Takes a Domain that is not the sandbox's own host off a cookie: with it, one sandbox could set cookies for its neighbours.
 * @param ownHost '' where sandboxes share a host: there every Domain goes, also that host, below which neighbours may have hosts of their own
 */
export function narrowCookie(cookie: string, ownHost: string): string {
  if (!cookie.includes(';')) return cookie
  const parts = cookie.split(';')
  const kept = parts.filter((part, index) => {
    if (index === 0) return true
    const equals = part.indexOf('=')
    const name = (equals === -1 ? part : part.slice(0, equals)).trim().toLowerCase()
    return name !== 'domain' || (ownHost !== '' && part.slice(equals + 1).trim().toLowerCase() === ownHost)
  })
  return kept.length === parts.length ? cookie : kept.join(';')
}

/** What becomes of the references in an answer; null where they stay: the path named no sandbox. @param authority the sandbox's own `host:port` */
export function rewriterFor({ head, prefix, plainPrefix }: Visit, authority: string): ((name: string, value: string) => string) | null {
  return prefix === '' ? null : prefixRewriter(head.forwardedPrefix + prefix, head.forwardedPrefix + plainPrefix, authority)
}

/**
 * Moves root-relative references of a response below the prefix that URI mode took off the path, and a proxy of ours before it.
 * @param prefix for example `/my-sandbox/8080`, with token or signature where the client came in with one
 * @param plain the same without: the sandbox was told this one, and may have used it
 * @param authority the sandbox's own `host:port`, as an application may write it into an absolute Location
 */
export function prefixRewriter(prefix: string, plain: string, authority: string): (name: string, value: string) => string {
  const below = (path: string, base: string): boolean => path === base || path.startsWith(`${base}/`)
  const under = (path: string): string => (below(path, prefix) ? path : prefix + (below(path, plain) ? path.slice(plain.length) : path))
  const reference = (value: string): string => {
    if (value.startsWith('/')) return value.startsWith('//') ? value : under(value)
    const own = `http://${authority}`
    return value === own || value.startsWith(`${own}/`) ? under(value.slice(own.length) || '/') : value
  }
  return (name, value) => {
    // Every one: browsers take the last, and do not mind spaces (RFC 6265 §5.2).
    if (name === 'set-cookie') return value.replace(/(;\s*path\s*=\s*)(\/[^;]*)/gi, (_all, lead: string, path: string) => lead + (path.trimEnd() === '/' ? `${prefix}/` : under(path)))
    if (name === 'refresh') return value.replace(/^(\s*[\d.]+\s*[;,]\s*url\s*=\s*)(['"]?)(.*)$/i, (_all, lead: string, quote: string, url: string) => lead + quote + reference(url))
    return reference(value)
  }
}

/** A head as it goes on the wire, but for the empty line behind it. @param fields name, value, name, value… */
export function headText(line: string, fields: readonly string[]): string {
  let text = `${line}\r\n`
  for (let i = 0; i < fields.length; i += 2) text += `${fields[i]}: ${fields[i + 1]}\r\n`
  return text
}
