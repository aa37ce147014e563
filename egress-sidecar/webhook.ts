/** Tells a URL of the operator's about every denied name, one after the other. node:http, because undici would cost every sandbox megabytes. */
import type { ClientRequest, IncomingMessage } from 'node:http'
import type { LookupFunction } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { ControlPlace } from './control.ts'

export type Webhook = {
  /** `hostname` in lower case without its trailing dot. Never waits and never throws. */
  denied(hostname: string): void
  /** What is not delivered by now is lost. */
  close(): void
}

export type WebhookOptions = {
  readonly url: URL
  readonly sandboxId: string
  readonly place: ControlPlace
  readonly warn: (message: string) => void
  /** Waits so many ms before the next attempt. */
  readonly pause?: (ms: number) => Promise<unknown>
  /** ms that an attempt may take. */
  readonly attemptMs?: number
}

/** Events that wait; the newest is dropped when there are more. */
const maxWaiting = 256
export const defaultAttemptMs = 5000
/** Before the second, third and fourth attempt, the last one. */
const pausesMs = [1000, 2000, 4000] as const

type Denied = { readonly hostname: string; readonly timestamp: string }

export async function createWebhook({ url, sandboxId, place, warn, pause = (ms) => delay(ms, undefined, { ref: false }), attemptMs = defaultAttemptMs }: WebhookOptions): Promise<Webhook> {
  const { Agent, request } = url.protocol === 'https:' ? await import('node:https') : await import('node:http')
  const agent = new Agent({ keepAlive: true, maxSockets: 1 })
  const waiting: Denied[] = []
  let working = false
  let closed = false

  async function work(): Promise<void> {
    if (working) return
    working = true
    for (let event = waiting.shift(); event !== undefined && !closed; event = waiting.shift()) await deliver(event)
    working = false
  }

  async function deliver({ hostname, timestamp }: Denied): Promise<void> {
    const body = JSON.stringify({ hostname, timestamp, source: 'opensandbox-egress', sandboxId })
    for (let attempt = 0; !closed; attempt++) {
      const outcome = await post(body).catch((error: Error) => error.message)
      if (typeof outcome === 'number' && outcome < 300) return
      const wait = pausesMs[attempt]
      if (wait === undefined || (typeof outcome === 'number' && outcome < 500)) return warn(`[events] webhook not delivered for ${hostname}: ${typeof outcome === 'number' ? `status ${outcome}` : outcome}`)
      place.forget()
      await pause(wait)
    }
  }

  /** The answer's status, when the answer is over or was cut: the connection is the next one's. @throws when there is none in time */
  async function post(body: string): Promise<number> {
    const address = await place.reach()
    const family = address.includes(':') ? 6 : 4
    const lookup: LookupFunction = (_host, { all }, done) => (all === true ? done(null, [{ address, family }]) : done(null, address, family))
    const headers = { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }
    let status: number | null = null
    return new Promise((resolve, reject) => {
      const sent: ClientRequest = request(url, { method: 'POST', agent, headers, lookup, signal: AbortSignal.timeout(attemptMs) }, (answer: IncomingMessage) => {
        const told = (status = answer.statusCode ?? 0)
        answer.on('error', () => undefined).on('close', () => resolve(told)).resume()
      })
      sent.on('error', (error) => (status === null ? reject(error) : resolve(status)))
      sent.end(body)
    })
  }

  return {
    denied(hostname) {
      if (closed) return
      if (waiting.length >= maxWaiting) return warn(`[events] blocked-event queue full; dropping hostname ${hostname}`)
      waiting.push({ hostname, timestamp: `${new Date().toISOString().slice(0, 19)}Z` })
      void work()
    },
    close() {
      closed = true
      agent.destroy()
    },
  }
}
