/** Sandboxes that do not accept, do not read or do not answer: who waits for them, and for how long. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import t from 'tap'
import { ask, eventually, get, RawClient, startGateway, startRaw, statusOf } from './support.ts'

const upgrade = (target: string): string => `GET ${target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`

t.test('a sandbox that does not accept is given up in time', async (t) => {
  // A listener whose process is stopped and whose queue is full: the kernel leaves further dials unanswered.
  const listener = spawn(process.execPath, ['-e', 'const s = require("net").createServer().listen({ port: 0, host: "127.0.0.1", backlog: 1 }, () => console.log(s.address().port))'], { stdio: ['ignore', 'pipe', 'inherit'] })
  const fill: Socket[] = []
  t.teardown(() => {
    for (const socket of fill) socket.destroy()
    listener.kill('SIGKILL')
  })
  const port = Number(((await once(listener.stdout, 'data')) as [Buffer])[0])
  listener.kill('SIGSTOP')
  for (let n = 0; n < 4; n++) fill.push(connect(port, '127.0.0.1').on('error', () => undefined))
  await eventually(() => fill.filter((socket) => !socket.connecting).length >= 2, 'a full queue')
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', connectTimeout: 300 })
  const answer = await ask(gateway.port, get(`/a/${port}/`, 'Accept: application/json'), 20_000)
  t.equal(statusOf(answer), 504)
  t.match(answer, '"code":"EDGE_UPSTREAM_TIMEOUT"')
  const client = new RawClient(gateway.port)
  t.equal(statusOf(await client.send(upgrade(`/a/${port}/`)).untilClosed(20_000)), 503, "an upgrade gets the original's answer")
  client.close()
})

t.test('a sandbox that does not answer an upgrade is given up in time, and hears of it', async (t) => {
  await using mute = await startRaw((socket) => void socket.resume().on('end', () => socket.end()))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', firstByteTimeout: 300 })
  const client = new RawClient(gateway.port)
  t.equal(statusOf(await client.send(upgrade(`/a/${mute.port}/`)).untilClosed(20_000)), 503)
  await eventually(() => mute.sockets.size === 0, 'the dial is undone')
  client.close()
})

t.test('a sandbox that does not read stops the client', async (t) => {
  const taken: Socket[] = []
  await using upstream = await startRaw((socket) => void taken.push(socket.pause()))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const block = Buffer.alloc(256 * 1024)
  for (const [name, head] of [['with a length', 'Content-Length: 10000000000'], ['chunked', 'Transfer-Encoding: chunked']] as const) {
    const client = new RawClient(gateway.port)
    client.send(`POST /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\n${head}\r\n\r\n`)
    const chunk = name === 'chunked' ? Buffer.concat([Buffer.from(`${block.length.toString(16)}\r\n`), block, Buffer.from('\r\n')]) : block
    let taking = Date.now()
    const pour = (): void => {
      taking = Date.now()
      while (!client.socket.destroyed && client.socket.bytesWritten < 2 ** 30 && client.socket.write(chunk));
    }
    client.socket.on('drain', pour)
    pour()
    // Kernel buffers fill up; after that nothing may move.
    await eventually(() => Date.now() - taking > 500, `${name}: it stops`, 30_000)
    const passed = client.socket.bytesWritten - client.socket.writableLength
    t.ok(passed > 0 && passed < 64 * 1024 * 1024, `${name}: ${passed >> 20} MiB were taken before the stop`)
    client.close()
    taken.at(-1)?.destroy()
  }
})
