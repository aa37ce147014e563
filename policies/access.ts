/** Who may reach a secured sandbox: the access header, the original's signed routes, our own tokens. The one file that uses node:crypto. */
import { createHmac, hash, timingSafeEqual } from 'node:crypto'
import { formatAccessToken, formatScope, parseAccessToken, scopeCovers, type AccessScope } from './access-token.ts'
import type { FaultCode } from './fault.ts'
import type { Problem } from './problem.ts'
import { parseExpiry, type Route } from './route.ts'

/** Key id (one of [0-9a-z]) to secret. */
export type AccessKeys = ReadonlyMap<string, Uint8Array>

const utf8 = new TextEncoder()
/** Characters that have room in `left` and `right`, whatever they are. */
const usual = 85
const left = new Uint8Array(1 + 3 * usual)
const right = new Uint8Array(1 + 3 * usual)

/** Compares in a time that does not depend on where the texts differ. */
export function equalSecret(given: string, wanted: string): boolean {
  // timingSafeEqual wants equal lengths, and the length of a secret is nobody's business: texts of the usual length are filled up to one
  // size with their length in front, others are hashed, which costs five times as much.
  if (given.length > usual || wanted.length > usual) return timingSafeEqual(digest(given), digest(wanted))
  return timingSafeEqual(fillUp(left, given), fillUp(right, wanted))
}

function fillUp(room: Uint8Array, text: string): Uint8Array {
  room.fill(0)
  room[0] = text.length
  utf8.encodeInto(text, room.subarray(1))
  return room
}

function digest(text: string): Uint8Array {
  return hash('sha256', text, 'buffer')
}

/**
 * Reads `a=<base64>,b=<base64>`: padded or not, with an optional `base64:` in front. Key ids are unique.
 * @returns the keys, or everything that is wrong; messages never repeat a secret
 */
export function parseAccessKeys(text: string, path = 'secure_access.keys'): { ok: true; keys: AccessKeys } | { ok: false; problems: readonly Problem[] } {
  const keys = new Map<string, Uint8Array>()
  const problems: Problem[] = []
  for (const [index, item] of text.split(',').map((part) => part.trim()).entries()) {
    if (item === '') continue
    const equals = item.indexOf('=')
    const id = equals === -1 ? item : item.slice(0, equals).trim()
    const at = `${path}[${index}]`
    const secret = equals === -1 ? null : readSecret(item.slice(equals + 1))
    if (!/^[0-9a-z]$/.test(id)) problems.push({ path: at, reason: 'the key id must be one character of [0-9a-z]' })
    else if (secret === null) problems.push({ path: at, reason: `the secret of key "${id}" must be base64 of at least one byte` })
    else if (keys.has(id)) problems.push({ path: at, reason: `key id "${id}" occurs twice` })
    else keys.set(id, secret)
  }
  return problems.length > 0 ? { ok: false, problems } : { ok: true, keys }
}

/** Standard base64, padded or not, with an optional `base64:` in front; null when it is not, or empty. */
export function readSecret(text: string): Uint8Array | null {
  const encoded = text.trim().replace(/^base64:/, '')
  const body = encoded.replace(/=+$/, '')
  const padding = encoded.length - body.length
  if (body === '' || !/^[A-Za-z0-9+/]+$/.test(body) || body.length % 4 === 1) return null
  if (padding !== 0 && (encoded.length % 4 !== 0 || padding > 2)) return null
  return Buffer.from(body, 'base64')
}

/**
 * The original's short signature: the first 8 hex digits of SHA-256 over length-prefixed secret and canonical text, and the key id.
 * 32 bits: whoever verifies it must limit the rate of failures.
 */
export function signShort(keyId: string, secret: Uint8Array, id: string, port: number, expires: string): string {
  const canonical = Buffer.from(`v1\nshort\n${id}\n${port}\n${expires}\n`)
  return hash('sha256', Buffer.concat([length32(secret), secret, length32(canonical), canonical]), 'hex').slice(0, 8) + keyId
}

function length32(bytes: Uint8Array): Uint8Array {
  const length = Buffer.alloc(4)
  length.writeUInt32BE(bytes.length)
  return length
}

/** Signatures that were found good under one key ring, so that they need not be computed again: a Map, or an LRU. Holds nothing else. */
export type VerifiedSignatures = { get(text: string): true | undefined; set(text: string, good: true): unknown }

export type AccessQuestion = {
  /** The sandbox's token; '' means everybody may. */
  readonly token: string
  /** First value of the access header, or undefined when the header is absent. An empty header is present, and wrong. */
  readonly header: string | undefined
  readonly route: Route
  readonly keys: AccessKeys
  readonly verified?: VerifiedSignatures
  /** Unix seconds. */
  readonly now: number
}
export type AccessAnswer =
  | { readonly ok: true; readonly by: 'open' | 'header' | 'signature' | 'token' }
  | { readonly ok: false; readonly fault: FaultCode; readonly detail: string }

/** The original's decision table: a present header decides alone, else the route's signature does. */
export function decideAccess({ token, header, route, keys, verified, now }: AccessQuestion): AccessAnswer {
  if (token === '') return { ok: true, by: 'open' }
  if (header !== undefined) return equalSecret(header.trim(), token) ? { ok: true, by: 'header' } : refused('secure access header mismatch')
  if (route.expires === undefined || route.signature === undefined) return refused('signature required for this sandbox')
  if (keys.size === 0) return { ok: false, fault: 'EDGE_VERIFIER_MISSING', detail: 'signature: ingress verifier not configured' }
  const expires = parseExpiry(route.expires)
  if (expires === null || BigInt(Math.floor(now)) > expires) return refused('access expired')
  const known = `short\n${route.id}\n${route.port}\n${route.expires}\n${route.signature}`
  if (verified?.get(known) === true) return { ok: true, by: 'signature' }
  const keyId = route.signature.slice(-1)
  const secret = keys.get(keyId)
  if (secret === undefined) return refused('unauthorized: unknown signed_key_id')
  const wanted = signShort(keyId, secret, route.id, route.port, route.expires)
  if (!equalSecret(route.signature, wanted)) return refused('unauthorized: signature mismatch')
  verified?.set(known, true)
  return { ok: true, by: 'signature' }
}

function refused(why: string): AccessAnswer {
  return { ok: false, fault: 'EDGE_UNAUTHORIZED', detail: `signature: ${why}` }
}

type Signed = { readonly id: string; readonly port: number; readonly expires: string; readonly epoch: number; readonly scopeText: string }

/** HMAC-SHA-256 over length-prefixed parts, so that no two sets of parts read the same; 43 characters base64url. */
export function signStrong(secret: Uint8Array, { id, port, expires, epoch, scopeText }: Signed): string {
  const parts = ['sp1', id, String(port), expires, String(epoch), scopeText].map((part) => Buffer.from(part))
  return createHmac('sha256', secret).update(Buffer.concat(parts.flatMap((part) => [length32(part), part]))).digest('base64url')
}

export type Minting = { readonly id: string; readonly port: number; readonly epoch: number; readonly scope: AccessScope; readonly keyId: string; readonly secret: Uint8Array; /** Unix seconds. */ readonly expires: bigint }

/** Mints our strong token. @throws RangeError for a scope that cannot be written */
export function mintAccessToken({ id, port, epoch, scope, keyId, secret, expires }: Minting): string {
  const parts = { id, port, expires: expires.toString(36), epoch, scopeText: formatScope(scope) }
  return formatAccessToken({ ...parts, keyId, signature: signStrong(secret, parts) })
}

export type StrongQuestion = {
  readonly token: string
  readonly id: string
  readonly port: number
  readonly method: string
  /** Raw path for the sandbox, no query. */
  readonly path: string
  /** The sandbox's epoch; older tokens are revoked. */
  readonly epoch: number
  readonly keys: AccessKeys
  readonly verified?: VerifiedSignatures
  readonly now: number
}

/** Verifies our strong token for one request. The signature comes first: what an unsigned text claims is of no interest. */
export function decideStrongAccess({ token, id, port, method, path, epoch, keys, verified, now }: StrongQuestion): AccessAnswer {
  const read = parseAccessToken(token)
  if (read === null) return refusedToken('is malformed')
  const known = `strong\n${id}\n${port}\n${token}`
  if (verified?.get(known) !== true) {
    const secret = keys.get(read.keyId)
    if (secret === undefined || !equalSecret(read.signature, signStrong(secret, { ...read, id, port }))) return refusedToken('is not valid for this sandbox and port')
    verified?.set(known, true)
  }
  if (BigInt(Math.floor(now)) > (parseExpiry(read.expires) as bigint)) return refusedToken('has expired')
  if (read.epoch < epoch) return refusedToken('was revoked')
  if (!scopeCovers(read.scope, method, path)) return refusedToken('does not cover this method and path')
  return { ok: true, by: 'token' }
}

function refusedToken(why: string): AccessAnswer {
  return { ok: false, fault: 'EDGE_UNAUTHORIZED', detail: `access token ${why}` }
}
