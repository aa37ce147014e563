/** The three doors into a sandbox: how one request to one port is written for a gateway in each mode, and clients for it. */
import { once } from 'node:events'
import { request, type Dispatcher } from 'undici'
import WebSocket from 'ws'
import { formatEndpoint } from '#policies/route.ts'

export const doorModes = ['wildcard', 'uri', 'header'] as const
export type DoorMode = (typeof doorModes)[number]

export type Door = {
  readonly mode: DoorMode
  /** Where to connect and what to ask; `path` begins with a slash and may hold a query. */
  target(path: string): { readonly url: string; readonly headers: Record<string, string> }
  /** The same for a user at a shell. */
  curl(path: string): string
}

/** @param gateway its address, `127.0.0.1:28888` */
export function openDoor(mode: DoorMode, gateway: string, id: string, port: number): Door {
  const address = mode === 'wildcard' ? `*.sandbox.localhost:${gateway.split(':')[1]}` : gateway
  const { endpoint, headers = {} } = formatEndpoint(mode, address, { id, port })
  return {
    mode,
    // Node does not resolve *.localhost: connect to the gateway and name the host in the request.
    target(path) {
      if (mode === 'wildcard') return { url: `http://${gateway}${path}`, headers: { host: endpoint } }
      return { url: `http://${endpoint}${path}`, headers: lowerCase(headers) }
    },
    curl(path) {
      const words = Object.entries(headers).map(([name, value]) => `-H '${name}: ${value}' `)
      return `curl ${words.join('')}http://${endpoint}${path}`
    },
  }
}

export async function fetchThrough(door: Door, path: string, options: { method?: Dispatcher.HttpMethod; body?: Buffer; headers?: Record<string, string> } = {}): Promise<{ status: number; headers: Dispatcher.ResponseData['headers']; body: Buffer }> {
  const { url, headers } = door.target(path)
  const answer = await request(url, { method: options.method ?? 'GET', headers: { ...headers, ...options.headers }, body: options.body ?? null, headersTimeout: 30_000, bodyTimeout: 30_000 })
  return { status: answer.statusCode, headers: answer.headers, body: Buffer.from(await answer.body.arrayBuffer()) }
}

/** An open WebSocket. @throws with the status when the gateway answers with something else than 101 */
export async function openSocket(door: Door, path = '/ws', headers: Record<string, string> = {}): Promise<WebSocket> {
  const target = door.target(path)
  const socket = new WebSocket(target.url.replace('http:', 'ws:'), { headers: { ...target.headers, ...headers }, perMessageDeflate: false, handshakeTimeout: 10_000 })
  await once(socket, 'open')
  return socket
}

/** Sends one message and gives the answer to it. */
export async function exchange(socket: WebSocket, message: Buffer | string): Promise<{ data: Buffer; binary: boolean }> {
  const answered = once(socket, 'message', { signal: AbortSignal.timeout(10_000) }) as Promise<[Buffer, boolean]>
  socket.send(message)
  const [data, binary] = await answered
  return { data, binary }
}

export async function closeSocket(socket: WebSocket): Promise<number> {
  const closed = once(socket, 'close', { signal: AbortSignal.timeout(10_000) }) as Promise<[number]>
  socket.close(1000)
  return (await closed)[0]
}

function lowerCase(headers: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(Object.entries(headers).map(([name, value]) => [name.toLowerCase(), value]))
}
