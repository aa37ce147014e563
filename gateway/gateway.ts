/** Wires the gateway's parts: one listener, one route table, one provider, one clock that looks for silence. */
import { randomBytes } from 'node:crypto'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo, DropArgument, Socket } from 'node:net'
import { performance } from 'node:perf_hooks'
import { setTimeout as pause } from 'node:timers/promises'
import type { AccessKeys } from '#policies/access.ts'
import { NetworkTable, readNetwork } from '#policies/address.ts'
import { normaliseName } from '#policies/host.ts'
import type { Renewals as RenewalReport } from '#policies/wire.ts'
import { breakOff, clientEnded } from './break-off.ts'
import type { GatewayConfig } from './config.ts'
import type { Edge } from './edge.ts'
import { asksForWebSocket, finish, handle, handleUpgrade, refuseConnect } from './handle.ts'
import { InFlight, type Placed } from './in-flight.ts'
import { Locator } from './locate.ts'
import { answerClientError, noteDropped, sentTooFarAhead } from './malformed.ts'
import { Metrics } from './metrics.ts'
import { peerOf } from './peer.ts'
import type { Relay, Tunnels } from './relay.ts'
import { httpRelays } from './relay-http.ts'
import { UpgradeRelay, type UpgradeOptions } from './relay-upgrade.ts'
import { Renewals } from './renewals.ts'
import { refuse } from './respond.ts'
import { RouteTable } from './routes.ts'
import { Standing } from './standing.ts'
import { FailureThrottle } from './throttle.ts'
import { UpstreamGuard } from './upstream-guard.ts'
import { VerifiedMemory } from './verified.ts'

/** Where routes come from. `start` resolves once the table may be served. */
export interface Provider {
  start(): Promise<void>
  close(): Promise<void>
}

export type Deps = {
  /** Makes the provider that fills this table. */
  readonly provider: (table: RouteTable) => Provider
  readonly keys: () => AccessKeys
  /** Where uses of sandboxes are reported to; null: nobody wants to know. */
  readonly renewals: { readonly send: (report: RenewalReport) => Promise<void>; readonly onState: (problem: string) => void } | null
  /** Takes access lines; null: none wanted. */
  readonly access: ((line: string) => void) | null
}

export type Gateway = {
  readonly table: RouteTable
  readonly metrics: Metrics
  /** Why it should get no new requests; '' when it should. */
  unready(): string
  /** Starts the provider, then opens the port. @returns the port */
  listen(): Promise<number>
  /** Stops taking requests, lets the running ones end until the drain deadline, then breaks off the rest. */
  close(): Promise<void>
}

type Connection = Placed & { readonly socket: Socket }

const sweepMs = 1_000
const guardRefreshMs = 10_000
/** ms within which what is broken off has to be over. */
const partingMs = 1_000

export function createGateway(config: GatewayConfig, deps: Deps): Gateway {
  const guard = new UpstreamGuard(config.allowLoopbackUpstreams)
  // Loopback and own addresses may be shared by many sandboxes; any other address belongs to the last one that reported it.
  const table = new RouteTable((host) => config.provider === 'server' && !guard.isOwn(host))
  const relays = new InFlight<Relay>()
  const relayOptions: UpgradeOptions = {
    connectTimeout: config.connectTimeout,
    firstByteTimeout: config.firstByteTimeout,
    idleTimeout: config.idleTimeout,
    bootGrace: config.bootGrace,
    maxRequests: config.maxRequestsPerPort,
    preserveHost: config.preserveHost,
    lookup: guard.lookup,
    // As `descriptors.ts` counts: one for each client, a tunnel or one of these.
    standing: new Standing(() => config.maxConnections - tunnels.size),
    maxPerSandbox: config.maxUpgradesPerSandbox,
    maxPerClient: config.maxUpgradesPerClient,
    maxMessage: config.maxMessageBytes,
  }
  let draining = false
  const connections = new InFlight<Connection>()
  const tunnels: Tunnels = new UpgradeRelay(relayOptions, (visit, fault) => refuse(visit, fault.code, fault.detail, true), (visit) => finish(edge, visit), (sandbox) => table.tiesOf(sandbox))
  const metrics = new Metrics({ routes: () => table.size, tunnels: () => tunnels.size, connections: () => connections.size, active: () => relays.size })
  const edge: Edge = {
    table,
    locator: new Locator({ mode: config.mode, baseDomain: normaliseName(config.baseDomain) ?? config.baseDomain }, table),
    guard,
    throttle: new FailureThrottle(config.authFailuresPerMinute),
    proofs: new FailureThrottle(config.authFailuresPerMinute),
    metrics,
    openRelay: httpRelays(table, relayOptions, (visit, fault) => refuse(visit, fault.code, fault.detail, draining), relays, () => draining),
    relays,
    tunnels,
    renewals: deps.renewals === null || config.renewInterval === 0 ? null : new Renewals({ interval: config.renewInterval, ...deps.renewals }),
    trustedProxies: networks(config.trustedProxies),
    keys: deps.keys,
    verified: new VerifiedMemory(),
    hideMissing: config.hideMissing,
    uriCookies: config.uriCookies,
    draining: () => draining,
    // A request costs a descriptor, too, and a connection may have several of them sent ahead.
    overloaded: () => connections.size > config.maxConnections || relays.size >= config.maxConnections,
    access: deps.access,
    nextRequestId: requestIds(),
  }
  const server = createServer({
    keepAliveTimeout: config.keepAliveTimeout,
    headersTimeout: config.headerTimeout,
    requestTimeout: 0,
    connectionsCheckingInterval: Math.min(config.headerTimeout, 2_000),
    maxHeaderSize: config.maxHeaderBytes,
    noDelay: true,
    // A response of 64 KiB fits without waiting for the client.
    highWaterMark: 128 * 1024,
    keepAlive: true,
    // Ours to refuse: node:http would go on to the requests behind it.
    requireHostHeader: false,
    shouldUpgradeCallback: asksForWebSocket,
  })
  // Counted in readRequestHead: Node's own limit would drop the fields behind it without a word.
  server.maxHeadersCount = 0
  server.on('request', (request: IncomingMessage, response: ServerResponse) => sentTooFarAhead(edge, request) || handle(edge, request, response, false))
  server.on('checkContinue', (request: IncomingMessage, response: ServerResponse) => sentTooFarAhead(edge, request) || handle(edge, request, response, true))
  server.on('checkExpectation', (request: IncomingMessage, response: ServerResponse) => sentTooFarAhead(edge, request) || handle(edge, request, response, true))
  server.on('upgrade', (request: IncomingMessage, socket: Socket, early: Buffer) => handleUpgrade(edge, request, socket, early))
  server.on('connect', (request: IncomingMessage, socket: Socket) => refuseConnect(edge, request, socket))
  server.on('clientError', (error: NodeJS.ErrnoException, socket: Socket) => answerClientError(edge, error, socket))
  server.on('connection', (socket: Socket) => {
    const connection = { place: 0, socket }
    connections.add(connection)
    socket.once('close', () => connections.delete(connection))
    // Before node:http, which would bring whatever it is sending to a clean end.
    socket.prependOnceListener('end', () => clientEnded(socket, peerOf(socket, edge.trustedProxies)))
  })
  // Called by node:http, too, which takes a connection for idle as soon as its answer is written, also while a slow client has not got all of it.
  const closeIdle = server.closeIdleConnections.bind(server)
  server.closeIdleConnections = () => {
    for (const { socket } of connections.all()) if (socket.writableLength > 0 && peerOf(socket, edge.trustedProxies).open.length > 0) return
    closeIdle()
  }
  // Beyond this not even a refusal can be sent: leave descriptors for the sandboxes' side.
  server.maxConnections = config.maxConnections + refusalMargin(config.maxConnections)
  server.on('drop', (dropped?: DropArgument) => noteDropped(edge, dropped?.remoteAddress))

  const provider = deps.provider(table)
  const timers = [setInterval(() => sweep(edge), sweepMs), setInterval(() => guard.refresh(), guardRefreshMs)]
  for (const timer of timers) timer.unref()

  return {
    table,
    metrics,
    unready: () => (draining ? 'draining' : table.stale(performance.now()) ? 'routes are stale' : ''),
    async listen() {
      await provider.start()
      return listenOn(server, config)
    },
    async close() {
      draining = true
      const deadline = performance.now() + config.drainTimeout
      // 1. Nobody new. A connection that never asked is no idle one for node:http.
      server.close()
      tunnels.leave()
      for (const { socket } of connections.all()) if (socket.bytesRead === 0) socket.destroy()
      let reported = edge.renewals === null
      void edge.renewals?.close(performance.now()).finally(() => (reported = true))
      // 2. What runs may end, and what falls idle meanwhile goes. Routes stay true: what ends in the table ends its connections.
      await until(() => {
        server.closeIdleConnections()
        return connections.size === 0 && reported
      }, deadline)
      // 3. The rest is broken off, each exchange in the way that fits it, and leaves its access line.
      for (const relay of relays.all()) relay.leave()
      tunnels.destroy()
      await until(() => relays.size === 0, performance.now() + partingMs)
      for (const { socket } of connections.all()) breakOff(socket, peerOf(socket, edge.trustedProxies))
      await until(() => connections.size === 0, performance.now() + partingMs)
      table.endAll()
      for (const timer of timers) clearInterval(timer)
      await provider.close()
    },
  }
}

/** Ends what fell silent, gives up pools nobody uses, and reports what is in use. */
function sweep(edge: Edge): void {
  const now = performance.now()
  for (const relay of edge.relays.all()) relay.checkTimes(now)
  edge.tunnels.checkTimes(now)
  edge.table.sweep(now)
  if (edge.renewals === null) return
  for (const sandbox of edge.table.inUse()) edge.renewals.used(sandbox.entry)
  edge.renewals.flush(now)
}

function listenOn(server: Server, config: GatewayConfig): Promise<number> {
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    // Workers bind the port each for themselves and the kernel spreads connections (SO_REUSEPORT).
    const shared = config.workers > 1 ? { reusePort: true, exclusive: true } : {}
    server.listen({ port: config.port, ...(config.host === '' ? {} : { host: config.host }), backlog: 4096, ...shared }, () => {
      server.off('error', reject)
      resolve((server.address() as AddressInfo).port)
    })
  })
}

/** Looks every few milliseconds. @returns when `over` says so, at the latest at the deadline */
async function until(over: () => boolean, deadline: number): Promise<void> {
  while (!over() && performance.now() < deadline) await pause(10)
}

/** Connections beyond the limit that still get their 503. */
function refusalMargin(maxConnections: number): number {
  return Math.max(16, Math.floor(maxConnections / 10))
}

function networks(list: readonly string[]): NetworkTable {
  const table = new NetworkTable()
  for (const text of list) {
    const network = readNetwork(text)
    if (network !== null) table.add(network, 0)
  }
  return table
}

/** `<random>-<counter>`: unique across workers and restarts, and cheap. */
function requestIds(): () => string {
  const prefix = randomBytes(6).toString('hex')
  let counter = 0
  return () => `${prefix}-${(counter++).toString(36)}`
}
