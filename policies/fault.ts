/**
 * Everything that can go wrong with a request at the edge: one table, code to status, text and what to do next.
 */
type FaultRow = { readonly status: number; readonly text: string; readonly next: string }

export const faults = {
  EDGE_BAD_ROUTE: { status: 400, text: 'the request does not name a sandbox and port', next: 'use <id>-<port>.<domain>, /<id>/<port>/… or the header OpenSandbox-Ingress-To: <id>-<port>' },
  EDGE_BAD_REQUEST: { status: 400, text: 'the request is malformed', next: 'send one well-formed HTTP/1.1 request' },
  EDGE_UNAUTHORIZED: { status: 401, text: 'access to this sandbox is refused', next: 'ask the lifecycle server for an endpoint and send the headers it names' },
  EDGE_NO_ROUTE: { status: 404, text: 'sandbox not found', next: 'check the id; the sandbox may have expired' },
  EDGE_METHOD_NOT_ALLOWED: { status: 405, text: 'the method is not supported', next: 'send the request itself; the gateway is not a proxy to other places' },
  EDGE_HEADERS_TOO_LARGE: { status: 431, text: 'the header section is too large', next: 'send less, for example fewer cookies' },
  EDGE_TOO_MANY_ATTEMPTS: { status: 429, text: 'too many refused attempts', next: 'wait, then try again with a valid token' },
  EDGE_NOT_READY: { status: 503, text: 'sandbox not ready', next: 'try again shortly' },
  EDGE_ROUTES_STALE: { status: 503, text: 'the gateway has lost its routes', next: 'try again shortly' },
  EDGE_DRAINING: { status: 503, text: 'the gateway is shutting down', next: 'try again; another gateway will answer' },
  EDGE_OVERLOADED: { status: 503, text: 'too many connections', next: 'try again shortly' },
  EDGE_VERIFIER_MISSING: { status: 503, text: 'the gateway has no keys to check signed routes', next: 'tell the operator to configure secure access keys' },
  EDGE_UPSTREAM_REFUSED: { status: 502, text: 'nothing answers on that port of the sandbox', next: 'check that your program listens on 0.0.0.0 and on this port' },
  EDGE_UPSTREAM_BROKEN: { status: 502, text: 'the sandbox broke off the answer', next: 'look at the logs of your program' },
  EDGE_UPSTREAM_FORBIDDEN: { status: 502, text: 'the sandbox has an address the gateway does not dial', next: 'tell the operator' },
  EDGE_UPSTREAM_TIMEOUT: { status: 504, text: 'the sandbox did not answer in time', next: 'look at the logs of your program' },
  EDGE_BUG: { status: 500, text: 'internal error', next: 'report it with the request id' },
} as const satisfies Record<`EDGE_${string}`, FaultRow>

export type FaultCode = keyof typeof faults

/** A fault on its way to the client. `detail` is shown to the client: never put an internal address or a secret into it. */
export class Fault extends Error {
  readonly code: FaultCode
  readonly status: number
  readonly detail: string
  constructor(code: FaultCode, detail = '', options?: ErrorOptions) {
    super(detail === '' ? faults[code].text : detail, options)
    this.name = 'Fault'
    this.code = code
    this.status = faults[code].status
    this.detail = detail
  }
}

// A Map, not an object: the key is a foreign string.
const byForeignCode = new Map<unknown, FaultCode>([
  ['ECONNREFUSED', 'EDGE_UPSTREAM_REFUSED'],
  ['EHOSTUNREACH', 'EDGE_UPSTREAM_REFUSED'],
  ['ENETUNREACH', 'EDGE_UPSTREAM_REFUSED'],
  ['EADDRNOTAVAIL', 'EDGE_OVERLOADED'],
  ['EMFILE', 'EDGE_OVERLOADED'],
  ['ENFILE', 'EDGE_OVERLOADED'],
  ['ECONNRESET', 'EDGE_UPSTREAM_BROKEN'],
  ['EPIPE', 'EDGE_UPSTREAM_BROKEN'],
  ['UND_ERR_SOCKET', 'EDGE_UPSTREAM_BROKEN'],
  ['UND_ERR_RES_CONTENT_LENGTH_MISMATCH', 'EDGE_UPSTREAM_BROKEN'],
  ['UND_ERR_HEADERS_OVERFLOW', 'EDGE_UPSTREAM_BROKEN'],
  ['ETIMEDOUT', 'EDGE_UPSTREAM_TIMEOUT'],
  ['UND_ERR_CONNECT_TIMEOUT', 'EDGE_UPSTREAM_TIMEOUT'],
  ['UND_ERR_HEADERS_TIMEOUT', 'EDGE_UPSTREAM_TIMEOUT'],
  ['UND_ERR_BODY_TIMEOUT', 'EDGE_UPSTREAM_TIMEOUT'],
])

/** The only place where a foreign error becomes one of ours. Unknown means a bug, and says so. */
export function toFault(thrown: unknown): Fault {
  if (thrown instanceof Fault) return thrown
  const code = (thrown as { code?: unknown } | null | undefined)?.code
  // The parser of undici names its errors HPE_…: the sandbox sent something that is not HTTP.
  if (typeof code === 'string' && code.startsWith('HPE_')) return new Fault('EDGE_UPSTREAM_BROKEN', '', { cause: thrown })
  return new Fault(byForeignCode.get(code) ?? 'EDGE_BUG', '', { cause: thrown })
}
