/** Where a client reaches a port of a sandbox. */
import type { FastifyInstance } from 'fastify'
import { mintAccessToken, readSecret, signShort } from '#policies/access.ts'
import { formatScope, wholeSandbox, type AccessScope } from '#policies/access-token.ts'
import { formatEndpoint, type Endpoint, type Route } from '#policies/route.ts'
import { wellKnownPorts } from '#policies/wire.ts'
import { networkInterfaces } from 'node:os'
import { ApiError } from '../api-error.ts'
import type { Config } from '../config.ts'
import { invalid } from '../create-request.ts'
import type { SandboxRecord } from '../group.ts'
import type { ServerDeps } from '../server.ts'

type Asked = { Params: { id: string; port: string }; Querystring: Record<string, unknown> }

export function addEndpointRoutes(app: FastifyInstance, { groups, config, now }: ServerDeps): void {
  app.get<Asked>('/sandboxes/:id/endpoints/:port', async (request) => {
    const { use_server_proxy, expires, form } = request.query
    if (readFlag(use_server_proxy)) throw new ApiError('NOT_IMPLEMENTED', 'use_server_proxy: the server proxy is not available.')
    const until = readExpires(expires, config, now())
    const scope = readForm(form, until, request.query)
    const port = readPort(request.params.port)
    const { record } = groups.get(request.params.id)
    const { endpoint, headers, signedEndpoint } = config.ingress.mode !== 'gateway' ? directEndpoint(config, record, port)
      : scope === null || until === null ? gatewayEndpoint(config, record, port, until) : strongEndpoint(config, record, port, BigInt(until), scope)
    const all = { ...headers, ...(port === wellKnownPorts.egressApi && record.egress !== null ? { 'OPENSANDBOX-EGRESS-AUTH': record.egress.token } : {}) }
    return { endpoint, ...(Object.keys(all).length > 0 ? { headers: all } : {}), ...(signedEndpoint === undefined ? {} : { signedEndpoint }) }
  })
}

/** `signedEndpoint`: opens by itself, for clients that send no headers. */
type Answer = Endpoint & { readonly signedEndpoint?: string }

/** A signed endpoint opens the sandbox by itself until then; otherwise a secured sandbox wants its token as a header. */
function gatewayEndpoint(config: Config, record: SandboxRecord, port: number, until: string | null): Answer {
  const { endpoint, headers } = plainEndpoint(config, { id: record.id, port, ...(until === null ? {} : sign(config, record.id, port, BigInt(until).toString(36))) })
  const secured = record.secureAccessToken !== null && until === null ? { 'OpenSandbox-Secure-Access': record.secureAccessToken } : {}
  return { endpoint, headers: { ...headers, ...secured } }
}

/**
 * Our own token: as a header that goes with the plain endpoint, and in an endpoint of its own, as a path segment where the path names
 * the sandbox, else as a query parameter, which browsers lose on the way. In header mode only the header.
 */
function strongEndpoint(config: Config, record: SandboxRecord, port: number, expires: bigint, scope: AccessScope): Answer {
  if (record.secureAccessToken === null) throw new ApiError('SANDBOX::API_NOT_SUPPORTED', 'form: the sandbox was created without secureAccess: it is open to everybody who knows its id.')
  const { keyId, secret } = activeKey(config)
  const token = mintAccessToken({ id: record.id, port, epoch: record.accessEpoch ?? 0, scope, keyId, secret, expires })
  const { endpoint, headers } = plainEndpoint(config, { id: record.id, port })
  const mode = config.ingress.gateway?.route.mode
  const signed = mode === 'uri' ? `${endpoint}/${token}${scope.pathPrefix}` : mode === 'wildcard' ? `${endpoint}${scope.pathPrefix}?sallyport_access=${token}` : undefined
  return { endpoint, headers: { ...headers, 'Sallyport-Access': token }, ...(signed === undefined ? {} : { signedEndpoint: signed }) }
}

function plainEndpoint(config: Config, route: Route): Endpoint {
  const gateway = config.ingress.gateway
  if (gateway === undefined) throw new ApiError('GENERAL::UNKNOWN_ERROR', 'No gateway is configured.')
  return formatEndpoint(gateway.route.mode, gateway.address, route)
}

function sign(config: Config, id: string, port: number, expires: string): { expires: string; signature: string } {
  const { keyId, secret } = activeKey(config)
  return { expires, signature: signShort(keyId, secret, id, port, expires) }
}

function activeKey(config: Config): { keyId: string; secret: Uint8Array } {
  const access = config.ingress.secure_access
  const key = access?.keys.find((candidate) => candidate.key_id === access.active_key)
  const secret = key === undefined ? null : readSecret(key.key)
  if (key === undefined || secret === null) throw new ApiError('SANDBOX::API_NOT_SUPPORTED', 'expires: needs [ingress.secure_access] keys.')
  return { keyId: key.key_id, secret }
}

/**
 * Ports of ours on the host. execd forwards to every other port, its own included: clients expect the port at the end of the
 * path. The sidecar's API has a host port of its own: execd belongs to the sandbox, and must not see the token that changes its
 * rules. Without execd nothing forwards.
 */
function directEndpoint(config: Config, record: SandboxRecord, port: number): Answer {
  const { http, egress, execd } = record.hostPorts
  const guarded = port === wellKnownPorts.egressApi && record.egress !== null
  const published = port === wellKnownPorts.http ? http : guarded ? egress : undefined
  if (published !== undefined) return { endpoint: `${publicHost(config)}:${published}` }
  if (guarded) throw new ApiError('DOCKER::NETWORK_MODE_ENDPOINT_UNAVAILABLE', 'The egress API of this sandbox has no host port.')
  if (execd !== undefined) return { endpoint: `${publicHost(config)}:${execd}/proxy/${port}` }
  throw new ApiError('NOT_IMPLEMENTED', `endpoints: port ${port} is not published in direct mode without execd; use ingress.mode = "gateway".`)
}

function publicHost(config: Config): string {
  const host = config.server.eip ?? config.server.host
  if (host !== '0.0.0.0' && host !== '::') return host.includes(':') && !host.startsWith('[') ? `[${host}]` : host
  const own = Object.values(networkInterfaces()).flat().find((address) => address !== undefined && address.family === 'IPv4' && !address.internal)
  return own?.address ?? '127.0.0.1'
}

function readPort(text: string): number {
  if (!/^[+-]?\d{1,9}$/.test(text)) throw invalid([{ path: 'port', reason: 'must be a whole number' }])
  const port = Number(text)
  if (port < 1 || port > 65535) throw new ApiError('DOCKER::INVALID_PORT', `port: ${port} is not between 1 and 65535`)
  return port
}

function readFlag(value: unknown): boolean {
  const text = String(value ?? 'false').toLowerCase()
  if (['true', '1', 'yes', 'on', 't', 'y'].includes(text)) return true
  if (['false', '0', 'no', 'off', 'f', 'n'].includes(text)) return false
  throw invalid([{ path: 'query.use_server_proxy', reason: 'must be true or false' }])
}

/** Unix seconds, as decimal digits; null when not asked for. */
function readExpires(value: unknown, config: Config, now: number): string | null {
  if (value === undefined) return null
  if (config.ingress.mode !== 'gateway') throw new ApiError('SANDBOX::API_NOT_SUPPORTED', 'expires: signed endpoints need ingress.mode = "gateway".')
  if (typeof value !== 'string' || !/^\d{1,20}$/.test(value) || BigInt(value) > 0xffff_ffff_ffff_ffffn) throw invalid([{ path: 'query.expires', reason: 'must be Unix seconds' }])
  if (BigInt(value) * 1000n <= BigInt(now)) throw invalid([{ path: 'query.expires', reason: 'must be in the future' }])
  return value
}

/** null: the original's signature. Else our token, for `methods` (`GET,HEAD`; all) and paths below `path_prefix` (`/`). */
function readForm(form: unknown, until: string | null, query: Record<string, unknown>): AccessScope | null {
  if (form === undefined || form === 'short') return null
  if (form !== 'strong') throw invalid([{ path: 'query.form', reason: 'must be short or strong' }])
  if (until === null) throw invalid([{ path: 'query.expires', reason: 'is required with form=strong' }])
  const scope = { methods: query.methods === undefined ? wholeSandbox.methods : String(query.methods).split(','), pathPrefix: String(query.path_prefix ?? wholeSandbox.pathPrefix) }
  try {
    formatScope(scope)
    return scope
  } catch {
    throw invalid([{ path: 'query.methods', reason: 'must be methods in capitals, with commas between them, and query.path_prefix a path that begins with "/", without "." and ".." segments' }])
  }
}
