/** When a request goes out once more, and when it must not: stale connections, and ports that are still booting. */
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { ask, eventually, get, RawClient, startGateway, startRaw, statusOf } from './support.ts'

t.test('a stale connection is tried once more when a replay is safe, and only then', async (t) => {
  for (const [name, request, retried] of [
    ['GET', (p: number) => `GET /a/${p}/ HTTP/1.1\r\nHost: x\r\n\r\n`, true],
    ['DELETE', (p: number) => `DELETE /a/${p}/ HTTP/1.1\r\nHost: x\r\n\r\n`, false],
    ['DELETE with Idempotency-Key', (p: number) => `DELETE /a/${p}/ HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\n\r\n`, true],
    ['POST with a body', (p: number) => `POST /a/${p}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi`, false],
  ] as const) {
    let connections = 0
    const seen: string[] = []
    await using upstream = await startRaw((socket) => {
      const nth = ++connections
      let requests = 0
      socket.on('data', (chunk: Buffer) => {
        requests++
        seen.push(`${nth}.${requests} ${chunk.toString('latin1').split(' ')[0]}`)
        // The first connection dies under its second request.
        if (nth === 1 && requests === 2) socket.destroy()
        else socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok')
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port)
    client.send(`GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\n\r\n`)
    await client.until((c) => c.received.endsWith('ok'))
    client.received = ''
    client.send(request(upstream.port))
    const answer = await client.until((c) => /\r\n\r\n./s.test(c.received))
    t.equal(statusOf(answer), retried ? 200 : 502, name)
    t.equal(seen.filter((line) => line.startsWith('2.')).length, retried ? 1 : 0, `${name}: ${seen.join(', ')}`)
    client.close()
  }
})

t.test('a connection that dies under its very first request was not stale: nothing is asked twice', async (t) => {
  for (const [name, die] of [['end', (socket: Socket) => void socket.end()], ['reset', (socket: Socket) => void socket.resetAndDestroy()]] as const) {
    let [warm, asked] = [false, 0]
    await using upstream = await startRaw((socket) => {
      socket.on('data', () => {
        asked++
        if (warm) socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok')
        else die(socket)
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    t.equal(statusOf(await ask(gateway.port, get(`/a/${upstream.port}/`))), 502, name)
    t.equal(asked, 1, `${name}: asked ${asked} times`)
    // What another connection to the same port served makes a new one no older.
    warm = true
    const slow = new RawClient(gateway.port).send(get(`/a/${upstream.port}/`))
    await slow.until((c) => c.received.endsWith('ok'))
    slow.close()
    for (const socket of upstream.sockets) socket.destroy()
    await eventually(() => upstream.sockets.size === 0, 'the kept connection is gone')
    await delay(50)
    ;[warm, asked] = [false, 0]
    t.equal(statusOf(await ask(gateway.port, get(`/a/${upstream.port}/`))), 502, `${name}, redialled`)
    t.equal(asked, 1, `${name}, redialled: asked ${asked} times`)
  }
})

t.test('a port that is still booting is waited for, for a bounded time', async (t) => {
  const reserved = await startRaw(() => undefined)
  const { port } = reserved
  await reserved[Symbol.asyncDispose]()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', bootGrace: 10_000 })
  const client = new RawClient(gateway.port)
  client.send(get(`/a/${port}/`))
  await new Promise((resolve) => setTimeout(resolve, 120))
  const { createServer } = await import('node:http')
  const late = createServer((_request, response) => response.end('late'))
  await new Promise<void>((resolve) => late.listen(port, '127.0.0.1', resolve))
  t.match(await client.untilClosed(), /^HTTP\/1\.1 200[\s\S]*late/)
  late.closeAllConnections()
  await new Promise((resolve) => late.close(resolve))
  const gone = Date.now()
  t.equal(statusOf(await ask(gateway.port, get(`/a/${port}/`))), 502, 'a port that answered once and is gone is refused')
  // Much of its grace is left.
  t.ok(Date.now() - gone < 5_000, `at once: after ${Date.now() - gone} ms`)
})

t.test('a port that never opens is given up, and a body that waited for one goes out once', async (t) => {
  const reserved = await startRaw(() => undefined)
  const { port } = reserved
  await reserved[Symbol.asyncDispose]()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', bootGrace: 500 })
  const begun = Date.now()
  t.equal(statusOf(await ask(gateway.port, get(`/a/${port}/`))), 502)
  t.ok(Date.now() - begun >= 250 && Date.now() - begun < 4_000, `after ${Date.now() - begun} ms`)
  await using patient = await startGateway([{ id: 'a' }], { mode: 'uri', bootGrace: 5_000 })
  const client = new RawClient(patient.port)
  client.send(`POST /a/${port}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello`)
  await new Promise((resolve) => setTimeout(resolve, 150))
  const { createServer } = await import('node:http')
  const bodies: string[] = []
  const late = createServer((request, response) => {
    let body = ''
    request.setEncoding('latin1').on('data', (text: string) => (body += text)).on('end', () => response.end(String(bodies.push(body))))
  })
  await new Promise<void>((resolve) => late.listen(port, '127.0.0.1', resolve))
  t.equal(statusOf(await client.untilClosed()), 200)
  t.same(bodies, ['hello'])
  late.closeAllConnections()
  await new Promise((resolve) => late.close(resolve))
})

t.test('once more is once, and never when an answer had begun or a body was sent', async (t) => {
  const request = (method: string, fields = '', body = '') => (p: number): string => `${method} /a/${p}/ HTTP/1.1\r\nHost: x\r\n${fields}\r\n${body}`
  for (const [name, text, dies, wanted] of [
    ['every connection breaks', request('GET'), '', 2],
    ['the answer has begun', request('GET'), 'HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nha', 1],
    ['a key, but also a body', request('POST', 'Idempotency-Key: k\r\nContent-Length: 2\r\n', 'hi'), '', 1],
  ] as const) {
    let [warm, asked] = [true, 0]
    await using upstream = await startRaw((socket) => {
      socket.on('data', () => {
        if (warm) return void socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok')
        asked++
        if (dies === '') socket.destroy()
        else socket.end(dies)
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port).send(`GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\n\r\n`)
    await client.until((c) => c.received.endsWith('ok'))
    warm = false
    client.received = ''
    client.send(text(upstream.port))
    await client.until((c) => c.closed || c.ended || /\r\n\r\n./s.test(c.received))
    if (dies === '') t.equal(statusOf(client.received), 502, name)
    await new Promise((resolve) => setTimeout(resolve, 100))
    t.equal(asked, wanted, `${name}: asked ${asked} times`)
    client.close()
  }
})
