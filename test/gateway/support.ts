/** Gateways, upstream servers and raw clients for tests; everything on loopback, port 0, and closed by its owner. */
import { createServer as createHttpServer, type RequestListener, type Server as HttpServer } from 'node:http'
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import { parseAccessKeys } from '#policies/access.ts'
import { checkConfig } from '#policies/config.ts'
import type { Renewals, RouteEntry } from '#policies/wire.ts'
import { GatewayConfigSchema, type GatewayConfig } from '../../gateway/config.ts'
import { createGateway, type Gateway } from '../../gateway/gateway.ts'

export const keysText = 'a=c2VjcmV0LWE=,b=c2VjcmV0LWI='

export type TestGateway = AsyncDisposable & { readonly gateway: Gateway; readonly port: number; readonly lines: string[]; close(): Promise<void> }

/** A gateway on a free port whose table the test fills itself. */
export async function startGateway(routes: readonly (Partial<RouteEntry> & { id: string })[], options: Partial<GatewayConfig> = {}, renewals?: (report: Renewals) => Promise<void>): Promise<TestGateway> {
  const config = checkConfig(GatewayConfigSchema, { provider: 'static', port: 0, host: '127.0.0.1', mode: 'auto', allowLoopbackUpstreams: true, drainTimeout: 2_000, bootGrace: 0, ...options })
  const keys = parseAccessKeys(config.secureAccessKeys)
  if (!keys.ok) throw new Error('bad test keys')
  const lines: string[] = []
  const gateway = createGateway(config, {
    keys: () => keys.keys,
    renewals: renewals === undefined ? null : { send: renewals, onState: () => undefined },
    access: (line) => void lines.push(line),
    provider: (table) => ({
      async start() {
        for (const route of routes) table.put(entry(route))
        table.alive(Infinity)
      },
      async close() {},
    }),
  })
  const port = await gateway.listen()
  let closing: Promise<void> | null = null
  const close = (): Promise<void> => (closing ??= gateway.close())
  return { gateway, port, lines, close, [Symbol.asyncDispose]: close }
}

export function entry(route: Partial<RouteEntry> & { id: string }): RouteEntry {
  const host = route.host ?? '127.0.0.1'
  return { state: 'Running', lifecycle: `life-of-${route.id}-${host}`, ...route, host }
}

export type TestServer = AsyncDisposable & { readonly port: number; readonly sockets: Set<Socket> }

/** A real HTTP server. */
export async function startHttp(listener: RequestListener, prepare: (server: HttpServer) => void = () => undefined, host = '127.0.0.1'): Promise<TestServer & { readonly server: HttpServer }> {
  const server = createHttpServer(listener)
  prepare(server)
  return { ...(await listenOn(server, host)), server }
}

/** A server that sees bytes and nothing else. */
export async function startRaw(onSocket: (socket: Socket) => void, host = '127.0.0.1'): Promise<TestServer> {
  return listenOn(createServer({ allowHalfOpen: true }, onSocket), host)
}

async function listenOn(server: Server, host: string): Promise<TestServer> {
  const sockets = new Set<Socket>()
  server.on('connection', (socket: Socket) => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    socket.on('close', () => sockets.delete(socket))
  })
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(0, host, resolve))
  return {
    port: (server.address() as AddressInfo).port,
    sockets,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** A client that sends bytes as they are and keeps what comes back (latin1). */
export class RawClient {
  readonly socket: Socket
  received = ''
  ended = false
  closed = false
  /** The connection ended by reset, not by FIN. */
  reset = false
  readonly #waiting = new Set<() => void>()

  constructor(port: number, allowHalfOpen = true) {
    this.socket = connect({ port, host: '127.0.0.1', allowHalfOpen, noDelay: true })
    this.socket.on('data', (chunk: Buffer) => this.#note(() => (this.received += chunk.toString('latin1'))))
    this.socket.on('end', () => this.#note(() => (this.ended = true)))
    this.socket.on('error', (error: NodeJS.ErrnoException) => this.#note(() => (this.reset ||= error.code === 'ECONNRESET')))
    this.socket.on('close', () => this.#note(() => (this.closed = true)))
  }

  send(text: string): this {
    this.socket.write(text, 'latin1')
    return this
  }

  /** Resolves when `condition` holds, or rejects after `ms`. */
  until(condition: (client: this) => boolean, ms = 5_000): Promise<string> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#waiting.delete(check)
        reject(new Error(`waited ${ms} ms; received: ${JSON.stringify(this.received.slice(0, 500))}`))
      }, ms)
      const check = (): void => {
        if (!condition(this)) return
        clearTimeout(timer)
        this.#waiting.delete(check)
        resolve(this.received)
      }
      this.#waiting.add(check)
      check()
    })
  }

  untilClosed(ms?: number): Promise<string> {
    return this.until((client) => client.closed || client.ended, ms)
  }

  close(): void {
    this.socket.destroy()
  }

  #note(change: () => void): void {
    change()
    for (const check of [...this.#waiting]) check()
  }
}

/** One raw request with `Connection: close`; the whole answer. */
export async function ask(port: number, request: string, ms?: number): Promise<string> {
  const client = new RawClient(port)
  try {
    return await client.send(request).untilClosed(ms)
  } finally {
    client.close()
  }
}

export function get(target: string, ...headers: string[]): string {
  return `GET ${target} HTTP/1.1\r\n${['Host: gateway', ...headers, 'Connection: close'].join('\r\n')}\r\n\r\n`
}

export function statusOf(response: string): number {
  return Number(response.slice(9, 12))
}

export function bodyOf(response: string): string {
  return response.slice(response.indexOf('\r\n\r\n') + 4)
}

/** Resolves when `condition` holds; looked at every few milliseconds. */
export async function eventually(condition: () => boolean, what: string, ms = 5_000): Promise<void> {
  const until = Date.now() + ms
  while (!condition()) {
    if (Date.now() > until) throw new Error(`never: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
}
