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
  // At once: the gateway learns of both in one go, which a libuv before 1.52 takes for a regular end.
  for (const wait of [50, 0]) {
    await using upstream = await startRaw((socket) => {
      socket.once('data', () => {
        socket.write('HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello')
        if (wait === 0) socket.resetAndDestroy()
        else setTimeout(() => socket.resetAndDestroy(), wait)
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port)
    client.send(get(`/a/${upstream.port}/`))
    await client.until((c) => c.closed || c.ended)
    t.match(client.received, 'hello', `after ${wait} ms`)
    t.notOk(client.received.endsWith('0\r\n\r\n'), `after ${wait} ms: no last chunk`)
  }
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

t.test('an HTTP/1.0 client never sees a regular end in the middle of an answer, whatever ends its connection', async (t) => {
  const ways: [string, (client: RawClient, port: number) => void][] = [
    ['half-closed', (client) => void client.socket.end()],
    ['bytes that are no request', (client) => client.send('\0\0\r\n\r\n')],
    ['a handshake behind it', (client) => client.send('GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n')],
    ['far too many requests behind it', (client) => client.send('GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n'.repeat(80))],
    ['an answer behind it that its sandbox breaks off', (client, port) => client.send(`GET /a/${port}/breaks HTTP/1.1\r\nHost: x\r\n\r\n`)],
  ]
  for (const framing of ['connection: close', 'transfer-encoding: chunked']) {
    for (const [name, giveUp] of ways) {
      const gone: Promise<void>[] = []
      await using upstream = await startRaw((socket) => {
        gone.push(new Promise((resolve) => socket.once('close', () => resolve())))
        socket.on('end', () => socket.end())
        socket.once('data', (head) => {
          socket.write(`HTTP/1.1 200 OK\r\n${framing}\r\n\r\n${framing.startsWith('t') ? '5\r\nhello\r\n' : 'hello'}`)
          if (head.includes('/breaks')) setTimeout(() => socket.resetAndDestroy(), 30)
        })
      })
      await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
      const client = new RawClient(gateway.port)
      client.send(`GET /a/${upstream.port}/ HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n`)
      await client.until((c) => c.received.includes('hello'))
      giveUp(client, upstream.port)
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
