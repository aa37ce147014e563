/** The policy API: a few routes on node:http behind one table (a framework would cost every sandbox 6 to 11 MB). */
import { createServer, type IncomingMessage, type Server } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo, Socket } from 'node:net'
import { networkInterfaces } from 'node:os'
import { equalSecret } from '#policies/access.ts'
import { headerNames } from '#policies/wire.ts'
import { PolicyRefusal, reasons, type Change, type PolicyKeeper } from './policy-keeper.ts'

export type AdminDeps = {
  readonly keeper: () => PolicyKeeper | null
  /** Empty: no check. */
  readonly token: string
  readonly enforcementMode: 'dns' | 'dns+nft'
  /** Why the sidecar is not ready; empty when it enforces. */
  readonly unready: () => string
  readonly changed: (change: Change, how: 'put' | 'patch' | 'delete') => void
  /** Addresses that no rule opens. */
  readonly floor: readonly string[]
  readonly refused: (refusal: PolicyRefusal) => void
  /** Looks into the kernel: why the sidecar does not enforce right now; empty when it does. */
  readonly inspect: () => Promise<string>
  readonly metrics: () => Promise<string>
  /** Somebody without the token. */
  readonly unauthorized: (from: 'inside' | 'outside') => void
}

export type Admin = { readonly port: number; close(): Promise<void> }

type Response = { readonly status: number; readonly body: string; readonly headers?: Readonly<Record<string, string>> }
type Route = { readonly auth: boolean; readonly methods: Readonly<Record<string, (request: IncomingMessage) => Response | Promise<Response>>> }

const maxBodyBytes = 1 << 20
/** Times in ms. Node looks for what is late only now and then, every half minute unless told. */
export const adminLimits = { requestTimeout: 10_000, headersTimeout: 5000, keepAliveTimeout: 5000, connectionsCheckingInterval: 1000, connections: 128, fromInside: 64 }
const dnsOnlyWarning = 'mode dns filters names only: connections to addresses are not restricted'

/** @throws when the address is taken */
export async function listenAdmin({ host, port }: { host: string; port: number }, deps: AdminDeps, limits = adminLimits): Promise<Admin> {
  const routes = routeTable(deps)
  const { connections, fromInside, ...times } = limits
  const insiders = new WeakSet<Socket>()
  const served = new WeakSet<Socket>()
  const server: Server = createServer({ ...times, maxHeaderSize: 16_384 }, (request, response) => {
    const { socket } = request
    if (insiders.has(socket)) {
      // One request a connection: 2,600 fit into what is read at once, and each takes kilobytes until all before it are answered.
      if (served.has(socket)) return void socket.destroy()
      served.add(socket)
      response.setHeader('connection', 'close')
    }
    void respond(request, routes, deps, insiders).then(({ status, body, headers = {} }) => {
      if (response.destroyed) return
      response.writeHead(status, { 'content-length': Buffer.byteLength(body), ...headers })
      response.end(request.method === 'HEAD' ? '' : body)
    })
  })
  server.maxConnections = connections
  keepSeats(server, fromInside, insiders)
  server.listen(host === '' ? { port } : { port, host })
  await once(server, 'listening')
  return {
    port: (server.address() as AddressInfo).port,
    async close() {
      server.closeAllConnections()
      server.close()
    },
  }
}

/** The sandbox may not take all the places: whoever tightens its policy comes from outside of its namespace. */
function keepSeats(server: Server, fromInside: number, insiders: WeakSet<Socket>): void {
  let inside = 0
  server.on('connection', (socket: Socket) => {
    if (!isFromInside(socket.remoteAddress)) return
    if (inside >= fromInside) return void socket.destroy()
    inside++
    insiders.add(socket)
    socket.on('close', () => inside--)
  })
}

/** Whether the other side of a connection is in this network namespace; one that is gone already counts as such. */
export function isFromInside(address = '', interfaces = networkInterfaces()): boolean {
  // A link-local one comes with its zone (RFC 4007 11.2).
  const plain = address.replace(/^::ffff:/, '').replace(/%.*$/, '')
  return plain === '' || plain === '::1' || plain.startsWith('127.') || Object.values(interfaces).some((list) => list?.some((own) => own.address === plain))
}

function routeTable(deps: AdminDeps): ReadonlyMap<string, Route> {
  const change = (method: 'put' | 'patch' | 'remove') => async (request: IncomingMessage): Promise<Response> => {
    try {
      const body = await readBody(request)
      const keeper = deps.keeper()
      if (keeper === null) return fail(503, 'not ready')
      const done = await keeper[method](body)
      if (done.reason !== reasons.nothingRemoved) deps.changed(done, method === 'remove' ? 'delete' : method)
      return policyAnswer(done, done.reason === reasons.reset ? {} : { enforcementMode: deps.enforcementMode }, deps)
    } catch (error) {
      const refusal = error instanceof PolicyRefusal ? error : new PolicyRefusal(500, 'internal error', { cause: error })
      deps.refused(refusal)
      return fail(refusal.status, refusal.message)
    }
  }
  const get = (): Response => {
    const keeper = deps.keeper()
    if (keeper === null) return fail(503, 'not ready')
    const { egress, defaultAction } = keeper.policy
    return policyAnswer({ policy: keeper.policy, rules: [] }, { enforcementMode: deps.enforcementMode }, deps, { policy: { egress, defaultAction } })
  }
  const effective = (): Response => {
    const keeper = deps.keeper()
    if (keeper === null) return fail(503, 'not ready')
    const { policy, always } = keeper
    return json({ enforcementMode: deps.enforcementMode, defaultAction: policy.defaultAction, egress: [...always.deny, ...always.allow, ...policy.egress], operatorRules: always.deny.length + always.allow.length, floor: deps.floor, ...warningOf(deps) })
  }
  const ready = async (): Promise<Response> => {
    const problem = deps.unready() || (await deps.inspect())
    return problem === '' ? { status: 200, body: 'ready', headers: plain } : fail(503, problem)
  }
  const health = (): Response => (deps.unready() === '' ? { status: 200, body: 'ok', headers: plain } : fail(503, deps.unready()))
  return new Map<string, Route>([
    ['/policy', { auth: true, methods: { GET: get, POST: change('put'), PUT: change('put'), PATCH: change('patch'), DELETE: change('remove') } }],
    ['/policy/effective', { auth: true, methods: { GET: effective } }],
    ['/metrics', { auth: true, methods: { GET: async () => ({ status: 200, body: await deps.metrics(), headers: { 'content-type': 'text/plain; version=0.0.4; charset=utf-8' } }) } }],
    ['/readyz', { auth: true, methods: { GET: ready } }],
    ['/healthz', { auth: false, methods: { '*': health } }],
  ])
}

async function respond(request: IncomingMessage, routes: ReadonlyMap<string, Route>, deps: AdminDeps, insiders: WeakSet<Socket>): Promise<Response> {
  const path = (request.url ?? '').split('?', 1)[0] as string
  const route = routes.get(path)
  if (route === undefined) return fail(404, '404 page not found')
  if (route.auth) {
    // No page that a browser shows has business here, whatever tokens the browser keeps.
    if (request.headers.origin !== undefined || !['none', 'same-origin', undefined].includes(request.headers['sec-fetch-site'] as string | undefined)) return fail(403, 'forbidden')
    const given = request.headers[headerNames.egressAuth]
    if (deps.token !== '' && !(typeof given === 'string' && equalSecret(given, deps.token))) {
      deps.unauthorized(insiders.has(request.socket) ? 'inside' : 'outside')
      return fail(401, 'unauthorized')
    }
  }
  const work = route.methods[request.method ?? ''] ?? route.methods['*']
  if (work === undefined) return fail(405, 'method not allowed', { allow: Object.keys(route.methods).join(', ') })
  try {
    return await work(request)
  } catch (error) {
    return error instanceof PolicyRefusal ? fail(error.status, error.message, { connection: 'close' }) : fail(400, 'request body could not be read')
  }
}

/** The whole body as text. @throws PolicyRefusal 413 when it is too long */
async function readBody(request: IncomingMessage): Promise<string> {
  const parts: Buffer[] = []
  let length = 0
  for await (const part of request as AsyncIterable<Buffer>) {
    length += part.length
    if (length > maxBodyBytes) throw new PolicyRefusal(413, `request body exceeds ${maxBodyBytes} bytes`)
    parts.push(part)
  }
  return Buffer.concat(parts).toString('utf8')
}

/** Key order is the original's: status, mode, enforcementMode, reason, policy. */
function policyAnswer({ policy, reason }: Change, mode: { enforcementMode?: string }, deps: AdminDeps, more: object = {}): Response {
  const described = policy.egress.length > 0 ? 'enforcing' : policy.defaultAction === 'allow' ? 'allow_all' : 'deny_all'
  return json({ status: 'ok', mode: described, ...mode, ...(reason === undefined ? {} : { reason }), ...more, ...warningOf(deps) })
}

function warningOf({ enforcementMode }: AdminDeps): { warning?: string } {
  return enforcementMode === 'dns' ? { warning: dnsOnlyWarning } : {}
}

function json(value: unknown): Response {
  return { status: 200, body: `${JSON.stringify(value)}\n`, headers: { 'content-type': 'application/json' } }
}

const plain = { 'content-type': 'text/plain; charset=utf-8', 'x-content-type-options': 'nosniff' } as const

function fail(status: number, text: string, headers: Readonly<Record<string, string>> = {}): Response {
  return { status, body: `${text}\n`, headers: { ...plain, ...headers } }
}
