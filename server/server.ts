/** The HTTP surface: every route bare and under `/v1`, one way to say who asked, one shape of error. No listening here. */
import { randomUUID } from 'node:crypto'
import { STATUS_CODES } from 'node:http'
import type { Duplex } from 'node:stream'
import Fastify, { type FastifyError, type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import { equalSecret } from '#policies/access.ts'
import { headerNames, renewalsPath, routeStreamPath } from '#policies/wire.ts'
import { ApiError, apiErrors, tooMany, type ApiErrorCode } from './api-error.ts'
import type { Config } from './config.ts'
import type { Groups } from './groups.ts'
import { RateLimit } from './rate-limit.ts'
import type { RouteStream } from './route-stream.ts'
import { addAccessRoutes } from './routes/access.ts'
import { addEndpointRoutes } from './routes/endpoints.ts'
import { addHealthRoutes, type Readiness } from './routes/health.ts'
import { addInternalRoutes } from './routes/internal.ts'
import { addMetricsRoutes } from './routes/metrics.ts'
import { addNetworkPolicyRoutes } from './routes/network-policy.ts'
import { addSandboxRoutes } from './routes/sandboxes.ts'
import { addDocsRoutes, addUnbuiltRoutes, docsPaths } from './routes/unbuilt.ts'
import type { AskPolicy } from './sidecar-client.ts'

export type ServerDeps = {
  readonly config: Config
  readonly groups: Groups
  readonly routes: RouteStream
  readonly now: () => number
  readonly askPolicy: AskPolicy
  readonly readiness: () => Promise<Readiness>
  /** What an SDK told of one of its calls, for the log. */
  readonly clientEvent: (event: Readonly<Record<string, unknown>>) => void
  /** One finished request, for the log. */
  readonly finished: (request: { id: string; method: string; path: string; status: number; milliseconds: number; error: string }) => void
}

const openPaths = ['/health', ...docsPaths, routeStreamPath, renewalsPath]
const methods = ['GET', 'POST', 'PUT', 'PATCH', 'DELETE'] as const

export function createServer(deps: ServerDeps): FastifyInstance {
  const { config, now } = deps
  const wrongKeys = new RateLimit(config.server.auth_failures_per_minute, now)
  const creates = new RateLimit(config.server.creates_per_minute, now)
  /** Before routing, so that an unknown path says nothing without the key. @returns whether the answer is given */
  const receive = (request: FastifyRequest, reply: FastifyReply): boolean => {
    reply.header(headerNames.requestId, request.id)
    if (answerCors(request, reply)) return true
    // RFC 9112 3.2
    if (request.headers.host === undefined && request.raw.httpVersion === '1.1') throw new ApiError('BAD_REQUEST', 'The header Host is missing.')
    requireKey(request, config, wrongKeys)
    return false
  }
  const app = Fastify({
    bodyLimit: config.server.max_body_bytes,
    keepAliveTimeout: config.server.timeout_keep_alive * 1000,
    requestTimeout: 60_000,
    // Refused in `receive`: Node's own answer would be empty.
    http: { maxHeaderSize: 32 * 1024, requireHostHeader: false },
    routerOptions: { ignoreTrailingSlash: true, maxParamLength: 256 },
    forceCloseConnections: 'idle',
    logger: false,
    requestIdHeader: headerNames.requestId,
    genReqId: newRequestId,
    // Such a request comes by none of the hooks below.
    frameworkErrors: (error, request, reply) => {
      try {
        if (!receive(request, reply)) throw error
      } catch (fault) {
        answerError(fault as FastifyError, request, reply)
      }
    },
    clientErrorHandler: (error, socket) => refuseUnread(error.code, socket),
  })
  app.server.maxConnections = config.server.limit_concurrency === 0 ? Number.POSITIVE_INFINITY : config.server.limit_concurrency

  acceptEmptyBodies(app)
  app.addHook('onRequest', async (request, reply) => {
    if (receive(request, reply)) return reply
  })
  app.addHook('onResponse', async (request, reply) => {
    deps.finished({ id: request.id, method: request.method, path: request.url.split('?')[0] ?? '', status: reply.statusCode, milliseconds: Math.round(reply.elapsedTime), error: errorCodes.get(request) ?? '' })
  })
  app.setErrorHandler((error, request, reply) => answerError(error as FastifyError, request, reply))
  app.setNotFoundHandler((request, reply) => {
    const allowed = methods.filter((method) => app.findRoute({ method, url: request.url.split('?')[0] ?? '' }) !== null)
    if (allowed.length === 0) throw new ApiError('NOT_FOUND', 'There is no such route.')
    // RFC 9110 15.5.6
    reply.header('allow', allowed.join(', '))
    throw new ApiError('METHOD_NOT_ALLOWED', `This method is not allowed here; allowed: ${allowed.join(', ')}.`)
  })

  addHealthRoutes(app, deps)
  addInternalRoutes(app, deps)
  addDocsRoutes(app)
  for (const prefix of ['', '/v1']) {
    void app.register(async (scope) => {
      addSandboxRoutes(scope, deps, creates)
      addAccessRoutes(scope, deps)
      addEndpointRoutes(scope, deps)
      addNetworkPolicyRoutes(scope, deps)
      addMetricsRoutes(scope, deps)
      addUnbuiltRoutes(scope)
    }, { prefix })
  }
  return app
}

/** Clients send POST and DELETE without a body but with a JSON content type. */
function acceptEmptyBodies(app: FastifyInstance): void {
  app.removeContentTypeParser(['application/json', 'text/plain'])
  app.addContentTypeParser('application/json', { parseAs: 'string' }, (_request, body: string, done) => {
    if (body.trim() === '') return done(null, undefined)
    try {
      done(null, JSON.parse(body))
    } catch {
      done(new ApiError('SANDBOX::INVALID_PARAMETER', 'body: is not JSON'), undefined)
    }
  })
}

/** Any page may call us with the right key, as in the original. Preflights carry no key and are answered at once. */
function answerCors(request: FastifyRequest, reply: FastifyReply): boolean {
  const origin = request.headers.origin
  reply.header('vary', 'Origin')
  if (origin === undefined) return false
  reply.header('access-control-allow-origin', origin).header('access-control-allow-credentials', 'true').header('access-control-expose-headers', headerNames.requestId)
  if (request.method !== 'OPTIONS' || request.headers['access-control-request-method'] === undefined) return false
  reply.header('access-control-allow-methods', 'DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT').header('access-control-max-age', '600')
  const wanted = request.headers['access-control-request-headers']
  if (wanted !== undefined) reply.header('access-control-allow-headers', wanted)
  reply.code(200).type('text/plain').send('OK')
  return true
}

/**
 * What gateways ask is under a token of its own. Who has sent too many wrong keys is not heard with the right one either: that would
 * tell which it was.
 */
function requireKey(request: FastifyRequest, config: Config, wrongKeys: RateLimit): void {
  const path = request.url.split('?')[0] ?? ''
  if (config.apiKey === null || openPaths.some((open) => path === open || path.startsWith(`${open}/`))) return
  const given = request.headers[headerNames.apiKey]
  if (given === undefined || given === '') throw new ApiError('MISSING_API_KEY', 'Authentication credentials are missing. Provide the API key in the OPEN-SANDBOX-API-KEY header.')
  const wait = wrongKeys.wait(request.ip)
  if (wait > 0) throw tooMany('Too many wrong API keys came from this address.', wait)
  if (typeof given === 'string' && equalSecret(given, config.apiKey)) return
  wrongKeys.count(request.ip)
  throw new ApiError('INVALID_API_KEY', 'Authentication credentials are invalid.')
}

const errorCodes = new WeakMap<FastifyRequest, string>()

/** Always `{code, message}` and never empty: some clients take an empty error body for success. */
function answerError(error: FastifyError | ApiError, request: FastifyRequest, reply: FastifyReply): void {
  const fault = error instanceof ApiError ? error : toApiError(error)
  const cause = fault.cause instanceof Error ? `${fault.code}: ${fault.cause.message}` : fault.code
  errorCodes.set(request, cause)
  if (fault.retryAfter > 0) reply.header('retry-after', String(fault.retryAfter))
  void reply.code(fault.status).send({ code: fault.code, message: fault.message })
}

const frameworkErrors: ReadonlyMap<string, readonly [ApiErrorCode, string]> = new Map([
  ['FST_ERR_CTP_BODY_TOO_LARGE', ['BODY_TOO_LARGE', 'body: is too large']],
  ['FST_ERR_CTP_INVALID_MEDIA_TYPE', ['SANDBOX::INVALID_PARAMETER', 'body: must be application/json']],
  ['FST_ERR_CTP_INVALID_CONTENT_LENGTH', ['SANDBOX::INVALID_PARAMETER', 'body: is not as long as content-length says']],
  ['FST_ERR_BAD_URL', ['NOT_FOUND', 'There is no such route.']],
  ['FST_ERR_MAX_PARAM_LENGTH', ['NOT_FOUND', 'There is no such route.']],
])

const unread: ReadonlyMap<string, readonly [ApiErrorCode, string]> = new Map([
  ['HPE_HEADER_OVERFLOW', ['HEADERS_TOO_LARGE', 'The head of the request is too large.']],
  ['ERR_HTTP_REQUEST_TIMEOUT', ['REQUEST_TIMEOUT', 'The request did not arrive in time.']],
])

/** No request has come of it, so there is no reply either: the last word on the connection. */
function refuseUnread(cause: string, socket: Duplex): void {
  if (!socket.writable || cause === 'ECONNRESET') return void socket.destroy()
  const [code, message] = unread.get(cause) ?? ['BAD_REQUEST', 'This is not a request of HTTP/1.1.']
  const body = JSON.stringify({ code, message })
  socket.end(`HTTP/1.1 ${apiErrors[code]} ${STATUS_CODES[apiErrors[code]]}\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: ${Buffer.byteLength(body)}\r\n${headerNames.requestId}: ${newRequestId()}\r\nconnection: close\r\n\r\n${body}`)
}

function newRequestId(): string {
  return randomUUID().replaceAll('-', '')
}

function toApiError(error: FastifyError): ApiError {
  const known = frameworkErrors.get(error.code)
  if (known !== undefined) return new ApiError(known[0], known[1])
  const status = error.statusCode !== undefined && error.statusCode >= 400 && error.statusCode < 500 ? error.statusCode : apiErrors['GENERAL::UNKNOWN_ERROR']
  return new ApiError('GENERAL::UNKNOWN_ERROR', status < 500 ? 'The request could not be read.' : 'An unexpected error occurred.', { cause: error, status })
}
