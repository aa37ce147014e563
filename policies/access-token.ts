/**
 * Our strong access token, the text and what it covers; `access.ts` signs and verifies it.
 *
 *     sp1.<key id>.<expiry base36>.<epoch>.<scope>.<43 characters base64url>
 *
 * The scope is base64url of `<methods or *> <path prefix>`, so that a token is one header value, path segment or query value.
 */
import { parseExpiry } from './route.ts'

/** `methods` null: every method. `pathPrefix` begins with `/` and counts from the sandbox's own root. */
export type AccessScope = { readonly methods: readonly string[] | null; readonly pathPrefix: string }
export type AccessToken = {
  readonly keyId: string
  /** Base36 Unix seconds, as written. */
  readonly expires: string
  /** A token of a lower epoch than its sandbox's is revoked. */
  readonly epoch: number
  /** As written: the signature covers the text. */
  readonly scopeText: string
  readonly scope: AccessScope
  readonly signature: string
}

export const wholeSandbox: AccessScope = { methods: null, pathPrefix: '/' }

const shape = /^sp1\.([0-9a-z])\.([0-9a-z]{1,13})\.(0|[1-9]\d{0,9})\.([A-Za-z0-9_-]{1,1400})\.([A-Za-z0-9_-]{43})$/
const scopeShape = /^(\*|[A-Z]{1,20}(?:,[A-Z]{1,20}){0,15}) (\/[\x21-\x7e]{0,1000})$/

/** Does a path segment or header look like a token of ours (whether or not it is a valid one)? */
export function looksLikeAccessToken(text: string): boolean {
  return text.startsWith('sp1.')
}

/** The parts of a token, or null when it is not one. Says nothing about its signature. */
export function parseAccessToken(text: string): AccessToken | null {
  const match = shape.exec(text)
  if (match === null) return null
  const [, keyId, expires, epoch, scopeText, signature] = match as unknown as [string, string, string, string, string, string]
  const scope = parseScope(scopeText)
  if (scope === null || parseExpiry(expires) === null) return null
  return { keyId, expires, epoch: Number(epoch), scopeText, scope, signature }
}

export function formatAccessToken({ keyId, expires, epoch, scopeText, signature }: Omit<AccessToken, 'scope'>): string {
  return `sp1.${keyId}.${expires}.${epoch}.${scopeText}.${signature}`
}

/** @throws RangeError for methods or a prefix that a scope cannot hold */
export function formatScope({ methods, pathPrefix }: AccessScope): string {
  const text = `${methods === null ? '*' : methods.join(',')} ${pathPrefix}`
  if (!scopeShape.test(text) || hasDotSegment(pathPrefix)) throw new RangeError('a scope is methods in capitals and a path prefix that begins with "/"')
  return Buffer.from(text, 'latin1').toString('base64url')
}

function parseScope(encoded: string): AccessScope | null {
  const match = scopeShape.exec(Buffer.from(encoded, 'base64url').toString('latin1'))
  if (match === null) return null
  const [, methods, pathPrefix] = match as unknown as [string, string, string]
  return { methods: methods === '*' ? null : methods.split(','), pathPrefix }
}

/**
 * Does the scope cover this request? The prefix ends at a segment: `/api` covers `/api` and `/api/x`, not `/apix`.
 * @param path raw path for the sandbox, no query
 */
export function scopeCovers(scope: AccessScope, method: string, path: string): boolean {
  if (scope.methods !== null && !scope.methods.includes(method)) return false
  const prefix = scope.pathPrefix
  if (prefix === '/') return true
  // The path is forwarded raw: what the sandbox would resolve to a place outside the prefix must not pass under it.
  if (!path.startsWith(prefix) || hasDotSegment(path)) return false
  return prefix.endsWith('/') || path.length === prefix.length || path[prefix.length] === '/'
}

/** Any spelling of a `.` or `..` segment: escaped, behind an escaped slash, behind a backslash. */
function hasDotSegment(path: string): boolean {
  return /(^|\/|\\|%2f|%5c)(\.|%2e){1,2}(;|\/|\\|%2f|%5c|$)/i.test(path)
}
