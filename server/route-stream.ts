/** Tells gateways where sandboxes are: a table, and every change of it, to any number of subscribers. */
import type { ServerResponse } from 'node:http'
import { routeStreamPingSeconds, type RouteEntry, type RouteEvent } from '#policies/wire.ts'

/** A gateway that reads slower than this much behind is cut off; it reconnects and gets a fresh table. */
const mostBuffered = 4 * 1024 * 1024

export class RouteStream {
  readonly #entries = new Map<string, { entry: RouteEntry; line: string }>()
  readonly #subscribers = new Set<ServerResponse>()
  readonly #ping: NodeJS.Timeout

  constructor() {
    this.#ping = setInterval(() => this.#send(toLine({ type: 'ping' })), routeStreamPingSeconds * 1000).unref()
  }

  /** Tells nobody when nothing has changed. */
  put(entry: RouteEntry): void {
    const line = toLine({ type: 'put', sandbox: entry })
    if (this.#entries.get(entry.id)?.line === line) return
    this.#entries.set(entry.id, { entry, line })
    this.#send(line)
  }

  delete(id: string): void {
    if (this.#entries.delete(id)) this.#send(toLine({ type: 'delete', id }))
  }

  get subscribers(): number {
    return this.#subscribers.size
  }

  /** Takes the response over: the whole table first, then changes until either side closes. */
  subscribe(response: ServerResponse): void {
    response.writeHead(200, { 'content-type': 'application/x-ndjson', 'cache-control': 'no-store' })
    response.write(toLine({ type: 'reset' }) + [...this.#entries.values()].map((item) => item.line).join('') + toLine({ type: 'synced' }))
    this.#subscribers.add(response)
    response.on('close', () => this.#subscribers.delete(response))
    response.on('error', () => this.#subscribers.delete(response))
  }

  close(): void {
    clearInterval(this.#ping)
    for (const response of this.#subscribers) response.end()
  }

  #send(line: string): void {
    for (const response of this.#subscribers) {
      if (response.writableLength > mostBuffered) response.destroy()
      else response.write(line)
    }
  }
}

function toLine(event: RouteEvent): string {
  return `${JSON.stringify(event)}\n`
}
