/** `--max-message-bytes`: a client whose WebSocket message is too large is told 1009, between two frames, and the sandbox hears no more of it. */
import { once } from 'node:events'
import type { Socket } from 'node:net'
import t from 'tap'
import { WebSocket, WebSocketServer } from 'ws'
import { FrameBoundary } from '../../gateway/frame-boundary.ts'
import { eventually, RawClient, startGateway, startHttp, startRaw } from './support.ts'

const handshake = (port: number): string => `GET /a/${port}/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`
const switching = 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'
const tooBig = '\x88\x02\x03\xf1'

/** A client's frame, its mask all zero. @param first FIN and opcode */
function frame(first: number, length: number, sent = length): Buffer {
  const head = length < 126 ? [first, 0x80 | length] : [first, 0xfe, length >> 8, length & 255]
  return Buffer.concat([Buffer.from([...head, 0, 0, 0, 0]), Buffer.alloc(sent, 'x')])
}

/** A sandbox that upgrades and keeps what it is sent. */
async function startListener(onOpen: (socket: Socket) => void = () => undefined) {
  const seen = { bytes: Buffer.alloc(0), over: false }
  const server = await startRaw((socket) => {
    let open = false
    socket.on('close', () => (seen.over = true))
    socket.on('end', () => socket.end())
    socket.on('data', (chunk: Buffer) => {
      if (open) return void (seen.bytes = Buffer.concat([seen.bytes, chunk]))
      open = true
      socket.write(switching)
      onOpen(socket)
    })
  })
  return { server, seen }
}

t.test('messages are counted over their frames, control frames apart', async (t) => {
  const text = 0x81
  const begin = 0x01
  const more = 0x00
  const last = 0x80
  const ping = 0x89
  const cases: readonly [string, Buffer[], number][] = [
    ['as long as it may be', [frame(text, 100), frame(text, 100), frame(text, 0)], -1],
    ['one byte longer', [frame(text, 100), frame(text, 101)], 106],
    ['by its announcement, before any of it is there', [frame(text, 1000, 0)], 0],
    ['in fragments, each of them small', [frame(begin, 60), frame(more, 40), frame(last, 1)], 66 + 46],
    ['fragments of two messages', [frame(begin, 60), frame(last, 40), frame(begin, 60), frame(last, 40)], -1],
    ['a message that never ends and begins again', [frame(begin, 60), frame(begin, 41)], 66],
    ['pings do not count', [frame(begin, 60), frame(ping, 125), frame(last, 40)], -1],
    ['a length of 64 bits', [Buffer.from([0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0])], 0],
  ]
  for (const [name, frames, wanted] of cases) {
    const bytes = Buffer.concat(frames)
    for (const step of [1, 3, bytes.length]) {
      const messages = new FrameBoundary(100)
      let refusedAt = -1
      for (let at = 0; at < bytes.length && refusedAt === -1; at += step) {
        const passed = messages.feed(bytes.subarray(at, at + step))
        if (messages.tooLarge) refusedAt = at + passed
      }
      // In small steps the beginning of the frame's head has been passed on before its length is known.
      if (step === bytes.length) t.equal(refusedAt, wanted, name)
      else t.ok(wanted === -1 ? refusedAt === -1 : refusedAt >= wanted && refusedAt <= wanted + 14, `${name}, in steps of ${step}`)
    }
  }
  const endless = new FrameBoundary()
  endless.feed(frame(text, 1000, 0))
  t.notOk(endless.tooLarge, 'no limit unless there is one')
})

t.test('a real client: what fits comes back, what does not closes with 1009', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end())
  const sockets = new WebSocketServer({ server: upstream.server, maxPayload: 0 })
  const received: number[] = []
  sockets.on('connection', (socket) => socket.on('message', (data, binary) => {
    received.push((data as Buffer).length)
    socket.send(data, { binary })
  }))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', maxMessageBytes: 10_000 })
  for (const send of [(socket: WebSocket) => socket.send(Buffer.alloc(10_001)), (socket: WebSocket) => {
    socket.send(Buffer.alloc(6_000), { fin: false })
    socket.send(Buffer.alloc(6_000), { fin: true })
  }]) {
    const socket = new WebSocket(`ws://127.0.0.1:${gateway.port}/a/${upstream.port}/`, { perMessageDeflate: false })
    await once(socket, 'open')
    const back = once(socket, 'message')
    socket.send(Buffer.alloc(10_000))
    t.equal(((await back)[0] as Buffer).length, 10_000)
    const closed = once(socket, 'close')
    send(socket)
    t.equal((await closed)[0], 1009)
  }
  await eventually(() => upstream.sockets.size === 0 && gateway.lines.length === 2, 'both sides are over')
  t.same(received, [10_000, 10_000], 'nothing of the others became a message')
})

t.test('the sandbox gets what stands before the frame, and its own frame under way is completed first', async (t) => {
  let say: (text: string) => void = () => undefined
  const { server, seen } = await startListener((socket) => {
    say = (text) => void socket.write(text, 'latin1')
    socket.write('\x81\x05he', 'latin1')
  })
  await using upstream = server
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', maxMessageBytes: 100 })
  const client = new RawClient(gateway.port)
  client.send(handshake(upstream.port))
  await client.until((c) => c.received.endsWith('\x81\x05he'))
  client.socket.write(Buffer.concat([frame(0x82, 50), frame(0x82, 101)]))
  await eventually(() => seen.bytes.equals(frame(0x82, 50)), 'the message before it')
  client.socket.write(frame(0x82, 5))
  say('llo\x81\x01x')
  await client.until((c) => c.ended)
  t.ok(client.received.endsWith(`\x81\x05hello${tooBig}`), 'the frame under way is completed, nothing follows the 1009')
  t.notOk(client.reset)
  await eventually(() => seen.over, 'the end of the sandbox side')
  t.ok(seen.bytes.equals(frame(0x82, 50)), 'and nothing of what came after')
  client.socket.end()
  await eventually(() => gateway.lines.length === 1, 'its access line')
  client.close()
})

t.test('a message right behind the head', async (t) => {
  const { server, seen } = await startListener()
  await using upstream = server
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', maxMessageBytes: 100 })
  const client = new RawClient(gateway.port)
  client.socket.write(Buffer.concat([Buffer.from(handshake(upstream.port)), frame(0x82, 101)]))
  await client.until((c) => c.ended)
  t.match(client.received, /^HTTP\/1\.1 101 /)
  t.ok(client.received.endsWith(`\r\n\r\n${tooBig}`))
  await eventually(() => seen.over, 'the end of the sandbox side')
  t.equal(seen.bytes.length, 0)
  client.close()
  await eventually(() => gateway.lines.length === 1, 'its access line')
})

t.test('a client that goes on sending and never reads its refusal is let go', async (t) => {
  const { server, seen } = await startListener()
  await using upstream = server
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', maxMessageBytes: 100 })
  const client = new RawClient(gateway.port)
  client.send(handshake(upstream.port))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  client.socket.write(frame(0x82, 101))
  const sending = setInterval(() => client.socket.write(frame(0x82, 10)), 50)
  t.teardown(() => clearInterval(sending))
  await client.until((c) => c.closed, 30_000)
  t.ok(client.received.endsWith(tooBig))
  t.equal(seen.bytes.length, 0)
  await eventually(() => gateway.lines.length === 1, 'its access line')
  client.close()
})
