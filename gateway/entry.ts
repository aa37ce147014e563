/**
 * Our strong access token at the door: where a request may carry it (header, path segment, query parameter, cookie), and how it is
 * taken off before the sandbox sees the request. What it proves is decided in `policies/access.ts`.
 */
import type { IncomingHttpHeaders } from 'node:http'
import { looksLikeAccessToken, parseAccessToken } from '#policies/access-token.ts'
import { parseExpiry } from '#policies/route.ts'

export const queryParameter = 'sallyport_access'
/** On a host of its own: the prefix makes browsers insist on Secure, Path=/ and no Domain (RFC 6265bis §4.1.3.2). */
export const hostCookie = '__Host-sallyport-access'
/** On the one origin all sandboxes share in URI mode; off unless configured. */
export const pathCookie = 'sallyport-access'
/** Seconds a browser keeps an entry, at most. */
const longestEntry = 3_600

/** Where the first segment of a path ends that begins like a token, with a secret in it even when it is no whole one; 0 for every other path. */
export function endOfTokenSegment(target: string): number {
  if (!looksLikeAccessToken(target.slice(1, 5))) return 0
  let end = 1
  while (end < target.length && target[end] !== '/' && target[end] !== '?') end++
  return end
}

/**
 * Takes a token that is the first segment of the sandbox's path: `/sp1.…/rest`.
 * @param target raw path and query
 * @param secured anything that begins like one is taken; an open sandbox may have paths of its own that do
 */
export function takeSegment(target: string, secured: boolean): { readonly token: string; readonly rest: string } | null {
  const end = endOfTokenSegment(target)
  if (end === 0) return null
  const token = target.slice(1, end)
  if (!secured && parseAccessToken(token) === null) return null
  const rest = target.slice(end)
  return { token, rest: rest.startsWith('/') ? rest : `/${rest}` }
}

/** `scheme://host/id/port`, below whatever a proxy put in front of it, and then expiry and signature. */
const signedPath = /^([^?#]*?\/[^/?#]+\/[0-9]{1,5})\/[0-9a-z]{1,13}\/[0-9a-f]{8}[0-9a-z](?=[/?#]|$)/

/** What a Referer would tell the sandbox of our tokens and signatures: null for one that holds a token, and without the signature of a URI-mode path. */
export function cleanReferer(referer: string, uriMode: boolean): string | null {
  if (mayHoldToken(referer)) return null
  return uriMode ? referer.replace(signedPath, '$1') : referer
}

/** Does a URL or its path hold what may be a token, as a segment or as a parameter? */
export function mayHoldToken(url: string): boolean {
  return url.includes('/sp1.') || url.includes(`${queryParameter}=`)
}

/** Takes every `sallyport_access` off a query; the other parameters stay byte for byte. The first one counts. */
export function takeParameter(target: string): { readonly token: string; readonly rest: string } | null {
  const query = target.indexOf('?')
  if (query === -1 || !target.includes(`${queryParameter}=`, query)) return null
  let token: string | undefined
  const kept = target.slice(query + 1).split('&').filter((part) => {
    if (!part.startsWith(`${queryParameter}=`)) return true
    token ??= part.slice(queryParameter.length + 1)
    return false
  })
  if (token === undefined) return null
  return { token, rest: target.slice(0, query) + (kept.length === 0 ? '' : `?${kept.join('&')}`) }
}

export type CookieEntry = { readonly host: string; readonly path: string; readonly rest: string }

/** Takes our cookies out of a Cookie header; null when there are none. */
export function takeCookies(header: string): CookieEntry | null {
  if (!header.includes('sallyport-access=')) return null
  let host = ''
  let path = ''
  const kept = header.split(';').filter((pair) => {
    const text = pair.trim()
    if (text.startsWith(`${hostCookie}=`)) host ||= text.slice(hostCookie.length + 1)
    else if (text.startsWith(`${pathCookie}=`)) path ||= text.slice(pathCookie.length + 1)
    else return true
    return false
  })
  return { host, path, rest: kept.join(';').trim() }
}

/**
 * The cookie that lets assets, EventSource and WebSocket of a page follow its entry.
 * @param prefix what URI mode took off the path; '' on a host of the sandbox's own
 * @param now Unix seconds
 */
export function entryCookie(token: string, prefix: string, secure: boolean, now: number): string {
  const expires = parseExpiry(parseAccessToken(token)?.expires ?? '') ?? 0n
  const left = expires - BigInt(Math.floor(now))
  const age = left < 0n ? 0 : left > BigInt(longestEntry) ? longestEntry : Number(left)
  const common = `HttpOnly; SameSite=Lax; Max-Age=${age}`
  return prefix === '' ? `${hostCookie}=${token}; Path=/; Secure; ${common}` : `${pathCookie}=${token}; Path=${prefix}/; ${secure ? 'Secure; ' : ''}${common}`
}

/**
 * Does a page of another origin ask? A cookie comes along unasked, also when the page of a neighbouring sandbox asks: for SameSite the two are one
 * site, unless their domain is on the Public Suffix List. No page can change what its browser says of it: Origin, where it names one, and
 * Sec-Fetch-Site, which Chrome's handshakes lack. `Origin: null` says nothing: a form on a page with `Referrer-Policy: no-referrer` is sent with it to
 * its own host, too. Who follows a link only reads, and the page with the link sees nothing of it.
 * @param hosts what this host is called, with its port; the scheme is not compared, since TLS may end before us
 * @param byHost the host names a sandbox and a port: its other ports are the same sandbox
 */
export function asksFromElsewhere(headers: IncomingHttpHeaders, method: string, hosts: readonly string[], byHost: boolean): boolean {
  const { origin, 'sec-fetch-site': site, 'sec-fetch-mode': mode } = headers
  const plain = (authority: string): string => (byHost ? plainAuthority(authority).replace(portInLabel, '$1-*') : plainAuthority(authority))
  const authority = /^[a-z][a-z0-9+.-]*:\/\/(.+)$/i.exec(origin ?? '')?.[1]
  if (authority !== undefined && hosts.some((host) => plain(host) === plain(authority))) return false
  if (site === 'same-origin' || site === 'none') return false
  if (site !== undefined) return mode !== 'navigate' || (method !== 'GET' && method !== 'HEAD')
  return origin !== undefined
}

/** The port of `<id>-<port>.example.com`, behind what `$1` is. */
const portInLabel = /^([^.]*)-\d{1,5}(?=\.)/

/** Lower-case, and without a port that browsers leave out. */
function plainAuthority(authority: string): string {
  return authority.trim().toLowerCase().replace(/:(?:80|443)$/, '')
}

/** A path as a Location on the same host: two leading slashes, or what browsers take for them, would name another one. */
export function sameHostLocation(target: string): string {
  return target[1] === '/' || target[1] === '\\' ? `/.${target}` : target
}
