/** What a relay adds of its own to an exchange, without undici, node:http or a socket: the rest of a request's cost is theirs and the kernel's. */
import type { ServerResponse } from 'node:http'
import { FrameBoundary } from '../gateway/frame-boundary.ts'
import { InFlight } from '../gateway/in-flight.ts'
import { httpRelays } from '../gateway/relay-http.ts'
import type { Relay } from '../gateway/relay.ts'
import { RouteTable } from '../gateway/routes.ts'
import { Standing } from '../gateway/standing.ts'
import { answerFields, upgradeFields } from '../gateway/upgrade-heads.ts'
import type { Dispatcher, Handler } from '../gateway/upstream.ts'
import type { Visit } from '../gateway/visit.ts'
import type { Micro } from './micro.ts'
import { browserFields, visitOf } from './visits.ts'

const table = new RouteTable(() => false)
table.put({ id: 'sandbox5', host: '10.0.0.5', state: 'Running', lifecycle: 'bench' })
const sandbox = table.get('sandbox5')!
const options = { connectTimeout: 1000, firstByteTimeout: 0, idleTimeout: 0, bootGrace: 0, maxRequests: 10, preserveHost: false, lookup: () => undefined, standing: new Standing(() => 10) }
const active = new InFlight<Relay>()
const refuse = (): void => {
  throw new Error('the bench is wrong: the exchange failed')
}
const open = httpRelays(table, options, refuse, active, () => false)
const controller = { abort() {}, pause() {}, resume() {} } as unknown as Dispatcher.DispatchController
let written = 0
const { nextTick } = process
const response = { writeHead: () => undefined, write: (piece: string | Buffer) => (written += piece.length) > 0, end: () => undefined, chunkedEncoding: false, writableLength: 0, socket: null } as unknown as ServerResponse
const visit: Visit = Object.assign(visitOf(browserFields), { response, port: 8080, locatedAt: 1 })
const fields = { 'content-type': 'text/plain', 'content-length': '1024', date: 'Thu, 26 Nov 2026 00:00:00 GMT' }
const [small, large] = [Buffer.alloc(1024, 'a'), Buffer.alloc(64 * 1024)]
const raw = ['Upgrade', 'websocket', 'Connection', 'Upgrade', 'Sec-WebSocket-Accept', 's3pPLMBiTxaQ9kYGzzhZRbK+xOo=', 'Set-Cookie', 'a=b; Path=/']
const frames = new FrameBoundary()
/** A masked frame of 128 bytes, as a client sends it. */
const frame = Buffer.concat([Buffer.of(0x81, 0xfe, 0, 128, 1, 2, 3, 4), Buffer.alloc(128)])

export const bench: Micro = {
  title: 'relay',
  cases: {
    'an exchange of 1 KiB': () => exchange([small]),
    'an exchange of 64 pieces of 64 KiB': () => exchange(Array.from({ length: 64 }, () => large)),
    'upgradeFields, 9 fields': () => upgradeFields(visit, '10.0.0.5:8080', false),
    'answerFields, 4 fields': () => answerFields(raw, visit, '10.0.0.5:8080'),
    'FrameBoundary.feed, 128 bytes': () => frames.feed(frame),
  },
}

if (exchange([small]) !== small.length || active.size !== 0) throw new Error('the bench is wrong: the exchange did not come to its end')

/** What undici tells about an answer, in its order. @returns bytes handed to the client */
function exchange(pieces: readonly Buffer[]): number {
  written = 0
  // Asked to look later whether the head went out alone: here it never does, and nothing would empty that list before the batch is over.
  process.nextTick = () => undefined
  const relay = open(visit, sandbox) as (Relay & Handler) | null
  if (relay === null) throw new Error('the bench is wrong: the port is full')
  relay.onRequestStart!(controller, null)
  relay.onResponseStarted!()
  relay.onResponseStart!(controller, 200, fields, 'OK')
  for (const piece of pieces) relay.onResponseData!(controller, piece)
  relay.onResponseEnd!(controller, {})
  process.nextTick = nextTick
  return written
}
