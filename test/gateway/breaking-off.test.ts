/** One side ends early, late, or not as HTTP says: what the other side sees. Against real servers on loopback. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import type { RouteTable } from '../../gateway/routes.ts'
import { ask, entry, eventually, get, RawClient, startGateway, startHttp, startRaw, statusOf, type TestGateway } from './support.ts'

t.test('a sandbox that breaks off never looks like a regular end', async (t) => {
  const heads: [string, string, string][] = [
    ['chunked', 'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n', '1.1'],
    ['length', 'HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello', '1.1'],
    ['chunked to HTTP/1.0', 'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n', '1.0'],
  ]
  for (const [name, text, version] of heads) {
    for (const how of ['end', 'reset'] as const) {
      await using upstream = await startRaw((socket) => {
        socket.once('data', () => {
          socket.write(text)
          setTimeout(() => (how === 'end' ? socket.destroy() : socket.resetAndDestroy()), 50)
        })
      })
      await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
      const client = new RawClient(gateway.port)
      client.send(`GET /a/${upstream.port}/ HTTP/${version}\r\nHost: x\r\n\r\n`)
      await client.until((c) => c.closed || c.ended)
      t.notOk(client.received.endsWith('0\r\n\r\n'), `${name}, ${how}: no last chunk`)
      if (version === '1.0') t.ok(client.reset, `${name}, ${how}: where the end of the connection is the end of the body, it is a reset`)
      await eventually(() => gateway.lines.length === 1, 'the access line')
      t.match(gateway.lines[0], /"code":"EDGE_UPSTREAM_BROKEN"/)
    }
  }
})

t.test('a reset ends a response without a length as what it is', async (t) => {
  await using upstream = await startRaw((socket) => {
    socket.once('data', () => {
      socket.write('HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello')
      setTimeout(() => socket.resetAndDestroy(), 50)
    })
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(get(`/a/${upstream.port}/`))
  await client.until((c) => c.closed || c.ended)
  t.match(client.received, 'hello')
  t.notOk(client.received.endsWith('0\r\n\r\n'), 'no last chunk')
})

t.test('a sandbox whose life ends in the middle of an answer never looks like a regular end either', async (t) => {
  const ways: [string, (table: RouteTable) => void][] = [
    ['deleted', (table) => table.delete('a')],
    ['born again', (table) => table.put(entry({ id: 'a', lifecycle: '2' }))],
    ['terminated', (table) => table.put(entry({ id: 'a', state: 'Terminated' }))],
    ['deleted, and the client gone in the same turn', (table) => table.delete('a')],
  ]
  for (const framing of ['connection: close', 'transfer-encoding: chunked', 'content-length: 50']) {
    for (const version of ['1.1', '1.0']) {
      for (const [name, end] of ways) {
        await using upstream = await startRaw((socket) => {
          socket.on('end', () => socket.end())
          socket.once('data', () => socket.write(`HTTP/1.1 200 OK\r\n${framing}\r\n\r\n${framing.startsWith('t') ? '5\r\nhello\r\n' : 'hello'}`))
        })
        await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
        const client = new RawClient(gateway.port)
        client.send(`GET /a/${upstream.port}/ HTTP/${version}\r\nHost: x\r\n\r\n`)
        await client.until((c) => c.received.includes('hello'))
        end(gateway.gateway.table)
        if (name.includes('client')) ownSide(client).destroy()
        await client.untilClosed()
        t.notOk(client.received.endsWith('0\r\n\r\n'), `${framing}, ${version}, ${name}: no last chunk`)
        await eventually(() => gateway.lines.length === 1, 'the access line')
        if (name.includes('client')) continue
        if (version === '1.0' && !framing.startsWith('content-length')) t.ok(client.reset, `${framing}, ${version}, ${name}: a reset`)
        t.match(gateway.lines[0], /"code":"EDGE_UPSTREAM_BROKEN"/)
      }
    }
  }
})

/** The gateway's socket of a connection, which is in this process, too. */
function ownSide(client: RawClient): Socket {
  const handles = (process as unknown as { _getActiveHandles(): Partial<Socket>[] })._getActiveHandles()
  return handles.find(({ localPort, remotePort }) => localPort === client.socket.remotePort && remotePort === client.socket.localPort) as Socket
}

t.test('the last of an answer that waits for a slow client is never cut off in order', async (t) => {
  const ways: [string, version: string, (client: RawClient, gateway: TestGateway) => Promise<unknown> | undefined, 'whole' | 'reset'][] = [
    ['the gateway goes, and has time', '1.0', (_client, { gateway }) => gateway.close(), 'whole'],
    ['the gateway goes, and has time', '1.1', (_client, { gateway }) => gateway.close(), 'whole'],
    ['the client says its end', '1.0', (client) => void client.socket.end(), 'whole'],
    ['the client sends bytes that are no request', '1.0', (client) => void client.send('\0\0\r\n\r\n'), 'reset'],
  ]
  for (const [name, version, act, outcome] of ways) {
    let sandbox: Socket | null = null
    await using upstream = await startRaw((socket) => {
      sandbox = socket
      socket.on('end', () => socket.end())
      socket.once('data', () => socket.write('HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n'))
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 10_000 })
    const client = new RawClient(gateway.port)
    client.send(`GET /a/${upstream.port}/ HTTP/${version}\r\nHost: x\r\n\r\n`)
    await client.until((c) => c.received.includes('\r\n\r\n'))
    client.socket.pause()
    let size = 0
    while (ownSide(client).writableLength === 0) {
      size += 30_000
      ;(sandbox as Socket | null)?.write('y'.repeat(30_000))
      await delay(2)
    }
    ;(sandbox as Socket | null)?.end()
    await delay(100)
    const done = act(client, gateway)
    await delay(100)
    client.socket.resume()
    await client.untilClosed(10_000)
    const got = client.received.match(/y/g)?.length ?? 0
    if (outcome === 'whole') t.same([got, client.reset], [size, false], `${name}, ${version}: all of it`)
    else t.ok(client.reset, `${name}, ${version}: a reset`)
    await done
  }
})

t.test('an HTTP/1.0 client that gives up its side in the middle of an answer never sees a regular end', async (t) => {
  const ways: [string, (client: RawClient) => void][] = [
    ['half-closed', (client) => void client.socket.end()],
    ['bytes that are no request', (client) => client.send('\0\0\r\n\r\n')],
    ['a handshake behind it', (client) => client.send('GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n')],
    ['far too many requests behind it', (client) => client.send('GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n'.repeat(80))],
  ]
  for (const framing of ['connection: close', 'transfer-encoding: chunked']) {
    for (const [name, giveUp] of ways) {
      const gone: Promise<void>[] = []
      await using upstream = await startRaw((socket) => {
        gone.push(new Promise((resolve) => socket.once('close', () => resolve())))
        socket.on('end', () => socket.end())
        socket.once('data', () => socket.write(`HTTP/1.1 200 OK\r\n${framing}\r\n\r\n${framing.startsWith('t') ? '5\r\nhello\r\n' : 'hello'}`))
      })
      await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
      const client = new RawClient(gateway.port)
      client.send(`GET /a/${upstream.port}/ HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n`)
      await client.until((c) => c.received.includes('hello'))
      giveUp(client)
      await client.until((c) => c.closed || c.ended)
      t.ok(client.reset, `${framing}, ${name}: a reset`)
      t.notOk(client.ended, `${framing}, ${name}: no end`)
      await Promise.all(gone)
    }
  }
})

t.test('a client that leaves cancels the request, in every phase', async (t) => {
  for (const phase of ['before the answer', 'during the answer', 'during the upload'] as const) {
    const gone: Promise<void>[] = []
    let reached: (socket: Socket) => void = () => undefined
    const arrived = new Promise<Socket>((resolve) => (reached = resolve))
    await using upstream = await startRaw((socket) => {
      gone.push(new Promise((resolve) => socket.once('close', () => resolve())))
      socket.on('end', () => socket.end())
      socket.once('data', () => {
        if (phase === 'during the answer') socket.write('HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n')
        reached(socket)
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port)
    client.send(phase === 'during the upload' ? `POST /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello` : get(`/a/${upstream.port}/`))
    await arrived
    if (phase === 'during the answer') await client.until((c) => c.received.includes('hello'))
    client.close()
    await Promise.all(gone)
    await eventually(() => gateway.lines.length === 1, 'the access line')
    t.match(gateway.lines[0], phase === 'during the answer' ? /"status":200/ : /"status":0/, phase)
  }
})

t.test('a malformed body never puts an error text into an answer under way', async (t) => {
  await using upstream = await startHttp((_request, response) => {
    response.writeHead(200, { 'content-length': 1000 })
    response.write('begun')
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(`POST /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n`)
  await client.until((c) => c.received.endsWith('begun'))
  client.send('nonsense\r\n')
  t.ok((await client.untilClosed()).endsWith('begun'), 'the connection ends, and nothing else')
  client.close()
})

t.test('an answer before the end of the upload reaches the client', async (t) => {
  await using upstream = await startHttp((_request, response) => {
    response.writeHead(413, { 'content-length': 7, connection: 'close' })
    response.end('too big')
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(`POST /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n${'x'.repeat(100_000)}`)
  t.match(await client.until((c) => c.received.includes('too big')), /^HTTP\/1\.1 413/)
  client.close()
})

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
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', bootGrace: 3_000 })
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
  // More than 2 s of its grace are left.
  t.ok(Date.now() - gone < 1_000, `at once: after ${Date.now() - gone} ms`)
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

t.test('a sandbox that speaks no HTTP, or breaks its rules, is a 502', async (t) => {
  for (const [name, text] of [
    ['noise', 'SSH-2.0-OpenSSH\r\n'],
    ['two lengths', 'HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx'],
    ['length and chunks', 'HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n'],
    ['bad name', 'HTTP/1.1 200 OK\r\nbad name: 1\r\ncontent-length: 0\r\n\r\n'],
    ['unasked upgrade', 'HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n'],
    ['nothing', ''],
    ['an endless head', `HTTP/1.1 200 OK\r\n${'x: y\r\n'.repeat(100_000)}`],
  ] as const) {
    await using upstream = await startRaw((socket) => void socket.once('data', () => socket.end(text)))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    t.equal(statusOf(await ask(gateway.port, get(`/a/${upstream.port}/`))), 502, name)
    await eventually(() => gateway.lines.length === 1, 'the access line')
    t.match(gateway.lines[0], /"code":"EDGE_UPSTREAM_BROKEN"/, name)
  }
})

t.test('a sandbox that closes right behind its answer cuts nothing off for a slow client', async (t) => {
  // The gateway's own socket to the client: how much of an answer waits there.
  let toClient: Socket | null = null
  const onRequest = (message: unknown): void => void (toClient = (message as { socket: Socket }).socket)
  subscribe('http.server.request.start', onRequest)
  t.teardown(() => unsubscribe('http.server.request.start', onRequest))
  const waiting = (): number => toClient?.writableLength ?? 0

  /** The client reads nothing until `sends` is over. @returns bytes of the body that it got in the end */
  const deliver = async (length: number, sends: (socket: Socket) => Promise<void>): Promise<number> => {
    let sent: (problem?: Error) => void = () => undefined
    const over = new Promise<void>((resolve, reject) => (sent = (problem) => (problem === undefined ? resolve() : reject(problem))))
    await using upstream = await startRaw((socket) => {
      socket.setNoDelay(true)
      socket.once('data', () => {
        socket.write(`HTTP/1.1 200 OK\r\ncontent-length: ${length}\r\n\r\n`)
        sends(socket).then(() => sent(), sent)
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port)
    client.socket.pause()
    client.send(get(`/a/${upstream.port}/`))
    await over
    client.socket.resume()
    await client.untilClosed()
    const body = client.received.length - client.received.indexOf('\r\n\r\n') - 4
    client.close()
    return body
  }
  const step = 10_000
  // What the kernel holds for the client, and how much waits in the gateway then, has to be found out first.
  let base = 0
  await deliver(1e9, async (socket) => {
    for (; waiting() < 75_000 && base < 1e8; base += step) {
      socket.write(Buffer.alloc(step))
      await delay(1)
    }
    socket.destroy()
  })
  let paused = 0
  for (const piece of [60_000, 75_000, 90_000, 60_000, 75_000, 90_000]) {
    const length = base + piece
    const got = await deliver(length, async (socket) => {
      for (let at = 0; at < base; at += step) {
        socket.write(Buffer.alloc(step))
        await delay(1)
      }
      await delay(10)
      socket.write(Buffer.alloc(piece))
      await delay(20)
      if (waiting() >= 128 * 1024) paused++
      // Without a word about it before, as where a keep-alive time runs out.
      socket.end()
      await delay(50)
    })
    t.equal(got, length, `the last ${piece} bytes in one piece`)
  }
  t.ok(paused > 0, `${paused} answers ended while the client had to catch up`)
})
