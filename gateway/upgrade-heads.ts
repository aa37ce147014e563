/** The heads of both sides of an upgrade, as this gateway sends them: http-proxy-3 would merge repeated fields. */
import type { IncomingMessage } from 'node:http'
import { connectionOptions } from './headers.ts'
import { narrowCookie, rewriterFor } from './response-headers.ts'
import type { Visit } from './visit.ts'

/**
 * The cleaned request fields as node:http wants them: one list of values per name, so that repeated ones stay apart.
 * @param authority the sandbox's `host:port`
 */
export function upgradeFields(visit: Visit, authority: string, preserveHost: boolean): IncomingMessage['headers'] {
  const fields: Record<string, string | string[]> = Object.create(null)
  const { out, host } = visit.head
  for (let i = 0; i < out.length; i += 2) {
    const name = (out[i] as string).toLowerCase()
    const value = out[i + 1] as string
    const before = fields[name]
    fields[name] = before === undefined ? value : typeof before === 'string' ? [before, value] : [...before, value]
  }
  fields['host'] = preserveHost && host !== undefined ? host : authority
  fields['connection'] = 'Upgrade'
  fields['upgrade'] = 'websocket'
  return fields as IncomingMessage['headers']
}

const hops = new Set(['connection', 'keep-alive', 'proxy-connection', 'proxy-authenticate', 'proxy-authorization', 'te', 'trailer', 'transfer-encoding', 'upgrade'])
/** Fields with references that URI mode moves below its prefix. */
const references = new Set(['location', 'refresh', 'content-location'])

/**
 * What the sandbox's raw response fields become for the client: no hop-by-hop ones, order and repetition kept, and cookies and references as in
 * every other response. Browsers take cookies from the answer to a handshake, too.
 */
export function answerFields(raw: readonly string[], visit: Visit, authority: string): string[] {
  const rewrite = rewriterFor(visit, authority)
  const named = new Set<string>()
  for (let i = 0; i < raw.length; i += 2) {
    if ((raw[i] as string).toLowerCase() === 'connection') for (const option of connectionOptions(raw[i + 1] as string)) named.add(option)
  }
  const out: string[] = []
  for (let i = 0; i < raw.length; i += 2) {
    const name = (raw[i] as string).toLowerCase()
    if (hops.has(name) || named.has(name)) continue
    const value = name === 'set-cookie' ? narrowCookie(raw[i + 1] as string, visit.ownHost) : (raw[i + 1] as string)
    out.push(raw[i] as string, rewrite !== null && (name === 'set-cookie' || references.has(name)) ? rewrite(name, value) : value)
  }
  return out
}
