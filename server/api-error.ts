/** Errors of the lifecycle API, with the codes clients of OpenSandbox know. One table: code to HTTP status. */

export const apiErrors = {
  MISSING_API_KEY: 401,
  INVALID_API_KEY: 401,
  NOT_FOUND: 404,
  METHOD_NOT_ALLOWED: 405,
  BAD_REQUEST: 400,
  REQUEST_TIMEOUT: 408,
  BODY_TOO_LARGE: 413,
  HEADERS_TOO_LARGE: 431,
  TOO_MANY_REQUESTS: 429,
  NOT_IMPLEMENTED: 501,
  INVALID_METADATA_FORMAT: 400,
  INVALID_METADATA_LABEL: 400,
  INVALID_ROUTE_TOKEN: 401,
  DIAGNOSTICS_NOT_IMPLEMENTED: 501,
  'GENERAL::UNKNOWN_ERROR': 500,
  'SANDBOX::INVALID_PARAMETER': 400,
  'SANDBOX::INVALID_METADATA_LABEL': 400,
  'SANDBOX::UNSUPPORTED_POOL_REF': 400,
  'SANDBOX::API_NOT_SUPPORTED': 400,
  'SANDBOX::NO_NETWORK_POLICY': 409,
  'SANDBOX::EGRESS_UNAVAILABLE': 502,
  'SERVER::STORE_FAILED': 500,
  'SERVER::SHUTTING_DOWN': 503,
  'SNAPSHOT::NOT_IMPLEMENTED': 501,
  'KUBERNETES::POOL_NOT_SUPPORTED': 501,
  'DOCKER::SANDBOX_NOT_FOUND': 404,
  'DOCKER::SANDBOX_IMAGE_PULL_FAILED': 500,
  'DOCKER::SANDBOX_START_FAILED': 500,
  'DOCKER::SANDBOX_EXECD_START_FAILED': 503,
  'DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED': 500,
  'DOCKER::SANDBOX_DELETE_FAILED': 500,
  'DOCKER::SANDBOX_NOT_RUNNING': 409,
  'DOCKER::SANDBOX_PAUSE_FAILED': 500,
  'DOCKER::SANDBOX_NOT_PAUSED': 409,
  'DOCKER::SANDBOX_RESUME_FAILED': 500,
  'DOCKER::INVALID_EXPIRATION': 400,
  'DOCKER::INVALID_PORT': 400,
  'DOCKER::NETWORK_MODE_ENDPOINT_UNAVAILABLE': 500,
} as const

export type ApiErrorCode = keyof typeof apiErrors

/** `message` goes to the client: no internal address, no secret, no text of the Docker engine (`engine-words.ts`). */
export class ApiError extends Error {
  readonly code: ApiErrorCode
  readonly status: number
  /** Seconds after which another attempt may succeed; 0: nobody knows. */
  readonly retryAfter: number
  constructor(code: ApiErrorCode, message: string, options?: ErrorOptions & { status?: number; retryAfter?: number }) {
    super(message, options)
    this.name = 'ApiError'
    this.code = code
    this.status = options?.status ?? apiErrors[code]
    this.retryAfter = options?.retryAfter ?? 0
  }
}

export function notFound(id: string): ApiError {
  return new ApiError('DOCKER::SANDBOX_NOT_FOUND', `Sandbox ${id.slice(0, 128)} not found.`)
}

/** @param wait seconds until another attempt may succeed */
export function tooMany(message: string, wait: number): ApiError {
  return new ApiError('TOO_MANY_REQUESTS', message, { retryAfter: wait })
}
