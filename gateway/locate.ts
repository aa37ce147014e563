/** Request → route → sandbox. What the modes look at, and in which order, is decided here; the grammar is in `policies/route.ts`. */
import { LRUCache } from 'lru-cache'
import { parseHostToken, parseUriPath, type BadRoute, type HostRoute, type Route, type RouteMode } from '#policies/route.ts'
import type { RequestHead } from './headers.ts'
import type { RouteTable, Sandbox } from './routes.ts'

export type Located = {
  readonly ok: true
  readonly route: Route
  readonly sandbox: Sandbox
  /** Raw path and query for the sandbox. */
  readonly target: string
  /** What URI mode took off the path, else ''. */
  readonly prefix: string
  /** The same without expiry and signature: what the sandbox may know. */
  readonly plainPrefix: string
  /** What named the sandbox. */
  readonly by: 'header' | 'host' | 'path'
  /** How much of the target's beginning looks like expiry and signature. */
  readonly hidden: number
}
/** `named`: the request names a sandbox, though not one that can be reached. */
export type NotLocated = { readonly ok: false; readonly fault: BadRoute['fault']; readonly detail: string; readonly route: Route | null }

export type LocateOptions = {
  readonly mode: RouteMode
  /** Only hosts below this domain name a sandbox; '' means any. Lower case, no dot at its end. */
  readonly baseDomain: string
}

const none = Symbol('names no sandbox')

/** Parsed tokens and hosts, good and bad ones: both come from clients, so the number is bounded. */
const remembered = 20_000
const longestRemembered = 256

export class Locator {
  readonly #options: LocateOptions
  readonly #table: RouteTable
  readonly #tokens = new LRUCache<string, HostRoute | BadRoute>({ max: remembered })
  /** By the whole Host; `none`: it names no sandbox in this mode. */
  readonly #hosts = new LRUCache<string, HostRoute | BadRoute | typeof none>({ max: remembered })

  constructor(options: LocateOptions, table: RouteTable) {
    this.#options = options
    this.#table = table
  }

  /** @param origin the request target from its path on, raw */
  locate(head: RequestHead, origin: string): Located | NotLocated {
    const { mode } = this.#options
    if (mode === 'uri') return this.#byPath(origin)
    const token = head.ingressTo === undefined && head.deprecatedIngressTo === undefined ? '' : firstNonEmpty(head.ingressTo, head.deprecatedIngressTo)
    if (token !== '') return this.#found(remember(this.#tokens, token, parseHostToken), origin, 'header')
    const { host } = head
    if (host === undefined || host === '') return mode === 'auto' ? this.#byPath(origin) : bad("missing header 'Opensandbox-Ingress-To' or 'Host'")
    const named = remember(this.#hosts, host, this.#readHost)
    if (named !== none) return this.#found(named, origin, 'host')
    return mode === 'auto' ? this.#byPath(origin) : bad(`invalid ingress route: invalid host: ${host}`)
  }

  /** The sandbox a Host names. Lower-cased: browsers do it, and ids are lower case. */
  readonly #readHost = (host: string): HostRoute | BadRoute | typeof none => {
    const { baseDomain, mode } = this.#options
    const lower = host.toLowerCase()
    // Without a base domain any host may name a sandbox; in auto mode those that cannot leave the path to do it.
    if (baseDomain === '') {
      const parsed = parseHostToken(lower)
      return mode === 'auto' && !parsed.ok ? none : parsed
    }
    const colon = lower.lastIndexOf(':')
    const written = colon > lower.lastIndexOf(']') ? lower.slice(0, colon) : lower
    // A name may say with a dot that it is absolute (RFC 1034 §3.1).
    const name = written.endsWith('.') ? written.slice(0, -1) : written
    const length = name.length - baseDomain.length - 1
    const label = length > 0 && name.endsWith(baseDomain) && name[length] === '.' ? name.slice(0, length) : ''
    return label === '' || label.includes('.') ? none : parseHostToken(label)
  }

  #found(parsed: HostRoute | BadRoute, origin: string, by: 'header' | 'host'): Located | NotLocated {
    if (!parsed.ok) return { ok: false, fault: parsed.fault, detail: parsed.detail, route: null }
    const sandbox = this.#table.get(parsed.route.id)
    return sandbox === undefined ? missing(parsed.route) : { ok: true, route: parsed.route, sandbox, target: origin, prefix: '', plainPrefix: '', by, hidden: 0 }
  }

  #byPath(origin: string): Located | NotLocated {
    const query = origin.indexOf('?')
    const path = query === -1 ? origin : origin.slice(0, query)
    const parsed = parseUriPath(path)
    if (!parsed.ok) return { ok: false, fault: parsed.fault, detail: parsed.detail, route: null }
    const sandbox = this.#table.get(parsed.route.id)
    if (sandbox === undefined) return missing(parsed.route)
    // On an open sandbox, segments that look like a signature belong to its own path.
    const rest = hasToken(sandbox) ? parsed.rest : parsed.legacyRest
    const taken = rest === '/' && !path.endsWith('/') ? path : path.slice(0, path.length - rest.length)
    const { expires, signature } = parsed.route
    const signed = expires !== undefined && signature !== undefined && rest === parsed.rest ? expires.length + signature.length + 2 : 0
    return { ok: true, route: parsed.route, sandbox, target: query === -1 ? rest : rest + origin.slice(query), prefix: taken, plainPrefix: signed === 0 ? taken : taken.slice(0, -signed), by: 'path', hidden: rest.length > parsed.rest.length ? rest.length - parsed.rest.length : 0 }
  }
}

export function hasToken(sandbox: Sandbox): boolean {
  const token = sandbox.entry.secureAccessToken
  return token !== undefined && token.trim() !== ''
}

function firstNonEmpty(first: string | undefined, second: string | undefined): string {
  const one = first?.trim() ?? ''
  return one !== '' ? one : (second?.trim() ?? '')
}

function remember<V extends object | symbol>(cache: LRUCache<string, V>, key: string, read: (key: string) => V): V {
  const known = cache.get(key)
  if (known !== undefined) return known
  if (key.length > longestRemembered) return read(key)
  // A copy: a piece of a header or target keeps all of it in memory.
  const own = Buffer.from(key, 'latin1').toString('latin1')
  const value = read(own)
  cache.set(own, value)
  return value
}

function bad(detail: string): NotLocated {
  return { ok: false, fault: 'EDGE_BAD_ROUTE', detail, route: null }
}

function missing(route: Route): NotLocated {
  return { ok: false, fault: 'EDGE_NO_ROUTE', detail: `sandbox not found: ${route.id}`, route }
}
