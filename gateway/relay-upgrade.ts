/**
 * WebSocket upgrades: http-proxy-3 dials and pipes, behind cleaned headers and a stream of ours instead of the client's socket.
 * The only importer of http-proxy-3. What it would do to the heads of both sides is done here, because it merges repeated fields.
 */
import { Agent, ServerResponse, STATUS_CODES, type ClientRequest, type IncomingMessage } from 'node:http'
import { performance } from 'node:perf_hooks'
import type { Socket } from 'node:net'
import httpProxy from 'http-proxy-3'
import { Fault, toFault } from '#policies/fault.ts'
import { reset } from './break-off.ts'
import { ClientStream } from './client-stream.ts'
import type { Refusal, Tunnels } from './relay.ts'
import { checkTransferCoding, headText, mostInformed } from './response-headers.ts'
import type { Belonging, Sandbox, Ties } from './routes.ts'
import { networkOf } from './throttle.ts'
import { answerFields, upgradeFields } from './upgrade-heads.ts'
import type { RelayOptions } from './upstream.ts'
import type { Visit } from './visit.ts'

export type UpgradeOptions = RelayOptions & {
  readonly maxPerSandbox: number
  readonly maxPerClient: number
  /** Bytes of the largest message a client may send, all its frames together; 0: no limit. */
  readonly maxMessage: number
}

/** All tunnels of one gateway. Refusals of a sandbox are relayed as they are. */
export class UpgradeRelay implements Tunnels {
  readonly #options: UpgradeOptions
  readonly #refuse: Refusal
  readonly #done: (visit: Visit) => void
  readonly #tiesOf: (sandbox: Sandbox) => Ties
  readonly #proxy = httpProxy.createProxyServer({})
  readonly #agents = new WeakMap<Sandbox, AgentOfSandbox>()
  /** By network: an IPv6 client counts with all its addresses. */
  readonly #perClient = new Map<string, number>()
  readonly #tunnels = new Set<Tunnel>()
  /** The tunnel whose request http-proxy-3 is building: `ws()` emits `proxyReqWs` before it returns. */
  #building: Tunnel | null = null

  /** @param done called once per upgrade at its end, for the access line */
  constructor(options: UpgradeOptions, refuse: Refusal, done: (visit: Visit) => void, tiesOf: (sandbox: Sandbox) => Ties) {
    this.#options = options
    this.#refuse = refuse
    this.#done = done
    this.#tiesOf = tiesOf
    this.#proxy.on('proxyReqWs', (request: ClientRequest) => this.#building?.attach(request))
    this.#proxy.on('error', () => undefined)
  }

  get size(): number {
    return this.#tunnels.size
  }

  relay(visit: Visit, sandbox: Sandbox, socket: Socket, early: Buffer): void {
    const client = networkOf(visit.client)
    const open = this.#perClient.get(client) ?? 0
    const { tunnels } = this.#tiesOf(sandbox)
    if (tunnels.size >= this.#options.maxPerSandbox || open >= this.#options.maxPerClient) {
      this.#refuse(visit, new Fault('EDGE_OVERLOADED', 'too many upgraded connections'))
      return this.#done(visit)
    }
    this.#perClient.set(client, open + 1)
    const tunnel = new Tunnel(visit, sandbox, tunnels, socket, this.#options, this.#refuse, () => this.#ended(tunnel, visit, client))
    this.#tunnels.add(tunnel)
    this.#options.standing.makeRoom()
    const { host } = sandbox.entry
    this.#building = tunnel
    this.#proxy.ws(
      tunnel.request as IncomingMessage,
      tunnel.client as unknown as Socket,
      noBytes,
      { target: { protocol: 'http:', host, port: visit.port }, agent: this.#agentOf(sandbox), toProxy: true, connectTimeout: this.#options.connectTimeout },
      (error) => tunnel.fail(error),
    )
    this.#building = null
    tunnel.takeResponses()
    tunnel.client.takeEarly(early)
  }

  leave(): void {
    for (const tunnel of this.#tunnels) tunnel.leave()
  }

  destroy(): void {
    for (const tunnel of this.#tunnels) tunnel.destroy(new Error('shut down'))
  }

  checkTimes(now: number): void {
    for (const tunnel of this.#tunnels) tunnel.checkTimes(now)
  }

  #agentOf(sandbox: Sandbox): Agent {
    let kept = this.#agents.get(sandbox)
    if (kept === undefined) {
      kept = new AgentOfSandbox(this.#options)
      this.#agents.set(sandbox, kept)
      this.#tiesOf(sandbox).others.add(kept)
    }
    return kept.agent
  }

  #ended(tunnel: Tunnel, visit: Visit, client: string): void {
    this.#tunnels.delete(tunnel)
    const open = (this.#perClient.get(client) ?? 1) - 1
    if (open === 0) this.#perClient.delete(client)
    else this.#perClient.set(client, open)
    this.#done(visit)
  }
}

/** The connections of upgrades, for this life of this sandbox only. */
class AgentOfSandbox implements Belonging {
  readonly agent: Agent
  constructor(options: RelayOptions) {
    // allowHalfOpen is an option of net.connect, which the agent hands on.
    this.agent = new Agent({ keepAlive: true, timeout: 0, noDelay: true, lookup: options.lookup, allowHalfOpen: true } as ConstructorParameters<typeof Agent>[0])
    // One that was not upgraded goes at once: the sandbox could hold it for good, and a handshake that finds it stale has no second try.
    this.agent.keepSocketAlive = () => false
  }
  destroy(): void {
    this.agent.destroy()
  }
}

/** What http-proxy-3 reads of a request. */
type ProxiedRequest = Pick<IncomingMessage, 'method' | 'url' | 'headers' | 'httpVersion' | 'httpVersionMajor'>

/** ms of silence after which a tunnel that one side has ended is given up. */
const lingerMs = 60_000
/** ms within which a client has to read that its message was too large. */
const refusalMs = 2_000
/** http-proxy-3 would put early bytes into the stream past whoever counts them. */
const noBytes = Buffer.alloc(0)

class Tunnel implements Belonging {
  readonly client: ClientStream
  readonly request: ProxiedRequest
  readonly #visit: Visit
  readonly #tunnels: Set<Belonging>
  readonly #socket: Socket
  readonly #options: UpgradeOptions
  readonly #refuse: Refusal
  readonly #onEnd: () => void
  readonly #authority: string
  #outgoing: ClientRequest | null = null
  #upstream: Socket | null = null
  #answered = false
  #ended = false

  constructor(visit: Visit, sandbox: Sandbox, tunnels: Set<Belonging>, socket: Socket, options: UpgradeOptions, refuse: Refusal, onEnd: () => void) {
    this.#visit = visit
    this.#tunnels = tunnels
    this.#socket = socket
    this.#options = options
    this.#refuse = refuse
    this.#onEnd = onEnd
    this.client = new ClientStream(socket, options.maxMessage, () => this.#refuseMessage())
    this.client.on('error', () => undefined)
    this.#authority = authorityOf(sandbox, visit.port)
    this.request = { method: 'GET', url: '/', headers: upgradeFields(visit, this.#authority, options.preserveHost), httpVersion: '1.1', httpVersionMajor: 1 }
    tunnels.add(this)
    socket.setTimeout(0)
    socket.on('close', (hadError) => this.#end(hadError))
  }

  /** First with the request, before http-proxy-3 listens to it. */
  attach(outgoing: ClientRequest): void {
    this.#outgoing = outgoing
    // Set here and not as the URL: http-proxy-3 drops a bare `?`.
    outgoing.path = this.#visit.target
    outgoing.once('socket', (socket: Socket) => {
      const connected = (): void => void (this.#visit.dialledAt = performance.now())
      if (socket.connecting) socket.once('connect', connected)
      else connected()
    })
    let informed = 0
    outgoing.on('information', (info) => {
      if (++informed > mostInformed) return void outgoing.destroy(new Fault('EDGE_UPSTREAM_BROKEN'))
      if (info.statusCode > 101) this.#socket.write(headText(`HTTP/1.1 ${info.statusCode} ${STATUS_CODES[info.statusCode] ?? ''}`, answerFields(info.rawHeaders, this.#visit, this.#authority)) + '\r\n', 'latin1')
    })
    outgoing.once('upgrade', (response: IncomingMessage, upstream: Socket) => this.#open(response, upstream))
  }

  /** A response that is no upgrade is relayed by us: http-proxy-3 would not notice when it breaks off. */
  takeResponses(): void {
    this.#outgoing?.removeAllListeners('response')
    this.#outgoing?.once('response', (response: IncomingMessage) => this.#refused(response))
  }

  #open(response: IncomingMessage, upstream: Socket): void {
    const visit = this.#visit
    this.#answered = true
    this.#upstream = upstream
    visit.status = 101
    visit.upgraded = true
    visit.firstByteAt = performance.now()
    upstream.on('error', () => this.#socket.destroy())
    // Gone without an end of its own: the other side must not take that for one.
    upstream.once('close', (hadError) => {
      if (this.client.refusedAt === 0 && (hadError || !upstream.readableEnded)) this.#socket.destroy()
    })
    const upgrade = response.headers.upgrade ?? 'websocket'
    this.#socket.write(headText('HTTP/1.1 101 Switching Protocols', answerFields(response.rawHeaders, visit, this.#authority)) + `connection: Upgrade\r\nupgrade: ${upgrade}\r\n\r\n`, 'latin1')
    this.client.open()
  }

  /** The sandbox answered with an ordinary response: it goes to the client as it is, and the connection ends with it. */
  #refused(incoming: IncomingMessage): void {
    const visit = this.#visit
    const outgoing = new ServerResponse(visit.request)
    const fields = answerFields(incoming.rawHeaders, visit, this.#authority)
    fields.push('connection', 'close')
    try {
      if (incoming.statusCode === 101) throw new Error('a 101 without Upgrade')
      checkTransferCoding(incoming.headers)
      outgoing.writeHead(incoming.statusCode as number, incoming.statusMessage, fields)
    } catch {
      // A status or a reason phrase that node:http reads and does not write.
      incoming.destroy()
      return this.fail(new Fault('EDGE_UPSTREAM_BROKEN'))
    }
    this.#answered = true
    visit.status = incoming.statusCode as number
    visit.firstByteAt = this.client.lastByteAt = performance.now()
    outgoing.assignSocket(this.#socket)
    incoming.on('data', (chunk: Buffer) => {
      visit.bytesOut += chunk.length
      this.client.lastByteAt = performance.now()
      if (outgoing.write(chunk)) return
      incoming.pause()
      // Not the response's own: node:http hears of the sockets of its server only, and this one was handed over.
      this.#socket.once('drain', () => {
        this.client.lastByteAt = performance.now()
        incoming.resume()
      })
    })
    incoming.once('end', () => outgoing.end(() => this.#socket.destroySoon()))
    incoming.once('error', () => reset(this.#socket))
  }

  /** The dial failed, or the connection broke before an answer. */
  fail(error: Error): void {
    if (this.#answered) {
      this.#socket.destroy()
      return
    }
    this.#answered = true
    if (this.#socket.destroyed) return
    const fault = error instanceof Fault ? error : toFault((error as { code?: string }).code === 'ECONNECT_TIMEOUT' ? new Fault('EDGE_UPSTREAM_TIMEOUT') : error)
    // The original answers a failed WebSocket dial with a plain 503.
    const code = fault.code === 'EDGE_UPSTREAM_REFUSED' || fault.code === 'EDGE_UPSTREAM_BROKEN' || fault.code === 'EDGE_UPSTREAM_TIMEOUT' ? 'EDGE_NOT_READY' : fault.code
    this.#refuse(this.#visit, new Fault(code))
  }

  leave(): void {
    this.client.leave()
  }

  /** The client has been told 1009. The sandbox gets no more of it, and the client has a moment to read why. */
  #refuseMessage(): void {
    this.#upstream?.destroy()
    this.#socket.end()
  }

  checkTimes(now: number): void {
    const { firstByteTimeout, idleTimeout } = this.#options
    if (this.client.refusedAt !== 0 && now - this.client.refusedAt > refusalMs) this.#socket.destroy()
    if (this.client.halfClosed && now - this.client.lastByteAt > lingerMs) this.#socket.destroy()
    // A connection that is not read from does not show that its other end is gone: what nobody takes for that long is given up.
    if (this.#answered && idleTimeout > 0 && (this.client.stalled || !this.#visit.upgraded) && now - this.client.lastByteAt > idleTimeout) reset(this.#socket)
    if (this.#answered || firstByteTimeout === 0 || now - this.#visit.locatedAt < firstByteTimeout) return
    this.fail(new Fault('EDGE_UPSTREAM_TIMEOUT'))
    this.#outgoing?.destroy()
  }

  destroy(_reason: Error): void {
    this.fail(new Fault('EDGE_UPSTREAM_BROKEN'))
    this.#outgoing?.destroy()
    this.#upstream?.destroy()
  }

  /** @param vanished the client's connection broke: the sandbox must not take that for an end */
  #end(vanished: boolean): void {
    if (this.#ended) return
    this.#ended = true
    this.#tunnels.delete(this)
    this.#visit.bytesIn = this.client.bytesIn
    this.#visit.bytesOut += this.client.bytesOut
    this.client.destroy()
    this.#outgoing?.destroy()
    if (this.#upstream !== null && vanished) reset(this.#upstream)
    else this.#upstream?.destroy()
    this.#onEnd()
  }
}

function authorityOf(sandbox: Sandbox, port: number): string {
  const { host } = sandbox.entry
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`
}
