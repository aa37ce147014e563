/** The limits of the sidecar's DNS listeners: what a flood meets, and that it ends there. */
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import t, { type Test } from 'tap'
import type { Done } from '../../egress-sidecar/answer.ts'
import { listenDns, listenLimits, type DnsListener, type Handler } from '../../egress-sidecar/listen.ts'
import { message } from './message.ts'

const query = message({ name: 'a.example' })
const echo: Handler = (bytes, _transport, done) => done(Buffer.from(bytes))
const framed = (bytes: Buffer): Buffer => Buffer.concat([Buffer.of(bytes.length >> 8, bytes.length & 255), bytes])

/** A port that is free for UDP may be taken for TCP. */
async function listen(t: Test, handler: Handler, limits: Partial<typeof listenLimits> = {}): Promise<DnsListener> {
  for (let attempt = 0; ; attempt++) {
    try {
      const listener = await listenDns(['127.0.0.1'], 0, handler, { ...listenLimits, ...limits })
      t.teardown(() => listener.close())
      return listener
    } catch (error) {
      if (attempt === 20) throw error
    }
  }
}

async function open(t: Test, port: number): Promise<Socket & { received: Buffer; ended: Promise<unknown> }> {
  const socket = connect(port, '127.0.0.1')
  const ended = new Promise((resolve) => socket.once('close', resolve))
  const state = Object.assign(socket, { received: Buffer.alloc(0), ended })
  socket.on('error', () => undefined).on('data', (chunk) => (state.received = Buffer.concat([state.received, chunk])))
  t.teardown(() => socket.destroy())
  await once(socket, 'connect')
  return state
}

async function answered(socket: { received: Buffer }, bytes: number): Promise<void> {
  while (socket.received.length < bytes) await once(socket as unknown as Socket, 'data')
}

t.test('TCP: 64 connections, the next is closed; one that ends makes room', async (t) => {
  const { port } = await listen(t, echo)
  const held = await Promise.all(Array.from({ length: 64 }, () => open(t, port)))
  for (const socket of held) socket.write(framed(query))
  await Promise.all(held.map((socket) => answered(socket, query.length + 2)))
  const late = await open(t, port)
  await late.ended
  t.equal(late.received.length, 0, 'closed without a word')
  held[0]!.write(framed(query))
  await answered(held[0]!, 2 * (query.length + 2))
  held[1]!.destroy()
  await held[1]!.ended
  // The server hears of the end a moment later than we do.
  for (let attempt = 0; ; attempt++) {
    const next = await open(t, port)
    next.write(framed(query))
    const done = await Promise.race([answered(next, query.length + 2).then(() => true), next.ended.then(() => false)])
    if (done || attempt === 100) {
      t.ok(done, 'the next one is served')
      break
    }
  }
})

t.test('TCP: 128 questions, then the connection is closed', async (t) => {
  const { port } = await listen(t, echo)
  const socket = await open(t, port)
  socket.write(Buffer.concat(Array.from({ length: 300 }, () => framed(query))))
  await socket.ended
  t.equal(socket.received.length, 128 * (query.length + 2))
})

t.test('TCP: one question at a time, the others wait unread', async (t) => {
  const waiting: Done[] = []
  let heard: () => void = () => undefined
  const { port } = await listen(t, (_bytes, _transport, done) => (waiting.push(done), heard()))
  const socket = await open(t, port)
  const first = new Promise<void>((resolve) => (heard = resolve))
  for (let i = 0; i < 10; i++) socket.write(framed(query))
  await first
  for (let i = 0; i < 20; i++) await new Promise(setImmediate)
  t.equal(waiting.length, 1)
  const second = new Promise<void>((resolve) => (heard = resolve))
  waiting[0]!(Buffer.from(query))
  await second
  t.equal(waiting.length, 2)
})

t.test('TCP: who says nothing, who says half of it and who has been answered is waited for so long', async (t) => {
  t.equal(listenLimits.tcpIdleMs, 8000, 'eight seconds')
  const { port } = await listen(t, echo, { tcpIdleMs: 800 })
  const rows: { why: string; says: Buffer; answer: number }[] = [
    { why: 'nothing', says: Buffer.alloc(0), answer: 0 },
    { why: 'half a length', says: framed(query).subarray(0, 1), answer: 0 },
    { why: 'half a question', says: framed(query).subarray(0, 9), answer: 0 },
    { why: 'a question', says: framed(query), answer: query.length + 2 },
    { why: 'a question and a half', says: Buffer.concat([framed(query), framed(query).subarray(0, 9)]), answer: query.length + 2 },
  ]
  await Promise.all(rows.map(async ({ why, says, answer }) => {
    const socket = await open(t, port)
    socket.write(says)
    await answered(socket, answer)
    const begun = performance.now()
    await socket.ended
    const took = performance.now() - begun
    t.ok(took > 700 && took < 3000, `${why}: ${took.toFixed(0)} ms`)
    t.equal(socket.received.length, answer, why)
  }))
})

t.test('UDP: 4,096 questions on their way, the next are dropped; an answer makes room', async (t) => {
  const waiting: Done[] = []
  const { port } = await listen(t, (_bytes, _transport, done) => void waiting.push(done))
  const client = createSocket('udp4')
  t.teardown(() => client.close())
  client.connect(port, '127.0.0.1')
  await once(client, 'connect')
  const send = async (count: number): Promise<void> => {
    // In parts, so that the listener's buffer holds them.
    for (let i = 0; i < count; i += 64) {
      for (let k = 0; k < 64; k++) client.send(query)
      for (let turn = 0; turn < 10; turn++) await new Promise(setImmediate)
    }
  }
  for (let attempt = 0; attempt < 200 && waiting.length < 4096; attempt++) await send(512)
  t.equal(waiting.length, 4096)
  await send(1024)
  t.equal(waiting.length, 4096, 'no more, however many come')
  for (const done of waiting.splice(0, 100)) done(null)
  for (let attempt = 0; attempt < 200 && waiting.length < 4096; attempt++) await send(64)
  t.equal(waiting.length, 4096, 'as many as were answered')
})

t.test('a port that is taken is no start', async (t) => {
  const { port } = await listen(t, echo)
  await t.rejects(listenDns(['127.0.0.1'], port, echo), /EADDRINUSE/)
})

t.test('TCP: whoever waits for our answer is not idle', async (t) => {
  const { port } = await listen(t, (bytes, _transport, done) => void setTimeout(() => done(Buffer.from(bytes)), 900), { tcpIdleMs: 500 })
  const socket = await open(t, port)
  socket.write(framed(query))
  await Promise.race([answered(socket, query.length + 2), socket.ended])
  t.equal(socket.received.length, query.length + 2)
})

t.test('TCP: who closes his side behind the question gets the answer, and then the end', async (t) => {
  const handlers: [why: string, handler: Handler][] = [
    ['at once', echo],
    ['in a while', (bytes, _transport, done) => void setTimeout(() => done(Buffer.from(bytes)), 300)],
    ['longer than somebody idle has', (bytes, _transport, done) => void setTimeout(() => done(Buffer.from(bytes)), 900)],
  ]
  await Promise.all(handlers.map(async ([why, handler]) => {
    const { port } = await listen(t, handler, { tcpIdleMs: 600 })
    for (const count of [1, 3]) {
      const socket = await open(t, port)
      socket.end(Buffer.concat(Array.from({ length: count }, () => framed(query))))
      await socket.ended
      t.equal(socket.received.length, count * (query.length + 2), `${why}, of ${count}`)
      t.notOk(socket.errored, 'an end, no reset')
    }
  }))
  const { port } = await listen(t, echo)
  for (const says of [Buffer.alloc(0), framed(query).subarray(0, 9)]) {
    const socket = await open(t, port)
    const begun = performance.now()
    socket.end(says)
    await socket.ended
    t.ok(performance.now() - begun < 3000, `${says.length} bytes of a question: nothing to wait for`)
  }
})

t.test('TCP: connections closed on one side do not gather', async (t) => {
  const big = Buffer.alloc(60_000)
  const { port } = await listen(t, (_bytes, _transport, done) => done(big), { tcpConnections: 2, tcpIdleMs: 400 })
  const held = await Promise.all([1, 2].map(() => open(t, port)))
  for (const socket of held) {
    socket.pause()
    socket.end(Buffer.concat(Array.from({ length: 128 }, () => framed(query))))
  }
  // They read nothing, so that nothing tells us of their end but a place that is free again.
  for (const begun = performance.now(); ;) {
    const next = await open(t, port)
    next.write(framed(query))
    const served = await Promise.race([answered(next, 2).then(() => true, () => false), next.ended.then(() => false)])
    const took = performance.now() - begun
    if (!served && took < 5000) continue
    t.ok(served, `their places are free after ${took.toFixed(0)} ms`)
    break
  }
})
