/** The names and documents that our programs send each other, and the names OpenSandbox fixed. */

/** HTTP header names, lower case as node:http hands them out. */
export const headerNames = {
  /** Names the sandbox and port of a request: `<id>-<port>`, or the signed form. */
  ingressTo: 'opensandbox-ingress-to',
  /** The older spelling of the same; accepted, never forwarded. */
  deprecatedIngressTo: 'open-sandbox-ingress',
  secureAccess: 'opensandbox-secure-access',
  egressAuth: 'opensandbox-egress-auth',
  apiKey: 'open-sandbox-api-key',
  /** Carries our own access token. */
  access: 'sallyport-access',
  requestId: 'x-request-id',
} as const

export const wellKnownPorts = {
  execd: 44772,
  egressApi: 18080,
  http: 8080,
  gateway: 28888,
  server: 8080,
} as const

/** Docker labels. The `opensandbox.io/` ones are the original's, so that either server can manage the other's sandboxes. */
export const labels = {
  id: 'opensandbox.io/id',
  expiresAt: 'opensandbox.io/expires-at',
  manualCleanup: 'opensandbox.io/manual-cleanup',
  platformOs: 'opensandbox.io/platform-os',
  platformArch: 'opensandbox.io/platform-arch',
  embeddingProxyPort: 'opensandbox.io/embedding-proxy-port',
  httpPort: 'opensandbox.io/http-port',
  egressAuthToken: 'opensandbox.io/egress-auth-token',
  egressSidecarFor: 'opensandbox.io/egress-sidecar-for',
  accessRenewExtendSeconds: 'opensandbox.io/access-renew-extend-seconds',
  secureAccessToken: 'opensandbox.io/secure-access-token',
  /** Which server owns the object; sweeps, lists and expiry touch only their own. */
  instance: 'sallyport.io/instance',
  /** The group (sandbox) an object belongs to, as a hash: a label is fine for an id, a name is not. */
  group: 'sallyport.io/group',
  /** `main` or `egress`. */
  role: 'sallyport.io/role',
} as const

/** Life of a sandbox, as OpenSandbox names it. */
export const sandboxStates = ['Pending', 'Running', 'Pausing', 'Paused', 'Resuming', 'Stopping', 'Terminated', 'Failed', 'Unknown'] as const
export type SandboxState = (typeof sandboxStates)[number]

/** What a gateway needs to know of one sandbox. */
export type RouteEntry = {
  readonly id: string
  /** Address of the network namespace's owner; empty while unknown. */
  readonly host: string
  readonly state: SandboxState
  /** Differs whenever the id or the address gets a new owner; upstream connections are pooled by it. */
  readonly lifecycle: string
  /** Set: a request needs this token, or a signed route. */
  readonly secureAccessToken?: string
  /** Tokens of ours minted for a lower epoch are revoked. */
  readonly epoch?: number
  /** It asked for a longer life whenever it is used: gateways report uses of it. */
  readonly renewOnAccess?: boolean
}

/**
 * One line of the route stream (NDJSON): `reset`, `put`…, `synced`, then changes as they happen and a `ping` every 10 s.
 * The reader swaps its table at `synced`, so that it never serves a half-read one.
 */
export type RouteEvent =
  | { readonly type: 'reset' }
  | { readonly type: 'put'; readonly sandbox: RouteEntry }
  | { readonly type: 'delete'; readonly id: string }
  | { readonly type: 'synced' }
  | { readonly type: 'ping' }

/** `GET` on the lifecycle server with `authorization: Bearer <route token>`. */
export const routeStreamPath = '/internal/v1/routes'
/** Seconds between two `ping` events. */
export const routeStreamPingSeconds = 10
/** Seconds without a live stream after which a gateway refuses new connections. */
export const routeStreamStaleSeconds = 60

/**
 * `POST` on the lifecycle server with `authorization: Bearer <route token>`: these sandboxes have been used. Answered with 204, also
 * when some are gone meanwhile.
 */
export const renewalsPath = '/internal/v1/renewals'
/** `observedAt`: RFC 3339. Older ones than `renewalStaleSeconds` mean nothing any more. */
export type Renewals = { readonly sandboxes: readonly { readonly id: string; readonly observedAt: string }[] }
export const renewalStaleSeconds = 300
/** Sandboxes in one report. */
export const mostRenewals = 1000
