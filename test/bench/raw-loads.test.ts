/** The loads of the bench's own: they count what is right, and a proxy that answers something else, too little or nothing more ends the run. */
import { createServer, type AddressInfo, type Socket } from 'node:net'
import t from 'tap'
import { drain, pour } from '../../bench/body-load.ts'
import { SteadyClient } from '../../bench/steady-requests.ts'
import { WebSocketLoad } from '../../bench/websocket-load.ts'

type Server = AsyncDisposable & { readonly port: number }

/** Calls `answer` for every chunk that a client sends. */
async function serve(answer: (socket: Socket, chunk: Buffer) => void): Promise<Server> {
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    socket.on('data', (chunk: Buffer) => answer(socket, chunk))
  })
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(0, '127.0.0.1', resolve))
  return {
    port: (server.address() as AddressInfo).port,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

const size = 300_000
const head = (length: number): string => `HTTP/1.1 200 OK\r\nContent-Length: ${length}\r\n\r\n`
const bodies = (port: number) => ({ port, path: '/', headers: ['X-Bench: 1'], size, connections: 2, seconds: 0.05, proxy: { pid: process.pid, stop: async () => undefined } })
const load = (port: number) => drain(bodies(port))

t.test('large bodies: bytes are counted, answers are whole', async (t) => {
  const asked: string[] = []
  await using server = await serve((socket, chunk) => {
    asked.push(chunk.toString())
    socket.write(head(size).slice(0, 20))
    socket.write(head(size).slice(20))
    socket.write(Buffer.alloc(size))
  })
  const sample = await load(server.port)
  t.ok(asked.length >= 2, 'each connection asked')
  t.same(new Set(asked), new Set(['GET / HTTP/1.1\r\nHost: bench.example\r\nX-Bench: 1\r\n\r\n']))
  // Not more: a test machine that stands still just then counts nothing.
  t.ok(Number.isFinite(sample['throughput']))
})

t.test('large bodies: what fails the run', async (t) => {
  const wrong: Readonly<Record<string, [(socket: Socket) => void, RegExp]>> = {
    'another status': [(socket) => void socket.write(`HTTP/1.1 502 Bad Gateway\r\nContent-Length: ${size}\r\n\r\n`), /not the answer that was wanted: HTTP\/1.1 502/],
    'another length': [(socket) => void socket.write(head(size - 1)), /not the answer that was wanted/],
    'an end in the middle': [(socket) => void socket.end(`${head(size)}begin`), /the connection ended/],
    'more than was announced': [(socket) => void socket.write(Buffer.concat([Buffer.from(head(size)), Buffer.alloc(size + 1)])), /more bytes than announced/],
  }
  for (const [name, [answer, message]] of Object.entries(wrong)) {
    await using server = await serve(answer)
    await t.rejects(load(server.port), message, name)
  }
})

t.test('uploads: whole bodies arrive, one after the other, and bytes are counted', async (t) => {
  const lengths: number[] = []
  const uploads = new WeakMap<Socket, { text: string; missing: number }>()
  await using server = await serve((socket, chunk) => {
    const upload = uploads.get(socket) ?? { text: '', missing: -1 }
    uploads.set(socket, upload)
    if (upload.missing === -1) {
      upload.text += chunk.toString('latin1')
      const end = upload.text.indexOf('\r\n\r\n')
      if (end === -1) return
      t.equal(upload.text.slice(0, end), `POST / HTTP/1.1\r\nHost: bench.example\r\nContent-Length: ${size}\r\nX-Bench: 1`)
      upload.missing = size - (upload.text.length - end - 4)
    } else upload.missing -= chunk.length
    if (upload.missing > 0) return
    lengths.push(size - upload.missing)
    uploads.delete(socket)
    socket.write(`${head(5)}hel`)
    socket.write('lo')
  })
  const sample = await pour(bodies(server.port))
  t.ok(lengths.length >= 2, 'each connection sent')
  t.same(new Set(lengths), new Set([size]), 'and no byte too many')
  t.ok(Number.isFinite(sample['throughput']))
})

t.test('uploads: what fails the run', async (t) => {
  const wrong: Readonly<Record<string, [(socket: Socket) => void, RegExp]>> = {
    'an answer before the end': [(socket) => void socket.write(`${head(5)}hello`), /not the answer that was wanted/],
    'another status': [(socket) => void socket.write(`HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n`), /not the answer that was wanted: HTTP\/1.1 413/],
    'an end in the middle': [(socket) => void socket.destroy(), /EPIPE|ECONNRESET/],
  }
  for (const [name, [answer, message]] of Object.entries(wrong)) {
    let answered = false
    // A body that neither side's kernel can hold, so that the answer comes before its end.
    await using server = await serve((socket) => {
      if (answered) return
      answered = true
      socket.pause()
      answer(socket)
    })
    await t.rejects(pour({ ...bodies(server.port), size: 64 * 1024 * 1024, connections: 1 }), message, name)
  }
})

const switching = 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n'

/** What a server makes of the frame of a client: unmasked, behind a header of its own. */
function echoOf(frame: Buffer): Buffer {
  return Buffer.concat([Buffer.from([0x82, 0x7e, 0, 128]), frame.subarray(8).map((byte, index) => byte ^ frame[4 + (index % 4)]!)])
}

t.test('WebSockets: echoes are counted, also when they come in pieces', async (t) => {
  let echoes = 0
  await using server = await serve((socket, chunk) => {
    if (chunk[0] === 0x47) return void socket.write(switching)
    echoes++
    socket.write(echoOf(chunk).subarray(0, 50))
    setImmediate(() => socket.write(echoOf(chunk).subarray(50)))
  })
  const clients = await WebSocketLoad.open({ port: server.port, headers: [] }, 5)
  t.equal(await clients.echo(0), 5, 'one on each connection')
  t.ok((await clients.echo(0.05)) >= 5)
  const before = echoes
  t.equal(await clients.echo(0), 5)
  t.equal(echoes - before, 5, 'nothing was under way any more')
  clients.close()
})

t.test('WebSockets: what fails the run', async (t) => {
  const wrong: Readonly<Record<string, [(socket: Socket, chunk: Buffer) => void, RegExp]>> = {
    'no upgrade': [(socket) => void socket.write('HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy'), /no WebSocket: HTTP\/1.1 503/],
    'a wrong accept': [(socket) => void socket.write(switching.replace('s3p', 'xxx')), /no WebSocket/],
    'bytes nobody asked for': [(socket) => void socket.write(`${switching}hello`), /bytes behind the handshake/],
    'another echo': [(socket, chunk) => void socket.write(chunk[0] === 0x47 ? switching : echoOf(chunk).fill(0x78, 100)), /not what was sent/],
    'the question itself': [(socket, chunk) => void socket.write(chunk[0] === 0x47 ? switching : chunk), /not what was sent/],
    'an end': [(socket, chunk) => void (chunk[0] === 0x47 ? socket.write(switching) : socket.end()), /the connection ended/],
  }
  for (const [name, [answer, message]] of Object.entries(wrong)) {
    await using server = await serve(answer)
    await t.rejects(async () => {
      const clients = await WebSocketLoad.open({ port: server.port, headers: [] }, 3)
      try {
        await clients.echo(0)
      } finally {
        clients.close()
      }
    }, message, name)
  }
})

t.test('steady requests: each is timed, and anything but 200 ends the run', async (t) => {
  let count = 0
  await using server = await serve((socket) => void socket.write(++count < 4 ? `${head(5)}hello` : 'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n'))
  const client = await SteadyClient.open(server.port)
  t.equal(await client.ask('X-Bench: 1'), 200)
  const times = await client.askSteadily('X-Bench: 1', 0, () => count < 3)
  t.equal(times.length, 2)
  t.equal(await client.ask('X-Bench: 1'), 404, 'a single question is told what came')
  await t.rejects(client.askSteadily('X-Bench: 1', 0, () => true), /answered 404/)
  client.close()
})
