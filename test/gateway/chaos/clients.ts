/** Clients that send anything in any order, and one that behaves. Each keeps what it asked on its connection, and what came back. */
import { setTimeout as delay } from 'node:timers/promises'
import type { Random } from '../../support/random.ts'
import { RawClient } from '../support.ts'
import { readAnswers } from '../strict-parser.ts'
import { cut, filler, frames, newId, type Asked, type Ledger } from './ledger.ts'
import { chunked } from './sandboxes.ts'

/** A sandbox as a client knows it. */
export type Door = {
  readonly sandbox: string
  readonly port: number
  /** Of its access header; '' for none. */
  readonly token: string
  /** Who asks for it gets nowhere. */
  readonly barred: boolean
}

/** One connection of a client. */
export class Line {
  readonly client: RawClient
  readonly asked: Asked[] = []
  /** The client itself ended it. */
  left = false
  /** It sends no more. */
  halfClosed = false
  readonly #ledger: Ledger
  readonly #random: Random
  /** Length of what was read last, and how many answers it held. */
  #read = 0
  #answers = 0
  /** What goes out with the next piece. */
  #held: [text: string, asked: Asked, part: 'head' | 'all' | 'some'][] = []

  constructor(port: number, ledger: Ledger, random: Random) {
    this.client = new RawClient(port)
    this.#ledger = ledger
    this.#random = random
  }

  get over(): boolean {
    return this.left || this.halfClosed || this.client.closed || this.client.ended
  }

  /** @param part what of the request is sent with this text: its head, all of it, or neither */
  hold(text: string, asked: Asked, part: 'head' | 'all' | 'some'): void {
    if (!this.asked.includes(asked)) {
      asked.begun = this.#ledger.now()
      this.#ledger.asked.set(asked.id, asked)
      this.asked.push(asked)
    }
    this.#held.push([text, asked, part])
  }

  /** Sends what is held, whole or in pieces. */
  async flush(most = this.#random.pick([1, 1, 1, 2, 4])): Promise<void> {
    const held = this.#held
    this.#held = []
    let sent = 0
    for (const piece of cut(this.#random, held.map(([text]) => text).join(''), most)) {
      if (sent > 0) await delay(this.#random.between(0, 12))
      if (this.over) return
      this.client.send(piece)
      sent += piece.length
      let end = 0
      for (const [text, asked, part] of held) {
        if ((end += text.length) > sent) break
        if (part !== 'some') asked.headSent = true
        if (part === 'all') asked.sent = true
      }
    }
  }

  /** How many have come whole. Asked every few milliseconds, and long texts take long to read: only when something is new. */
  answers(): number {
    const { received } = this.client
    if (received.length !== this.#read) this.#answers = readAnswers(received, this.asked.map(({ method }) => method)).complete.length
    this.#read = received.length
    return this.#answers
  }

  async answered(ms: number): Promise<void> {
    for (const end = Date.now() + ms; !this.over && this.answers() < this.asked.length && Date.now() < end; ) await delay(8)
  }

  async pause(ms: number): Promise<void> {
    this.client.socket.pause()
    await delay(ms)
    this.client.socket.resume()
  }

  leave(how: 'destroy' | 'reset'): void {
    this.left = true
    if (how === 'reset') this.client.socket.resetAndDestroy()
    else this.client.close()
  }

  halfClose(): void {
    this.halfClosed = true
    this.client.socket.end()
  }
}

type Kind = 'plain' | 'body' | 'broken body' | 'half' | 'upgrade' | 'h2c' | 'connect' | 'bad' | 'own' | 'ahead'
const kinds: readonly Kind[] = [...Array<Kind>(20).fill('plain'), ...Array<Kind>(9).fill('body'), 'broken body', 'half', ...Array<Kind>(8).fill('upgrade'), 'h2c', 'connect', 'bad', 'bad', 'own', 'ahead']

/** A connection from its first byte to its last, all of it by chance. */
export async function hostile(line: Line, doors: readonly Door[], random: Random): Promise<void> {
  const patient = random.between(0, 2) === 0
  for (let steps = random.between(1, 7); steps > 0 && !line.over; steps--) {
    const asked = await step(line, doors, random)
    if (asked?.kind === 'upgrade') await sendTunnel(line, asked, random)
    else if (asked?.ends === true && random.between(0, 1) === 0) {
      // What stands behind the end is no request, whatever it looks like.
      const behind = compose('plain', random.pick(doors), random, true)
      line.hold(behind.text, behind.asked, 'all')
      await line.flush()
    }
    // An answer to HTTP/1.0 often ends with its connection: who half-closes in the middle of it must not take that for its end.
    if (asked?.version === '1.0' && random.between(0, 1) === 0) {
      await line.client.until(({ received, closed }) => closed || /HTTP\/1.1 [2-5][^]*\r\n\r\n./.test(received), 400).catch(() => undefined)
      if (!line.over) line.halfClose()
      return
    }
    if (asked?.ends === true || (asked?.sent === false && asked.kind === 'plain')) break
    if (patient || random.between(0, 5) === 0) await line.answered(400)
    else if (random.between(0, 7) === 0) await line.pause(random.between(5, 200))
    else if (random.between(0, 2) === 0) await delay(random.between(0, 40))
  }
  await line.flush()
  if (line.over) return
  const end = random.pick(['waits', 'waits', 'waits', 'waits', 'destroy', 'reset', 'half', 'silent', 'silent'] as const)
  if (end === 'waits') await line.answered(600)
  else if (end !== 'silent') await delay(random.pick([0, random.between(0, 60)]))
  if (end === 'half') line.halfClose()
  else if (end !== 'silent') line.leave(end === 'reset' ? 'reset' : 'destroy')
}

async function step(line: Line, doors: readonly Door[], random: Random): Promise<Asked | null> {
  const kind = random.pick(kinds)
  const door = random.pick(doors)
  if (kind === 'ahead') {
    // Some more than may wait for their answers, now and then.
    for (let count = random.pick([5, 10, 70]); count > 0; count--) {
      const { asked, text } = compose('plain', random.pick(doors), random, false)
      if (asked.ends) continue
      line.hold(text, asked, 'all')
    }
    await line.flush()
    return line.asked.at(-1) ?? null
  }
  // An upgrade behind a request that waits for its answer ends the connection: mostly another one is meant.
  if (kind === 'upgrade' && random.between(0, 3) > 0) await line.answered(600)
  if (line.over) return null
  const { asked, text, body } = compose(kind, door, random, false)
  line.hold(text, asked, body === '' && kind !== 'half' ? 'all' : 'head')
  if (kind === 'upgrade') {
    // The tunnel may begin with the same packet.
    if (random.between(0, 1) === 0) sendInTunnel(line, asked, frames(random, asked.id, true))
    await line.flush()
    return asked
  }
  if (asked.expects && random.between(0, 3) > 0) {
    const from = line.client.received.length
    await line.flush()
    await line.client.until((client) => client.closed || client.ended || client.received.length > from, random.between(20, 300)).catch(() => undefined)
    // Refused: this body is never sent. What has come may also be the answer to an earlier one.
    if (line.answers() === line.asked.length && !line.client.received.slice(from).includes('HTTP/1.1 100 ')) return asked
  }
  if (kind === 'half') line.hold(body.slice(0, random.between(0, body.length - 1)), asked, 'some')
  else if (body !== '') line.hold(body, asked, 'all')
  // Or together with the next one.
  if (random.between(0, 3) > 0 || kind === 'half') await line.flush()
  return asked
}

function sendInTunnel(line: Line, asked: Asked, text: string): void {
  asked.tunnel += text
  line.hold(text, asked, 'some')
}

async function sendTunnel(line: Line, asked: Asked, random: Random): Promise<void> {
  for (let count = random.between(0, 4); count > 0 && !line.over; count--) {
    if (random.between(0, 5) === 0) await line.pause(random.between(5, 150))
    else await delay(random.between(0, 40))
    sendInTunnel(line, asked, frames(random, asked.id, true))
    await line.flush()
  }
}

type Composed = { readonly asked: Asked; readonly text: string; /** As it goes on the wire, where it is not sent with the head. */ readonly body: string }

const badRequests: ((text: string) => string)[] = [
  (text) => text.replace('\r\n\r\n', '\r\nBad Name: 1\r\n\r\n'),
  (text) => text.replace('\r\n\r\n', '\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n'),
  (text) => text.replace('\r\n\r\n', '\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n'),
  (text) => text.replace('\r\n\r\n', '\r\nContent-Length: +5\r\n\r\n'),
  (text) => text.replace('\r\n\r\n', '\r\nExpect: 100-continues\r\n\r\n'),
  (text) => text.replace('\r\n\r\n', '\r\nX: a\0b\r\n\r\n'),
  (text) => text.replace('\r\n\r\n', '\r\nHost: twice\r\n\r\n'),
  (text) => text.replace(/Host: .*\r\n/, ''),
  (text) => text.replace('HTTP/1.1', 'HTTP/1.2'),
  (text) => text.replace('HTTP/1.1', 'HTTP/2.0'),
  (text) => text.replace('HTTP/1.1', 'HTTP/1.0').replace('\r\n\r\n', '\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'),
  (text) => text.replace('GET', 'GRAB'),
  (text) => text.replace(' ', ' #'),
  (text) => text.replace('\r\n\r\n', '\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\n'),
  () => '\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03',
]

function compose(kind: Kind, { sandbox, port, token, barred }: Door, random: Random, behind: boolean): Composed {
  const id = newId(random)
  const plain = kind === 'plain' || kind === 'body'
  const withBody = kind === 'body' || kind === 'broken body' || kind === 'half'
  const method = withBody ? random.pick(['POST', 'POST', 'PUT', 'DELETE']) : kind === 'connect' ? 'CONNECT' : kind === 'plain' ? random.pick(['GET', 'GET', 'GET', 'HEAD', 'DELETE', 'OPTIONS']) : kind === 'h2c' ? random.pick(['GET', 'POST']) : 'GET'
  const old = plain && random.between(0, 5) === 0
  const keepsOld = old && random.between(0, 2) === 0
  const closes = plain && !old && random.between(0, 11) === 0
  const target = `/${id}${random.pick(['', '', '?x=1', '/a%2Fb/../c?', '/'])}`
  const by = kind === 'own' ? 'nothing' : random.pick(['path', 'path', 'header', 'host', 'absolute'] as const)
  const named = `${sandbox}-${port}`
  const ownPath = random.pick(['/status.ok', '/status.ok?x', '*'])
  const line = kind === 'connect' ? `${named}:80` : by === 'nothing' ? ownPath : by === 'path' ? `/${sandbox}/${port}${target}` : by === 'absolute' ? `http://${named}.gw.test${target}` : target
  const shows = token !== '' && random.between(0, 3) > 0
  const replayable = random.between(0, 9) === 0
  const fields = [`Host: ${by === 'host' ? `${named}.gw.test` : 'other.test'}`, `X-Request-Id: ${id}`]
  if (by === 'header') fields.push(`OpenSandbox-Ingress-To: ${named}`)
  if (shows) fields.push(`OpenSandbox-Secure-Access: ${token}`)
  if (replayable) fields.push(`Idempotency-Key: ${id}`)
  if (random.between(0, 4) === 0) fields.push('Accept: application/json')
  if (closes) fields.push('Connection: close')
  if (keepsOld) fields.push('Connection: keep-alive')
  if (kind === 'upgrade') fields.push('Connection: Upgrade', 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==')
  if (kind === 'h2c') fields.push('Connection: Upgrade, HTTP2-Settings', 'Upgrade: h2c', 'HTTP2-Settings: AAMAAABkAAQAAP__')
  const body = withBody ? filler(id, random.pick([1, 20, 300, 2_000, 70_000, kind === 'half' ? 500 : 300_000])) : ''
  const inChunks = kind === 'broken body' || (withBody && !old && random.between(0, 1) === 0)
  let wire = body
  if (inChunks) wire = kind === 'broken body' ? `${body.length.toString(16)}\r\n${body}\r\nxyz\r\n\r\n` : chunked(random, id, body)
  const expects = withBody && !old && random.between(0, 4) === 0
  if (withBody) fields.push(inChunks ? 'Transfer-Encoding: chunked' : `Content-Length: ${body.length}`)
  if (expects) fields.push('Expect: 100-continue')
  const head = `${method} ${line} HTTP/${old ? '1.0' : '1.1'}\r\n${fields.join('\r\n')}\r\n\r\n`
  const asked: Asked = {
    id, sandbox, method, version: old ? '1.0' : '1.1', target, body, expects,
    kind: kind === 'upgrade' || kind === 'own' ? kind : kind === 'bad' || kind === 'connect' ? 'bad' : 'plain',
    replayable: body === '' && (replayable || ['GET', 'HEAD', 'OPTIONS'].includes(method)) && kind !== 'upgrade',
    barred: barred || behind || (token !== '' && !shows),
    ends: closes || (old && !keepsOld) || kind === 'upgrade' || kind === 'h2c' || kind === 'connect' || kind === 'bad' || kind === 'broken body',
    begun: 0, headSent: false, sent: false, tunnel: '', deliveries: [],
  }
  return { asked, text: kind === 'bad' ? random.pick(badRequests)(head) : head, body: wire }
}

/**
 * Asks a sandbox that behaves, one request after the other, and wants each answered.
 * @param state `goesOn`: there is time for one more; `draining`: the gateway is being closed
 * @returns how many were answered
 */
export async function polite(connect: () => Line, door: Door, random: Random, state: { goesOn: boolean; draining: boolean }, problems: string[]): Promise<number> {
  let line = connect()
  let answered = 0
  while (state.goesOn) {
    let tries = 0
    for (let done = false; !done; ) {
      if (line.over) line = connect()
      const { asked, text, body } = politely(door, random)
      line.hold(text + body, asked, 'all')
      const before = line.client.received.length
      await line.flush()
      for (const end = Date.now() + 8_000; !line.over && line.answers() < line.asked.length && Date.now() < end; ) await delay(4)
      done = line.answers() === line.asked.length
      // README: a gateway that shuts down closes idle connections, at its deadline all of them, and accepts no new one.
      if (!done && line.over && state.draining) return answered
      // A connection may be let go where nobody asks anything, just when the next request is on its way (RFC 9112 §9.3.1); a new one may not.
      if (!done && (line.client.received.length > before || !line.over || ++tries > 1)) {
        problems.push(`${asked.id} of the polite one is not answered: ${JSON.stringify(line.client.received.slice(before, before + 200))} ${JSON.stringify({ ...line.client, received: 0, socket: 0 })}`)
        return answered
      }
      if (done) answered++
    }
    await delay(random.between(0, 20))
  }
  line.leave('destroy')
  return answered
}

function politely(door: Door, random: Random): Composed {
  for (;;) {
    const composed = compose(random.pick(['plain', 'plain', 'body']), door, random, false)
    if (!composed.asked.ends && composed.asked.version === '1.1') return composed
  }
}
