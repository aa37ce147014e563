/** Sandboxes that answer anyhow, on raw connections. What each says to a request hangs on the seed and the request's id alone. */
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { Random } from '../../support/random.ts'
import { startRaw, type TestServer } from '../support.ts'
import { readRequests } from '../strict-parser.ts'
import { cut, filler, frames, never, type Asked, type Delivery, type Ledger, type Script } from './ledger.ts'

/** `liar`: it also answers when nobody asked, so that its own answers get into disorder. That is its own affair, as long as it stays so. */
export type Manners = 'calm' | 'wild' | 'liar'

/** Sandboxes may share one: which of them a connection is for is known by its first request. */
export async function startSandbox(ledger: Ledger, manners: Manners): Promise<TestServer> {
  return startRaw((socket) => void new Connection(ledger, manners, socket))
}

type Current = { readonly asked: Asked; readonly delivery: Delivery; readonly random: Random }

class Connection {
  readonly #ledger: Ledger
  readonly #manners: Manners
  readonly #socket: Socket
  readonly #accepted: number
  /** What came and belongs to no whole request yet. */
  #text = ''
  #sandbox = ''
  #current: Current | null = null
  #tunnel = false
  /** It has answered before: the gateway knows it as a connection that stood, and may try another one when it breaks. */
  #served = false

  constructor(ledger: Ledger, manners: Manners, socket: Socket) {
    this.#ledger = ledger
    this.#manners = manners
    this.#socket = socket
    this.#accepted = ledger.now()
    socket.setNoDelay(true)
    socket.on('data', (chunk: Buffer) => this.#take(chunk.toString('latin1')))
    socket.on('end', () => this.#tunnel || socket.end())
  }

  #take(text: string): void {
    if (this.#tunnel && this.#current !== null) this.#current.delivery.tunnelGot += text
    else {
      this.#text += text
      this.#readOn()
    }
  }

  #problem(text: string): void {
    this.#ledger.problems.push(`sandbox: ${text}: ${JSON.stringify(this.#text.slice(0, 200))}`)
    this.#socket.destroy()
  }

  #readOn(): void {
    if (this.#current?.delivery.whole === true) {
      if (!this.#current.delivery.answered) {
        if (this.#text !== '' && this.#manners !== 'liar') this.#problem('more behind a request that is not answered')
        return
      }
      this.#current = null
    }
    if (this.#current === null) {
      const head = this.#text.indexOf('\r\n\r\n')
      if (head === -1 || this.#socket.destroyed) return
      this.#begin(this.#text.slice(0, head + 4))
    }
    const current = this.#current as Current | null
    if (current === null || current.delivery.whole) return
    const { complete, problems, rest } = readRequests(this.#text, 1)
    if (problems.length > 0) return this.#problem(problems.join())
    const request = complete[0]
    if (request === undefined) return
    const { asked, delivery } = current
    const all = (name: string): string => request.headers.filter(([key]) => key === name).map(([, value]) => value).join()
    delivery.whole = true
    if (!asked.sent) this.#problem(`read ${asked.id} to its end, which its client did not send`)
    if (request.method !== asked.method || request.target !== asked.target || request.body !== asked.body) this.#problem(`${asked.id} is not what its client sent`)
    if (all('x-request-id') !== asked.id || all('upgrade') !== (asked.kind === 'upgrade' ? 'websocket' : '')) this.#problem(`fields of ${asked.id}`)
    if (request.trailers.some(([, value]) => value !== asked.id)) this.#problem(`trailers of ${asked.id}`)
    this.#text = rest
    if (!delivery.script.early) void this.#play()
    if (rest !== '') this.#readOn()
  }

  /** A head has come. */
  #begin(head: string): void {
    const id = /^\S+ \/(q-[0-9a-f]{16})/.exec(head)?.[1] ?? ''
    const asked = this.#ledger.asked.get(id)
    if (asked === undefined) return this.#problem('a request of nobody')
    this.#sandbox ||= asked.sandbox
    const before = asked.deliveries.length
    if (asked.barred || asked.kind === 'bad' || asked.kind === 'own') this.#problem(`${id} must not come here`)
    if (asked.sandbox !== this.#sandbox) this.#problem(`${id} of ${asked.sandbox} on a connection of ${this.#sandbox}`)
    if (this.#ledger.endedBetween(asked.sandbox, this.#accepted, asked.begun)) this.#problem(`${id} on a connection of an earlier life`)
    if (before > 1 || (before === 1 && !asked.replayable)) this.#problem(`${id} for the ${before + 1}. time`)
    const random = this.#ledger.randomOf(parseInt(id.slice(2, 9), 16) + before)
    const script = asked.kind === 'upgrade' ? upgradeScript(asked, before, random) : plainScript(asked, before, random, this.#manners)
    // Whoever behaves does not notice: asked once more, it answers.
    if (this.#manners === 'calm' && this.#served && asked.replayable && before === 0 && random.between(0, 4) === 0) Object.assign(script, leaving(random))
    const delivery: Delivery = { script, whole: false, answered: false, tunnelSent: '', tunnelGot: '', tunnelEnded: false }
    asked.deliveries.push(delivery)
    this.#current = { asked, delivery, random }
    if (script.holdMs > 0) {
      this.#socket.pause()
      setTimeout(() => this.#socket.resume(), script.holdMs)
    }
    if (script.early) void this.#play()
  }

  async #play(): Promise<void> {
    if (this.#current === null) return
    const { asked, delivery, random } = this.#current
    const { script } = delivery
    if (script.pauseMs > 0) await delay(script.pauseMs)
    if (script.status === 101 && asked.kind === 'upgrade') {
      this.#tunnel = true
      return this.#playTunnel(asked, delivery, random)
    }
    const pieces = cut(random, script.text, 4)
    const last = (pieces.pop() ?? '') + script.tail
    for (const piece of pieces) {
      this.#write(piece)
      await delay(random.between(0, 6))
    }
    // Before the write, so that who is asked next is not asked too early.
    delivery.answered = last !== ''
    this.#write(last)
    this.#served ||= delivery.answered
    this.#leave(script.end)
    if (script.late !== '') {
      await delay(random.between(1, 40))
      this.#write(script.late)
    }
    this.#readOn()
  }

  /** @returns what of it goes out: all or nothing */
  #write(text: string): string {
    if (!this.#socket.writable || text === '') return ''
    this.#socket.write(text, 'latin1')
    return text
  }

  #leave(how: Script['end']): void {
    if (how === 'end') this.#socket.end()
    // Node loses a socket that is reset while its end is on the way (EINVAL of libuv): it stays open, and nobody hears a `close`.
    else if (how === 'reset' && !this.#socket.writableEnded) this.#socket.resetAndDestroy()
    else if (how !== 'keep') this.#socket.destroy()
  }

  async #playTunnel(asked: Asked, delivery: Delivery, random: Random): Promise<void> {
    const socket = this.#socket
    // Whether it says something with its 101, and how it ends, if it does.
    const early = random.between(0, 1) === 0 ? frames(random, asked.id, false) : ''
    if (this.#write(delivery.script.text + early) !== '') delivery.tunnelSent = early
    const ending = random.pick(['keep', 'keep', 'keep', 'end', 'reset', 'destroy'] as const)
    socket.once('end', () => setTimeout(() => socket.end(), 10))
    for (let count = random.between(0, 4); count > 0 && socket.writable; count--) {
      await delay(random.between(0, 30))
      for (const piece of cut(random, frames(random, asked.id, false), 3)) delivery.tunnelSent += this.#write(piece)
      if (random.between(0, 4) > 0) continue
      socket.pause()
      setTimeout(() => socket.resume(), random.between(10, 150))
    }
    await delay(random.between(0, 20))
    delivery.tunnelEnded = ending === 'end' && socket.writable
    this.#leave(ending)
  }
}

type Deed = 'proper' | 'short' | 'long' | 'bodiless' | 'noise' | 'bad head' | 'bad chunk' | 'leave' | 'silence' | 'switch' | 'continue' | 'stray'
const wildDeeds: readonly Deed[] = [...Array<Deed>(14).fill('proper'), 'short', 'short', 'short', 'long', 'long', 'bodiless', 'noise', 'bad head', 'bad chunk', 'leave', 'leave', 'silence', 'switch', 'continue']
const deeds: Record<Manners, readonly Deed[]> = { calm: ['proper'], wild: wildDeeds, liar: [...wildDeeds, ...Array<Deed>(8).fill('stray')] }

const badFields = ['bad name: 1', 'content-length: 1\r\ncontent-length: 2', 'content-length: 1\r\ntransfer-encoding: chunked', 'content-length: -1', 'x: a\0b', `x: ${'y'.repeat(300_000)}`]

function plainScript({ id, method }: Asked, nth: number, random: Random, manners: Manners): Script {
  const deed = random.pick(deeds[manners])
  const calm = manners === 'calm'
  const mark = `x-echo: ${id}.${nth}\r\n`
  const common = { early: !calm && random.between(0, 5) === 0, pauseMs: random.pick([0, 0, 0, random.between(0, 60)]), holdMs: calm ? 0 : random.pick([0, 0, 0, random.between(10, 200)]), tail: '', late: '', interim: [] as number[] }
  const rude = random.pick(['end', 'destroy', 'reset', 'keep'] as const)
  if (deed === 'leave' || deed === 'silence' || deed === 'noise') return { ...common, ...wordless(deed, id, random) }
  if (deed === 'switch') return { ...common, text: '', tail: `HTTP/1.1 101 Switching Protocols\r\nx-n: ${never}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n`, end: rude, status: 0, length: -1 }
  if (deed === 'bad head') return { ...common, text: '', tail: `HTTP/1.1 200 OK\r\nx-n: ${never}\r\n${random.pick(badFields)}\r\n\r\n`, end: rude, status: 0, length: -1 }

  const interim = random.pick([[], [], [], [103], [102, 103]])
  const before = (deed === 'continue' ? 'HTTP/1.1 100 Continue\r\n\r\n' : '') + interim.map((status) => `HTTP/1.1 ${status} Wait\r\n${mark}link: </${id}>\r\n\r\n`).join('')
  const reached = { ...common, interim }
  if (deed === 'bodiless') {
    const status = random.pick([204, 304])
    const end = random.pick(['keep', 'keep', 'end', 'destroy', 'reset'] as const)
    return { ...reached, text: `${before}HTTP/1.1 ${status} No\r\n${mark}${status === 304 ? 'content-length: 5\r\n' : ''}\r\n`, tail: random.pick(['', `${id} ${never}`]), end, status, length: 0 }
  }
  const status = random.pick([200, 200, 200, 201, 206, 404, 500])
  const length = deed === 'short' || deed === 'bad chunk' ? random.between(2, 80_000) : random.pick([0, 1, 7, 300, 300, 20_000, 70_000, 200_000, calm ? 300 : 1_500_000])
  const framing = deed === 'bad chunk' ? 'chunks' : deed === 'long' || deed === 'stray' ? random.pick(['length', 'chunks']) : random.pick(['length', 'length', 'chunks', 'chunks', 'close'])
  const body = method === 'HEAD' ? '' : framing === 'chunks' ? chunked(random, id, filler(id, length)) : filler(id, length)
  const leaves = framing === 'close' || random.between(0, 9) === 0
  const fields = `${mark}${framing === 'length' ? `content-length: ${length}\r\n` : framing === 'chunks' ? 'transfer-encoding: chunked\r\n' : ''}${leaves ? 'connection: close\r\n' : ''}${random.pick(['', 'set-cookie: a=1; path=/\r\nset-cookie: b=2\r\n', `x-again: ${id}\r\nx-again: ${id}\r\n`])}`
  const head = `${before}HTTP/1.1 ${status} ${random.pick(['OK', 'Some Reason', ''])}\r\n${fields}\r\n`
  const orderly = leaves ? 'end' : calm ? 'keep' : random.pick(['keep', 'keep', 'keep', 'keep', 'end', 'destroy', 'reset'] as const)
  const whole = deed === 'continue' ? -1 : method === 'HEAD' ? 0 : length
  if (body !== '' && deed === 'short') {
    // Without a length only a reset says that this was not all.
    return { ...reached, text: head + body.slice(0, random.between(0, body.length - 1)), end: framing === 'close' ? 'reset' : rude, status, length: -1 }
  }
  if (body !== '' && deed === 'bad chunk') return { ...reached, text: head + body.slice(0, body.lastIndexOf('\r\n0\r\n') + 2), tail: `xyz\r\n${id} ${never}\r\n0\r\n\r\n`, end: rude, status, length: -1 }
  if (deed === 'long') return { ...reached, text: head + body, tail: `${id} ${never}`, end: rude, status, length: whole }
  if (deed === 'stray') return { ...reached, text: head + body, late: `HTTP/1.1 200 OK\r\nx-echo: ${id}.9\r\ncontent-length: 5\r\n\r\nstray`, end: 'keep', status, length: whole }
  return { ...reached, text: head + body, end: orderly, status, length: whole }
}

type Wordless = Pick<Script, 'text' | 'tail' | 'end' | 'status' | 'length'>

function leaving(random: Random): Wordless {
  return { text: '', tail: '', end: random.pick(['end', 'destroy', 'reset']), status: 0, length: -1 }
}

/** What no answer begins with. */
function wordless(deed: 'leave' | 'silence' | 'noise', id: string, random: Random): Wordless {
  if (deed === 'leave') return leaving(random)
  const tail = deed === 'silence' ? '' : `${random.text('\0\r\n:HTP/1. 20\xff', 0, 60)}${id} ${never}`
  return { text: '', tail, end: deed === 'silence' ? 'keep' : random.pick(['end', 'destroy', 'reset', 'keep']), status: 0, length: -1 }
}

/** What a sandbox says to an upgrade: 101, a refusal in any shape, or nothing of the kind. */
function upgradeScript({ id }: Asked, nth: number, random: Random): Script {
  const deed = random.pick(['open', 'open', 'open', 'open', 'open', 'open', 'hint', 'refuse', 'refuse', 'chunks', 'close', 'short', 'noise', 'leave', 'silence'])
  const mark = `x-echo: ${id}.${nth}\r\n`
  const common = { early: false, pauseMs: random.pick([0, 0, random.between(0, 60)]), holdMs: 0, tail: '', late: '', interim: deed === 'hint' ? [103] : [] }
  const hint = deed === 'hint' ? `HTTP/1.1 103 Early Hints\r\n${mark}\r\n` : ''
  if (deed === 'open' || deed === 'hint') return { ...common, text: `${hint}HTTP/1.1 101 Switching Protocols\r\n${mark}connection: Upgrade\r\nupgrade: websocket\r\n\r\n`, end: 'keep', status: 101, length: 0 }
  if (deed === 'leave' || deed === 'silence' || deed === 'noise') return { ...common, ...wordless(deed, id, random) }
  const status = random.pick([200, 403, 426, 503])
  const length = random.pick([1, 300, 20_000])
  const body = filler(id, length)
  const head = `HTTP/1.1 ${status} No\r\n${mark}`
  if (deed === 'short') return { ...common, text: `${head}content-length: ${length}\r\n\r\n${body.slice(0, -1)}`, end: random.pick(['end', 'destroy', 'reset']), status, length: -1 }
  if (deed === 'chunks') return { ...common, text: `${head}transfer-encoding: chunked\r\n\r\n${chunked(random, id, body)}`, end: random.pick(['keep', 'end']), status, length }
  if (deed === 'close') return { ...common, text: `${head}connection: close\r\n\r\n${body}`, end: 'end', status, length }
  return { ...common, text: `${head}content-length: ${length}\r\n\r\n${body}`, end: random.pick(['keep', 'keep', 'end']), status, length }
}

/** Also with an extension, and with a trailer behind. */
export function chunked(random: Random, id: string, body: string): string {
  const pieces = cut(random, body, 5).map((piece) => `${piece.length.toString(16)}${random.pick(['', '', ';x=y'])}\r\n${piece}\r\n`)
  return `${pieces.join('')}0\r\n${random.pick(['', '', `x-check: ${id}\r\n`])}\r\n`
}
