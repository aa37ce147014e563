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
/** Connections, the oldest first, each with the last request on it that may be served. */
type Places = Map<Socket, IncomingMessage | null>
type Seats = { readonly places: Places; readonly insiders: WeakSet<Socket> }
type Route = { readonly auth: boolean; readonly methods: Readonly<Record<string, (request: IncomingMessage) => Response | Promise<Response>>> }

const maxBodyBytes = 1 << 20
/** Times in ms. Node looks for what is late only now and then, every half minute unless told. */
export const adminLimits = { requestTimeout: 10_000, headersTimeout: 5000, keepAliveTimeout: 5000, connectionsCheckingInterval: 1000, connections: 128, fromInside: 64 }
const dnsOnlyWarning = 'mode dns filters names only: connections to addresses are not restricted'

/** @throws when the address is taken */
export async function listenAdmin({ host, port }: { host: string; port: number }, deps: AdminDeps, limits = adminLimits): Promise<Admin> {
  const routes = routeTable(deps)
  const { connections, fromInside, ...times } = limits
  const seats: Seats = { places: new Map(), insiders: new WeakSet() }
  const served = new WeakSet<Socket>()
  const server: Server = createServer({ ...times, maxHeaderSize: 16_384 }, (request, response) => {
    const { socket } = request
    if (seats.insiders.has(socket)) {
      // One request a connection: 2,600 fit into what is read at once, and each takes kilobytes until all before it are answered.
      if (served.has(socket)) return void socket.destroy()
      served.add(socket)
      response.setHeader('connection', 'close')
    }
    void respond(request, routes, deps, seats).then(({ status, body, headers = {} }) => {
      if (response.destroyed) return
      response.writeHead(status, { 'content-length': Buffer.byteLength(body), ...headers })
      response.end(request.method === 'HEAD' ? '' : body)
    })
  })
  // Without a token everybody may do everything: then whoever has said all of it stands before those who say half.
  giveSeats(server, { connections, fromInside }, seats, (request) => request !== null && (deps.token !== '' || request.complete))
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

/**
 * The sandbox may not take all the places: whoever tightens its policy comes from outside of its namespace. And no stranger keeps one for long: when all
 * are taken, the oldest connection goes that has shown no right to its place. A turn of the event loop takes one new connection, and the owner's token is
 * read a turn or two after his: long before all the others are newer. By address it would not do: behind a published port everybody may have the bridge's.
 */
function giveSeats(server: Server, limits: { connections: number; fromInside: number }, { places, insiders }: Seats, entitled: (request: IncomingMessage | null) => boolean): void {
  let inside = 0
  const makeRoom = (): boolean => {
    for (const [socket, request] of places) {
      if (entitled(request)) continue
      places.delete(socket)
      socket.destroy()
      return true
    }
    return false
  }
  server.on('connection', (socket: Socket) => {
    const isInsider = isFromInside(socket.remoteAddress)
    if ((isInsider && inside >= limits.fromInside) || (places.size >= limits.connections && !makeRoom())) return void socket.destroy()
    places.set(socket, null)
    socket.on('close', () => places.delete(socket))
    if (!isInsider) return
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

async function respond(request: IncomingMessage, routes: ReadonlyMap<string, Route>, deps: AdminDeps, { places, insiders }: Seats): Promise<Response> {
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
    places.set(request.socket, request)
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
