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
}
/** `named`: the request names a sandbox, though not one that can be reached. */
export type NotLocated = { readonly ok: false; readonly fault: BadRoute['fault']; readonly detail: string; readonly route: Route | null }

export type LocateOptions = {
  readonly mode: RouteMode
  /** Only hosts below this domain name a sandbox; '' means any. Lower case. */
  readonly baseDomain: string
}

/** Parsed tokens, good and bad ones: both come from clients, so the number is bounded. */
const parsedTokens = 20_000

export class Locator {
  readonly #options: LocateOptions
  readonly #table: RouteTable
  readonly #tokens = new LRUCache<string, HostRoute | BadRoute>({ max: parsedTokens })

  constructor(options: LocateOptions, table: RouteTable) {
    this.#options = options
    this.#table = table
  }

  /** @param origin the request target from its path on, raw */
  locate(head: RequestHead, host: string | undefined, origin: string): Located | NotLocated {
    const { mode } = this.#options
    if (mode !== 'uri') {
      const token = firstNonEmpty(head.ingressTo, head.deprecatedIngressTo)
      if (token !== '') return this.#byToken(token, origin)
      const label = this.#hostLabel(host ?? '')
      if (label !== '') return this.#byToken(label, origin)
      if (mode !== 'auto') {
        const why = host === undefined || host === '' ? "missing header 'Opensandbox-Ingress-To' or 'Host'" : `invalid ingress route: invalid host: ${host}`
        return { ok: false, fault: 'EDGE_BAD_ROUTE', detail: why, route: null }
      }
    }
    return this.#byPath(origin)
  }

  /** The part of a Host that names a sandbox, lower case: browsers lower-case hosts, and ids are lower case. '' when it names none. */
  #hostLabel(host: string): string {
    const { baseDomain } = this.#options
    if (host === '') return ''
    const lower = host.toLowerCase()
    if (baseDomain === '') return this.#options.mode === 'auto' && !lower.includes('-') ? '' : lower
    const colon = lower.lastIndexOf(':')
    const name = colon > lower.lastIndexOf(']') ? lower.slice(0, colon) : lower
    const label = name.length - baseDomain.length - 1
    return label > 0 && name.endsWith(baseDomain) && name[label] === '.' && !name.slice(0, label).includes('.') ? name.slice(0, label) : ''
  }

  #byToken(token: string, origin: string): Located | NotLocated {
    let parsed = this.#tokens.get(token)
    if (parsed === undefined) {
      parsed = parseHostToken(token)
      if (token.length <= 256) this.#tokens.set(token, parsed)
    }
    if (!parsed.ok) return { ok: false, fault: parsed.fault, detail: parsed.detail, route: null }
    const sandbox = this.#table.get(parsed.route.id)
    return sandbox === undefined ? missing(parsed.route) : { ok: true, route: parsed.route, sandbox, target: origin, prefix: '' }
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
    return { ok: true, route: parsed.route, sandbox, target: query === -1 ? rest : rest + origin.slice(query), prefix: taken }
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

function missing(route: Route): NotLocated {
  return { ok: false, fault: 'EDGE_NO_ROUTE', detail: `sandbox not found: ${route.id}`, route }
}
