/**
 * Connections to sandboxes read into memory that they read into before. Every four bytes of the bodies here name their answer and their place
 * in it, and heads come in pieces of which each is longer than all before it: memory that is used again too early shows.
 */
import { subscribe } from 'node:diagnostics_channel'
import { connect, type Socket } from 'node:net'
import { setImmediate as turn, setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { sized } from '#test/support/size.ts'
import { eventually, startGateway, startRaw, type TestServer } from './support.ts'

const MiB = 1024 * 1024

type Fields = [name: string, value: string][]
type Message = { status: number; fields: Fields; body: Buffer; trailers: Fields }
/** What the sandbox sends, and what has to reach the client. */
type Answer = {
  /** Each of them arrives as a read of its own. */
  pieces: Buffer[]
  /** The connection ends behind them. */
  ends: boolean
  expected: Message
  /** A 1xx in front of it. */
  hints: Message[]
  method: 'GET' | 'HEAD'
  /** The sandbox could hand over everything. */
  sent: boolean
  /** Which of the sandbox's connections it went over, and as which answer on it. */
  over: { connection: number; nth: number }
}

const head = (...lines: string[]): string => `HTTP/1.1 ${lines.join('\r\n')}\r\n\r\n`

const message = (parts: Partial<Message>): Message => ({ status: 200, fields: [], body: Buffer.alloc(0), trailers: [], ...parts })

function answer(bytes: string | Buffer[], expected: Partial<Message>, more: Partial<Answer> = {}): Answer {
  const pieces = typeof bytes === 'string' ? [Buffer.from(bytes, 'latin1')] : bytes
  return { pieces, ends: false, expected: message(expected), hints: [], method: 'GET', sent: false, over: { connection: 0, nth: 0 }, ...more }
}

let bodiesMade = 0
/** A body that is like no other: its words are numbered on from a start of its own. */
function placesOf(length: number): Buffer<ArrayBuffer> {
  const words = new Uint32Array(Math.ceil(length / 4))
  const start = Math.imul(++bodiesMade, 0x9e3779b1)
  for (let i = 0; i < words.length; i++) words[i] = start + i
  return Buffer.from(words.buffer, 0, length)
}

/** Fields with values that name their places. */
function fieldsOf(count: number, fill = 0): Fields {
  const fields: Fields = Array.from({ length: count }, (_, i) => [`x-place-${i}`, Array.from({ length: 4 }, (_, j) => `${i}.${j}`).join('-')])
  if (fill > 0) fields.push(['x-place-fill', Array.from({ length: Math.ceil(fill / 5) }, (_, i) => String(i).padStart(5, '.')).join('')])
  return fields
}

const linesOf = (fields: Fields): string[] => fields.map(([name, value]) => `${name}: ${value}`)

/** Cut behind `first` bytes, and again so that each piece overwrites all of the one before when both are read into the same memory. */
function growing(text: string, first: number): Buffer[] {
  const pieces: Buffer[] = []
  for (let at = 0, end = first; at < text.length; [at, end] = [end, end * 2 + 1]) pieces.push(Buffer.from(text.slice(at, end), 'latin1'))
  return pieces
}

type Sandbox = TestServer & { readonly answers: Answer[] }

/** Answers `GET /<n>` with the n-th of its answers. */
async function startSandbox(): Promise<Sandbox> {
  const answers: Answer[] = []
  let connections = 0
  const server = await startRaw((socket) => {
    const connection = ++connections
    let nth = 0
    let asked = ''
    // Otherwise small pieces wait for the one before, and for each other.
    socket.setNoDelay(true)
    socket.on('end', () => socket.end())
    socket.on('data', (chunk: Buffer) => {
      asked += chunk.toString('latin1')
      if (!asked.endsWith('\r\n\r\n')) return
      const one = answers[Number(/^[A-Z]+ \/(\d+) /.exec(asked)![1])]!
      asked = ''
      one.over = { connection, nth: nth++ }
      void play(socket, one)
    })
  })
  return { ...server, answers }
}

async function play(socket: Socket, one: Answer): Promise<void> {
  for (const piece of one.pieces) {
    await new Promise<void>((resolve) => {
      socket.once('close', resolve)
      socket.write(piece, () => {
        socket.off('close', resolve)
        resolve()
      })
    })
    if (socket.destroyed) return
    // The gateway shares this loop: behind the second turn it has looked at its connections.
    await turn()
    await turn()
  }
  one.sent = true
  if (one.ends) socket.end()
}

/** How a client reads; it begins when this resolves. @param waiting bytes in the gateway that the kernel did not take */
type Pace = (socket: Socket, waiting: () => number) => Promise<void>

const fast = async (): Promise<void> => undefined

/** A little, and again a little later. */
async function trickling(socket: Socket): Promise<void> {
  socket.on('data', () => {
    socket.pause()
    setTimeout(() => socket.resume(), 1)
  })
}

/** Nothing, until everybody on the way has as much as they take. */
async function late(_socket: Socket, waiting: () => number): Promise<void> {
  await eventually(() => waiting() > 0, 'bytes wait in the gateway', 10_000)
  await delay(50)
}

/** Until it has enough. */
async function leaving(socket: Socket): Promise<void> {
  let seen = 0
  socket.on('data', (chunk: Buffer) => {
    seen += chunk.length
    if (seen > MiB) socket.destroy()
  })
}


/** The gateway's sockets for its clients, by the ports of the clients. */
const clientSockets = new Map<number, Socket>()
subscribe('http.server.request.start', (message) => {
  const { socket } = message as { socket: Socket }
  clientSockets.set(socket.remotePort as number, socket)
})

/** Sends requests for all the answers at once over one connection, and reads until its end. */
async function ask(port: number, sandbox: Sandbox, wanted: readonly Answer[], pace: Pace = fast, minor = 1): Promise<Buffer> {
  const first = sandbox.answers.push(...wanted) - wanted.length
  const requests = wanted.map(({ method }, i) => `${method} /a/${sandbox.port}/${first + i} HTTP/1.${minor}\r\nHost: x\r\n${i === wanted.length - 1 ? 'Connection: close\r\n' : ''}\r\n`)
  const socket = connect({ port, host: '127.0.0.1', noDelay: true })
  const chunks: Buffer[] = []
  const closed = new Promise<void>((resolve, reject) => socket.once('error', reject).once('close', () => resolve()))
  const timer = setTimeout(() => socket.destroy(new Error('an answer has no end')), 15_000)
  socket.write(requests.join(''))
  await pace(socket, () => clientSockets.get(socket.localPort as number)?.writableLength ?? 0)
  socket.on('data', (chunk: Buffer) => chunks.push(chunk))
  await closed.finally(() => clearTimeout(timer))
  return Buffer.concat(chunks)
}

/** Reads as many messages as there are methods, heads with a 1xx besides. What is missing in the end is missing in the last one. */
function readMessages(bytes: Buffer, methods: readonly string[]): Message[] {
  const messages: Message[] = []
  let at = 0
  const readFields = (until: string): string[] => {
    const found = bytes.indexOf(until, at)
    const end = found === -1 ? bytes.length : found
    const lines = bytes.toString('latin1', at, end).split('\r\n')
    at = end + until.length
    return lines
  }
  const asFields = (lines: string[]): Fields => lines.map((line) => line.split(': ') as Fields[number])
  const take = (length: number): Buffer => {
    const piece = bytes.subarray(at, at + length)
    at += length
    return piece
  }
  for (let i = 0; i < methods.length && at < bytes.length; ) {
    const [line, ...lines] = readFields('\r\n\r\n')
    const fields = asFields(lines)
    const field = (name: string): string | undefined => fields.find(([one]) => one.toLowerCase() === name)?.[1]
    const message: Message = { status: Number(line?.slice(9, 12)), fields: fields.filter(([name]) => /^(x-place|link)/.test(name)), body: Buffer.alloc(0), trailers: [] }
    messages.push(message)
    if (message.status < 200) continue
    if (methods[i++] === 'HEAD' || message.status === 204 || message.status === 304) continue
    if (field('transfer-encoding') !== 'chunked') {
      message.body = take(Number(field('content-length') ?? bytes.length - at))
      continue
    }
    const parts: Buffer[] = []
    for (let size = -1; size !== 0 && at < bytes.length; ) {
      size = parseInt(readFields('\r\n')[0] as string, 16)
      if (!(size > 0)) break
      parts.push(take(size))
      at += 2
    }
    message.body = Buffer.concat(parts)
    if (bytes.toString('latin1', at, at + 2) === '\r\n') at += 2
    else message.trailers = asFields(readFields('\r\n\r\n'))
  }
  if (at !== bytes.length) messages.push({ status: 0, fields: [], body: bytes.subarray(at), trailers: [] })
  return messages
}

/** '' when they are the same. Bodies of MiBs are nothing to show. */
function difference(found: Buffer, wanted: Buffer): string {
  if (found.equals(wanted)) return ''
  const shorter = Math.min(found.length, wanted.length)
  let at = 0
  while (at < shorter && found[at] === wanted[at]) at++
  return `byte ${at} of ${wanted.length} differs, ${found.length} arrived`
}

/** Without the body, which is compared by itself. */
const outline = ({ status, fields, trailers }: Message): unknown => ({ status, fields, trailers })

function compare(t: Tap, bytes: Buffer, wanted: readonly Answer[], why: string): void {
  const seen = readMessages(bytes, wanted.map(({ method }) => method))
  const expected = wanted.flatMap((one) => [...one.hints, one.expected])
  t.same(seen.map(outline), expected.map(outline), `${why}: heads and trailers`)
  for (const [i, { body }] of expected.entries()) t.equal(difference(seen[i]?.body ?? Buffer.alloc(0), body), '', `${why}: body ${i}`)
}

type Tap = Pick<typeof t, 'same' | 'equal'>

/** More than the kernel keeps for a client that does not read. */
const large = sized(8, 16) * MiB
const chunkSize = 96 * 1024

/** A body that takes several reads, by how its end is known. */
const framings = {
  length(size: number): Answer {
    const body = placesOf(size)
    return answer([Buffer.from(head('200 OK', `Content-Length: ${size}`)), body], { body })
  },
  /** Heads of chunks, ends of chunks and the trailer section come apart. */
  chunks(size: number): Answer {
    const body = placesOf(size)
    const trailers = fieldsOf(6, 4_000)
    const pieces: Buffer[] = [Buffer.from(head('200 OK', 'Transfer-Encoding: chunked', 'Trailer: x-place-0'))]
    for (let at = 0; at < size; at += chunkSize) {
      const data = body.subarray(at, at + chunkSize)
      const length = data.length.toString(16)
      const cut = (at / chunkSize) % length.length
      pieces.push(Buffer.from(length.slice(0, cut)), Buffer.concat([Buffer.from(`${length.slice(cut)}\r`), Buffer.from('\n'), data, Buffer.from('\r')]), Buffer.from('\n'))
    }
    pieces.push(...growing(`0\r\n${linesOf(trailers).join('\r\n')}\r\n\r\n`, 9))
    return answer(pieces.filter(({ length }) => length > 0), { body, trailers })
  },
  /** The end of the connection is the end of the body. */
  close(size: number): Answer {
    const body = placesOf(size)
    return answer([Buffer.from(head('200 OK', 'Connection: close')), body], { body }, { ends: true })
  },
  /** Head and body in one packet; the gateway keeps no more of it than a string. */
  small(): Answer {
    return framings.packet(12_000)
  },
  packet(size: number): Answer {
    const body = placesOf(size)
    return answer([Buffer.concat([Buffer.from(head('200 OK', `Content-Length: ${size}`)), body])], { body })
  },
}
type Framing = keyof typeof framings

t.test('bodies arrive as they were sent, to fast and slow clients at once', { timeout: 120_000 }, async (t) => {
  await using sandbox = await startSandbox()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const fleet: [why: string, bodies: Framing[], pace: Pace, minor?: number][] = [
    ['as fast as they come', ['length'], fast],
    ['as fast as they come, in chunks', ['chunks'], fast],
    ['as fast as they come, until the end', ['close'], fast],
    ['bytes wait in the socket of the client', ['length'], trickling],
    ['bytes wait there, and the parser does too', ['length'], late],
    ['chunks wait', ['chunks'], late],
    ['chunks wait now and then', ['chunks'], trickling],
    ['a body without a length becomes chunks, which wait', ['close'], late],
    ['a body without a length becomes chunks, which wait now and then', ['close'], trickling],
    ['neither side has a length or chunks', ['close'], late, 0],
    ['a client of HTTP/1.0', ['length'], trickling, 0],
    ['a response has no socket until the one before is over', ['length', 'length', 'length'], trickling],
    ['the same, and the first one waits', ['length', 'small', 'chunks', 'length'], late],
    ['small ones wait behind a large one', ['length', ...Array<Framing>(20).fill('small')], late],
    ['a client leaves in the middle', ['length'], leaving],
    ['a client leaves in the middle of chunks', ['chunks'], leaving],
  ]
  const served: number[] = []
  for (const round of ['new connections', 'kept connections']) {
    await Promise.all(
      fleet.map(async ([why, bodies, pace, minor]) => {
        const wanted = bodies.map((framing, i) => framings[framing](i === 0 ? large : large / 4))
        const bytes = await ask(gateway.port, sandbox, wanted, pace, minor)
        served.push(...wanted.map(({ over }) => over.nth))
        if (pace !== leaving) return compare(t, bytes, wanted, `${round}, ${why}`)
        const [message] = readMessages(bytes, ['GET'])
        const { expected } = wanted[0]!
        t.ok(message!.body.length > MiB / 2 && message!.body.length < expected.body.length, `${round}, ${why}: it had some of it`)
        t.equal(difference(message!.body, expected.body.subarray(0, message!.body.length)), '', `${round}, ${why}`)
      }),
    )
  }
  t.ok(served.some((nth) => nth > 0), 'connections were used again')
})

t.test('what waits for its turn stays as it is while the connection it came over serves others', async (t) => {
  await using sandbox = await startSandbox()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  // Small enough that the gateway keeps all of it, so that the connection is free before the client has a byte.
  const waiting = Array.from({ length: 8 }, () => framings.packet(60_000))
  const ahead = framings.length(large)
  let over: Answer[] = []
  const bytes = await ask(gateway.port, sandbox, [ahead, ...waiting], async (socket, bytesWaiting) => {
    await late(socket, bytesWaiting)
    await eventually(() => waiting.every(({ sent }) => sent), 'all but the first have arrived')
    over = Array.from({ length: waiting.length }, () => framings.length(MiB))
    await Promise.all(over.map(async (one, i) => compare(t, await ask(gateway.port, sandbox, [one]), [one], `another client ${i}`)))
  })
  const connectionsOf = (list: readonly Answer[]): number[] => list.map((one) => one.over.connection)
  t.ok(connectionsOf(over).some((one) => connectionsOf(waiting).includes(one)), 'connections were used again')
  compare(t, bytes, [ahead, ...waiting], 'and then')
})

const hints: Fields = [['link', '</style.css>; rel=preload; as=style'], ...fieldsOf(2)]
const hintsText = head('103 Early Hints', ...linesOf(hints))

/** A 103, a head and a body, cut at the first place and at those that follow from it. */
function informed(first: number): Answer {
  const fields = fieldsOf(12, 600)
  const body = placesOf(400)
  const text = hintsText + head('200 OK', ...linesOf(fields), `Content-Length: ${body.length}`) + body.toString('latin1')
  return answer(growing(text, first), { fields, body }, { hints: [message({ status: 103, fields: hints })] })
}

/** Chunks and trailers, cut at a place before or behind the end of the last chunk. */
function trailed(place: number): Answer {
  const body = placesOf(64)
  const trailers = fieldsOf(6, 800)
  const chunks = `${head('200 OK', 'Transfer-Encoding: chunked')}20\r\n${body.toString('latin1', 0, 32)}\r\n20\r\n${body.toString('latin1', 32)}\r\n`
  return answer(growing(`${chunks}0\r\n${linesOf(trailers).join('\r\n')}\r\n\r\n`, chunks.length + place), { body, trailers })
}

t.test('what the parser keeps of a read stays as it is until the next one completes it', async (t) => {
  const cases: [why: string, make: (place: number) => Answer, from: number, to: number][] = [
    ['status lines, names, values and line ends of a 103 and of the head behind it', informed, 1, 700],
    ['trailers right behind a part of the body', trailed, -100, 200],
  ]
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  for (const [why, make, from, to] of cases) {
    await using sandbox = await startSandbox()
    for (let place = from; place < to; place += sized(3, 1)) {
      const wanted = make(place)
      compare(t, await ask(gateway.port, sandbox, [wanted]), [wanted], `${why}, cut at ${place}`)
    }
    t.equal(sandbox.answers.at(-1)!.over.connection, 1, `${why}: all over one connection`)
  }
})

t.test('behind an answer of any kind the next head may come in pieces', async (t) => {
  const headOnly = ['200 OK', 'Content-Length: 1000', 'Connection: keep-alive']
  const kinds: [why: string, make: () => Answer][] = [
    ['a body in the same packet', framings.small],
    ['a body behind its head', () => framings.length(500)],
    ['a body of many reads', () => framings.length(MiB)],
    ['chunks and trailers', () => framings.chunks(MiB)],
    ['a body of no byte', () => answer(head('200 OK', 'Content-Length: 0'), {})],
    ['chunks of no byte', () => answer(`${head('200 OK', 'Transfer-Encoding: chunked')}0\r\n\r\n`, {})],
    ['chunks of no byte, and trailers', () => answer(growing(`${head('200 OK', 'Transfer-Encoding: chunked')}0\r\n${linesOf(fieldsOf(3, 400)).join('\r\n')}\r\n\r\n`, 60), { trailers: fieldsOf(3, 400) })],
    ['204', () => answer(head('204 No Content'), { status: 204 })],
    ['304', () => answer(head('304 Not Modified', 'ETag: "x"'), { status: 304 })],
    ['HEAD', () => answer(head(...headOnly), {}, { method: 'HEAD' })],
    ['HEAD in pieces', () => answer(growing(head(...headOnly, ...linesOf(fieldsOf(8))), 20), { fields: fieldsOf(8) }, { method: 'HEAD' })],
    ['a 103 with a part of the next head in one packet', () => informed(hintsText.length + 60)],
  ]
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const cuts = [1, 12, 26, 41, 150]
  for (const [why, make] of kinds) {
    await using sandbox = await startSandbox()
    for (const first of cuts) {
      for (const wanted of [make(), informed(first)]) compare(t, await ask(gateway.port, sandbox, [wanted]), [wanted], `${why}, and a head cut at ${first}`)
    }
    // A connection ends with an answer to HEAD: a body may follow.
    t.equal(sandbox.answers.at(-1)!.over.connection, make().method === 'HEAD' ? cuts.length + 1 : 1, `${why}: all over one connection, where one will do`)
  }
})
