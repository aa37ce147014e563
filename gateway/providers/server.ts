/**
 * Routes from the lifecycle server: one long response, one JSON event a line. The table is swapped at `synced`, so a half-read list is
 * never served. When the stream breaks, the old table stays and the gateway reconnects; how long it may be trusted is the table's matter.
 */
import { request as httpRequest, type ClientRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest } from 'node:https'
import { performance } from 'node:perf_hooks'
import { setImmediate } from 'node:timers/promises'
import { routeStreamPath, routeStreamPingSeconds, sandboxStates, type RouteEntry, type RouteEvent } from '#policies/wire.ts'
import type { Provider } from '../gateway.ts'
import type { RouteTable } from '../routes.ts'

export type ServerOptions = {
  /** Base URL of the lifecycle server. */
  readonly url: string
  readonly token: string
  /** Told about the stream's state, once per change. */
  readonly onState: (state: string) => void
  /** 0 to 1, for the jitter. */
  readonly random: () => number
}

const firstBackoff = 100
const longestBackoff = 5_000
/** Two pings missing: the stream is dead, whatever the kernel says. */
const silence = (2 * routeStreamPingSeconds + 5) * 1_000
const longestLine = 1024 * 1024
/** Characters of an id that are told. */
const longestId = 64
/** Characters of the stream read at once: about half a millisecond. */
const slice = 16 * 1024

export class ServerProvider implements Provider {
  readonly #options: ServerOptions
  readonly #table: RouteTable
  #request: ClientRequest | null = null
  #retry: NodeJS.Timeout | null = null
  #backoff = firstBackoff
  #closed = false
  #state = ''
  #synced: () => void = () => undefined

  constructor(options: ServerOptions, table: RouteTable) {
    this.#options = options
    this.#table = table
  }

  /** Opens the stream. The port may open before the first list is there: until then every request is answered with 503. */
  async start(): Promise<void> {
    const first = new Promise<void>((resolve) => (this.#synced = resolve))
    this.#connect()
    let timer: NodeJS.Timeout | undefined
    await Promise.race([first, new Promise((resolve) => (timer = setTimeout(resolve, 2_000)))])
    clearTimeout(timer)
  }

  async close(): Promise<void> {
    this.#closed = true
    if (this.#retry !== null) clearTimeout(this.#retry)
    this.#request?.destroy()
  }

  #connect(): void {
    const base = new URL(this.#options.url)
    const url = new URL(base.pathname.replace(/\/$/, '') + routeStreamPath, base)
    const send = url.protocol === 'https:' ? httpsRequest : httpRequest
    const request = send(url, { headers: { authorization: `Bearer ${this.#options.token}`, accept: 'application/x-ndjson' }, timeout: silence, agent: false })
    this.#request = request
    request.once('response', (response) => this.#follow(response))
    request.on('timeout', () => request.destroy(new Error('no event in time')))
    request.on('error', (error) => this.#say(`disconnected: ${error.message}`))
    request.once('close', () => this.#again())
    request.end()
  }

  #follow(response: IncomingMessage): void {
    if (response.statusCode !== 200) {
      this.#say(`refused with status ${response.statusCode}`)
      response.destroy()
      return
    }
    const reader = new RouteReader(this.#table, () => {
      this.#backoff = firstBackoff
      this.#say('synced')
      this.#synced()
    })
    response.setEncoding('utf8')
    response.on('data', (text: string) => void this.#read(response, reader, text))
    response.on('error', (error) => this.#say(`disconnected: ${error.message}`))
    response.on('end', () => this.#say('disconnected: the server ended the stream'))
  }

  /** A long list comes in many pieces, of which libuv reads dozens in a row: requests take turns with slices of them. */
  async #read(response: IncomingMessage, reader: RouteReader, text: string): Promise<void> {
    response.pause()
    for (let at = 0; at < text.length && !response.destroyed; at += slice) {
      const problem = reader.feed(text.slice(at, at + slice))
      if (problem !== null) {
        this.#say(`unreadable: ${problem}`)
        response.destroy()
        return
      }
      await setImmediate()
    }
    response.resume()
  }

  #again(): void {
    if (this.#closed) return
    // Between half and the whole, so that gateways do not come back in step.
    const wait = this.#backoff * (0.5 + this.#options.random() / 2)
    this.#backoff = Math.min(this.#backoff * 2, longestBackoff)
    this.#retry = setTimeout(() => this.#connect(), wait)
  }

  #say(state: string): void {
    if (state === this.#state || this.#closed) return
    this.#state = state
    this.#options.onState(state)
  }
}

/** Turns the text of one stream into changes of the table. */
export class RouteReader {
  readonly #table: RouteTable
  readonly #onSynced: () => void
  #rest = ''
  #lines = 0
  /** The list being read, from `reset` to `synced`; null when it is complete and events apply at once. */
  #listing: Map<string, RouteEntry> | null = new Map()

  /** Events that came while a long list is being taken; null: none is. */
  #later: RouteEvent[] | null = null

  constructor(table: RouteTable, onSynced: () => void) {
    this.#table = table
    this.#onSynced = onSynced
  }

  /** @returns what makes the stream unreadable, or null. It is for the log: it names the place, and repeats nothing of what stands there. */
  feed(text: string): string | null {
    const lines = (this.#rest + text).split('\n')
    this.#rest = lines.pop() as string
    if (this.#rest.length > longestLine) return `line ${this.#lines + lines.length + 1} is too long`
    for (const line of lines) {
      this.#lines++
      if (line.trim() === '') continue
      const event = readEvent(line)
      if (typeof event === 'string') return `line ${this.#lines}: ${event}`
      if (this.#later === null) this.#apply(event)
      else this.#later.push(event)
    }
    return null
  }

  #apply(event: RouteEvent): void {
    switch (event.type) {
      case 'reset':
        this.#listing = new Map()
        return
      case 'put': {
        const entry = this.#table.known(event.sandbox)
        if (this.#listing === null) this.#table.put(entry)
        else this.#listing.set(entry.id, entry)
        break
      }
      case 'delete':
        if (this.#listing === null) this.#table.delete(event.id)
        else this.#listing.delete(event.id)
        break
      case 'synced':
        this.#take()
        break
      case 'ping':
        break
    }
    // A list under way proves nothing yet: only a complete one is the truth.
    if (this.#listing === null && this.#later === null) this.#table.alive(performance.now())
  }

  /** The list is complete: it becomes the table. */
  #take(): void {
    const listing = this.#listing
    this.#listing = null
    const rest = listing === null ? null : this.#table.replace(listing)
    if (rest === null) return this.#onSynced()
    this.#later = []
    rest.then((taken) => {
      // A newer stream was faster: what this one says is of yesterday.
      if (!taken) return
      const events = this.#later ?? []
      this.#later = null
      this.#table.alive(performance.now())
      this.#onSynced()
      for (const event of events) this.#apply(event)
    }, () => undefined)
  }
}

/**
 * Reads one line. A newer server may say more: unknown types of events are taken for pings, and a sandbox in an unknown state for one that is
 * not ready and has no address, because that may be somebody else's by now.
 * @returns what is wrong, when it is no event: the field, and nothing of what stands in it, which may be the token of a sandbox
 */
export function readEvent(line: string): RouteEvent | string {
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch {
    return 'is not JSON'
  }
  if (typeof value !== 'object' || value === null) return 'is not an object'
  const event = value as { type?: unknown; sandbox?: unknown; id?: unknown }
  switch (event.type) {
    case 'reset':
    case 'synced':
    case 'ping':
      return { type: event.type }
    case 'delete':
      return typeof event.id === 'string' ? { type: 'delete', id: event.id } : 'id must be a string'
    case 'put':
      return readPut(event.sandbox)
    default:
      return typeof event.type === 'string' ? { type: 'ping' } : 'type must be a string'
  }
}

function readPut(value: unknown): RouteEvent | string {
  if (typeof value !== 'object' || value === null) return 'sandbox must be an object'
  const entry = value as Record<keyof RouteEntry, unknown>
  if (typeof entry.id !== 'string' || entry.id === '') return 'sandbox.id must be a string that is not empty'
  const wrong = wrongField(entry)
  if (wrong !== '') return `sandbox.${wrong} of ${JSON.stringify(entry.id.slice(0, longestId))} is wrong`
  const sandbox = value as RouteEntry
  return { type: 'put', sandbox: sandboxStates.includes(sandbox.state) ? sandbox : { ...sandbox, state: 'Unknown', host: '' } }
}

/** @returns its name; '' when all are as they should be */
function wrongField(entry: Readonly<Record<keyof RouteEntry, unknown>>): keyof RouteEntry | '' {
  if (typeof entry.host !== 'string') return 'host'
  if (typeof entry.lifecycle !== 'string') return 'lifecycle'
  if (typeof entry.state !== 'string') return 'state'
  if (entry.secureAccessToken !== undefined && typeof entry.secureAccessToken !== 'string') return 'secureAccessToken'
  if (entry.epoch !== undefined && !Number.isInteger(entry.epoch)) return 'epoch'
  if (entry.renewOnAccess !== undefined && typeof entry.renewOnAccess !== 'boolean') return 'renewOnAccess'
  return ''
}
