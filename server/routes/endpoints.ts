/** Where a client reaches a port of a sandbox. */
import type { FastifyInstance } from 'fastify'
import { readSecret, signShort } from '#policies/access.ts'
import { formatEndpoint, type Endpoint } from '#policies/route.ts'
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
    const { use_server_proxy, expires } = request.query
    if (readFlag(use_server_proxy)) throw new ApiError('NOT_IMPLEMENTED', 'use_server_proxy: the server proxy is not available.')
    const until = readExpires(expires, config, now())
    const port = readPort(request.params.port)
    const { record } = groups.get(request.params.id)
    const { endpoint, headers } = config.ingress.mode === 'gateway' ? gatewayEndpoint(config, record, port, until) : directEndpoint(config, record, port)
    const all = { ...headers, ...(port === wellKnownPorts.egressApi && record.egress !== null ? { 'OPENSANDBOX-EGRESS-AUTH': record.egress.token } : {}) }
    return { endpoint, ...(Object.keys(all).length > 0 ? { headers: all } : {}) }
  })
}

/** A signed endpoint opens the sandbox by itself until then; otherwise a secured sandbox wants its token as a header. */
function gatewayEndpoint(config: Config, record: SandboxRecord, port: number, until: string | null): Endpoint {
  const gateway = config.ingress.gateway
  if (gateway === undefined) throw new ApiError('GENERAL::UNKNOWN_ERROR', 'No gateway is configured.')
  const { endpoint, headers } = formatEndpoint(gateway.route.mode, gateway.address, { id: record.id, port, ...(until === null ? {} : sign(config, record.id, port, until)) })
  const secured = record.secureAccessToken !== null && until === null ? { 'OpenSandbox-Secure-Access': record.secureAccessToken } : {}
  return { endpoint, headers: { ...headers, ...secured } }
}

function sign(config: Config, id: string, port: number, expires: string): { expires: string; signature: string } {
  const access = config.ingress.secure_access
  const key = access?.keys.find((candidate) => candidate.key_id === access.active_key)
  const secret = key === undefined ? null : readSecret(key.key)
  if (key === undefined || secret === null) throw new ApiError('SANDBOX::API_NOT_SUPPORTED', 'expires: needs [ingress.secure_access] keys.')
  return { expires, signature: signShort(key.key_id, secret, id, port, expires) }
}

/**
 * Ports of ours on the host. execd forwards to every other port, its own included: clients expect the port at the end of the
 * path. The sidecar's API has a host port of its own: execd belongs to the sandbox, and must not see the token that changes its
 * rules. Without execd nothing forwards.
 */
function directEndpoint(config: Config, record: SandboxRecord, port: number): Endpoint {
  const { http, egress, execd } = record.hostPorts
  const guarded = port === wellKnownPorts.egressApi && record.egress !== null
  const published = port === wellKnownPorts.http ? http : guarded ? egress : undefined
  if (published !== undefined) return { endpoint: `${publicHost(config)}:${published}` }
  if (guarded) throw new ApiError('DOCKER::NETWORK_MODE_ENDPOINT_UNAVAILABLE', 'The egress API of this sandbox has no host port.')
  if (execd !== undefined) return { endpoint: `${publicHost(config)}:${execd}/proxy/${port}` }
  throw new ApiError('NOT_IMPLEMENTED', `endpoints: port ${port} is not published in direct mode without execd; use ingress.mode = "gateway".`)
}

function publicHost(config: Config): string {
  if (config.server.eip !== undefined) return config.server.eip
  const host = config.server.host
  if (host !== '0.0.0.0' && host !== '::') return host.includes(':') ? `[${host}]` : host
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

/** Unix seconds → base 36, as the signed route carries it; null when not asked for. */
function readExpires(value: unknown, config: Config, now: number): string | null {
  if (value === undefined) return null
  if (config.ingress.mode !== 'gateway') throw new ApiError('SANDBOX::API_NOT_SUPPORTED', 'expires: signed endpoints need ingress.mode = "gateway".')
  if (typeof value !== 'string' || !/^\d{1,20}$/.test(value) || BigInt(value) > 0xffff_ffff_ffff_ffffn) throw invalid([{ path: 'query.expires', reason: 'must be Unix seconds' }])
  if (BigInt(value) * 1000n <= BigInt(now)) throw invalid([{ path: 'query.expires', reason: 'must be in the future' }])
  return BigInt(value).toString(36)
}
