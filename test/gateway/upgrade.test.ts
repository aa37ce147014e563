/** WebSockets through the gateway: real ones with `ws`, and raw bytes where the bytes matter. */
import { createHash } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import { once } from 'node:events'
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { WebSocket, WebSocketServer } from 'ws'
import { ask, bodyOf, entry, eventually, RawClient, startGateway, startHttp, startRaw, statusOf } from './support.ts'

const handshake = (target: string, ...more: string[]): string =>
  `GET ${target} HTTP/1.1\r\n${['Host: x', 'Connection: Upgrade', 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==', ...more].join('\r\n')}\r\n\r\n`

async function startEcho(onHead: (request: IncomingMessage) => void = () => undefined) {
  const server = await startHttp((_request, response) => response.end('http'))
  const sockets = new WebSocketServer({ server: server.server, maxPayload: 0 })
  sockets.on('connection', (socket, request) => {
    onHead(request)
    socket.on('message', (data, binary) => socket.send(data, { binary }))
  })
  return server
}

/** A server that answers any head with a 101 and then hands the socket over. */
function startTunnel(head: string, onOpen: (socket: Socket, early: string, request: string) => void) {
  return startRaw((socket) => {
    let text = ''
    const read = (chunk: Buffer): void => {
      text += chunk.toString('latin1')
      const end = text.indexOf('\r\n\r\n')
      if (end === -1) return
      socket.off('data', read)
      socket.write(head)
      onOpen(socket, text.slice(end + 4), text.slice(0, end + 4))
    }
    socket.on('data', read)
  })
}
const switching = 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n'

t.test('messages of every size and kind come back, in all modes', async (t) => {
  await using upstream = await startEcho()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto', baseDomain: 'gw.test' })
  const blob = Buffer.alloc(5 << 20, 'abc')
  for (const [mode, url, headers] of [
    ['uri', `ws://127.0.0.1:${gateway.port}/a/${upstream.port}/ws?x=1`, {}],
    ['header', `ws://127.0.0.1:${gateway.port}/ws`, { 'OpenSandbox-Ingress-To': `a-${upstream.port}` }],
    ['wildcard', `ws://127.0.0.1:${gateway.port}/ws`, { Host: `a-${upstream.port}.gw.test` }],
  ] as const) {
    const socket = new WebSocket(url, { headers, maxPayload: 0 })
    await once(socket, 'open')
    for (const message of ['', 'hi', 'é'.repeat(40_000)]) {
      const back = once(socket, 'message')
      socket.send(message)
      t.equal(String((await back)[0]), message, `${mode}: text of ${message.length}`)
    }
    const back = once(socket, 'message')
    socket.send(blob)
    t.equal(createHash('sha256').update((await back)[0] as Buffer).digest('hex'), createHash('sha256').update(blob).digest('hex'), `${mode}: 5 MiB`)
    const pong = once(socket, 'pong')
    socket.ping('p')
    t.equal(String((await pong)[0]), 'p', `${mode}: pings go end to end`)
    const closed = once(socket, 'close')
    socket.close(4001, 'done')
    t.same(await closed.then(([code, reason]) => [code, String(reason)]), [4001, 'done'], `${mode}: close code and reason`)
  }
})

t.test('compression is between the two ends', async (t) => {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1', perMessageDeflate: true })
  await once(server, 'listening')
  server.on('connection', (socket) => socket.on('message', (data, isBinary) => socket.send(data, { binary: isBinary })))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const socket = new WebSocket(`ws://127.0.0.1:${gateway.port}/a/${(server.address() as { port: number }).port}/`, { perMessageDeflate: true })
  await once(socket, 'open')
  t.match(socket.extensions, 'permessage-deflate')
  const text = 'compressed '.repeat(100_000)
  socket.send(text)
  t.equal(String((await once(socket, 'message'))[0]), text)
  socket.terminate()
  await eventually(() => gateway.lines.length === 1, 'ended')
  t.ok(Number(/"bytes_out":(\d+)/.exec(gateway.lines[0] ?? '')?.[1]) < text.length / 10, 'it crossed compressed')
  server.close()
})

t.test('any spelling of an upgrade', async (t) => {
  await using upstream = await startEcho()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  for (const fields of ['Connection: keep-alive, Upgrade\r\nUpgrade: websocket', 'Connection: upgrade\r\nUpgrade: WebSocket', 'Connection: Upgrade\r\nConnection: keep-alive\r\nUpgrade: h2c, websocket', 'connection:UPGRADE\r\nupgrade:WEBSOCKET']) {
    const client = new RawClient(gateway.port)
    client.send(`GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\n${fields}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`)
    await client.until((c) => c.received.includes('\r\n\r\n'))
    t.equal(statusOf(client.received), 101, JSON.stringify(fields))
    t.match(client.received, /sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK\+xOo=/i)
    client.close()
  }
})

t.test('every end-to-end header, repeated ones apart, in the request and in the 101', async (t) => {
  let seen = ''
  const head = `${switching}Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-R: 1\r\nX-R: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n`
  await using upstream = await startTunnel(head, (socket, _early, request) => {
    seen = request
    socket.resume().on('end', () => socket.end())
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(handshake(`/a/${upstream.port}/ws/%2F..//x?`, 'Authorization: Bearer t', 'Cookie: c=1; d=2', 'X-R: 1', 'X-R: 2', 'Sec-WebSocket-Protocol: p1', 'Sec-WebSocket-Protocol: p2', 'Sec-WebSocket-Extensions: permessage-deflate', 'Origin: https://o', 'X-Execd-Access-Token: e', 'OpenSandbox-Secure-Access: s', 'Proxy-Authorization: no', 'X-Forwarded-For: 6.6.6.6', 'OpenSandbox-Ingress-To: a-1', 'OPEN-SANDBOX-INGRESS: a-1', 'Open-Sandbox-Api-Key: k', 'Sallyport-Access: sp1.x', 'Connection: X-Named', 'X-Named: 1'))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  t.match(seen, /^GET \/ws\/%2F\.\.\/\/x\? HTTP\/1\.1\r\n/, 'the raw target')
  for (const line of ['authorization: Bearer t', 'cookie: c=1; d=2', 'x-r: 1\r\nx-r: 2', 'sec-websocket-protocol: p1\r\nsec-websocket-protocol: p2', 'sec-websocket-extensions: permessage-deflate', 'origin: https://o', 'x-execd-access-token: e', 'x-forwarded-for: 127.0.0.1', 'x-forwarded-proto: http', `x-forwarded-prefix: /a/${upstream.port}`, `host: 127.0.0.1:${upstream.port}`, 'upgrade: websocket']) {
    t.ok(seen.toLowerCase().includes(line.toLowerCase()), line)
  }
  t.notMatch(seen, /secure-access|proxy-authorization|6\.6\.6\.6|ingress|api-key|sallyport|x-named/i)
  t.match(client.received, /Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-R: 1\r\nX-R: 2\r\n/)
  t.notMatch(client.received, /keep-alive|x-hop/i)
  client.close()
})

t.test('behind a proxy of ours an upgrade is told what that proxy said, and the Host if wanted', async (t) => {
  let seen = ''
  await using upstream = await startTunnel(`${switching}\r\n`, (socket, _early, request) => {
    seen = request
    socket.resume().on('end', () => socket.end())
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', trustedProxies: ['127.0.0.0/8'], preserveHost: true })
  const client = new RawClient(gateway.port)
  client.send(handshake(`/a/${upstream.port}/`, 'X-Forwarded-For: 6.6.6.6', 'X-Forwarded-Proto: https', 'X-Forwarded-Host: outer.example', 'X-Forwarded-Port: 8443', 'X-Forwarded-Prefix: /outer'))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  for (const line of ['host: x', 'x-forwarded-for: 6.6.6.6, 127.0.0.1', 'x-forwarded-proto: https', 'x-forwarded-host: outer.example', 'x-forwarded-port: 8443', `x-forwarded-prefix: /outer/a/${upstream.port}`]) t.ok(seen.toLowerCase().includes(`${line}\r\n`), line)
  client.close()
})

t.test('informational answers before a 101 and before a refusal', async (t) => {
  for (const final of [`${switching}\r\n`, 'HTTP/1.1 403 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n']) {
    await using upstream = await startTunnel(`HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n${final}`, (socket) => void socket.resume().on('end', () => socket.end()))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port)
    const answer = await client.send(handshake(`/a/${upstream.port}/`)).until((c) => c.received.split('\r\n\r\n').length > 2)
    t.match(answer, /^HTTP\/1\.1 103 Early Hints\r\nLink: <\/a\.css>\r\n\r\nHTTP\/1\.1 (101|403) /)
    client.close()
  }
})

t.test('cookies and references in the answer to a handshake are treated as in any other', async (t) => {
  const fields = 'Set-Cookie: wide=1; Domain=gw.test; Path=/\r\nSet-Cookie: own=1; Path=/app\r\nLocation: /login\r\n'
  for (const head of [`${switching}${fields}\r\n`, `HTTP/1.1 403 No\r\nConnection: close\r\n${fields}Content-Length: 0\r\n\r\n`]) {
    await using upstream = await startTunnel(head, (socket) => void socket.resume().on('end', () => socket.end()))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto', baseDomain: 'gw.test' })
    const { port } = upstream
    for (const [mode, text, wanted] of [
      ['wildcard', handshake('/').replace('Host: x', `Host: a-${port}.gw.test:${gateway.port}`), ['wide=1; Path=/', 'own=1; Path=/app', '/login']],
      // The host of such a request is nobody's own: other sandboxes are named by header there, and have hosts below it.
      ['header', handshake('/').replace('Host: x', 'Host: gw.test').replace('\r\nHost', `\r\nOpenSandbox-Ingress-To: a-${port}\r\nHost`), ['wide=1; Path=/', 'own=1; Path=/app', '/login']],
      ['uri', handshake(`/a/${port}/`), [`wide=1; Path=/a/${port}/`, `own=1; Path=/a/${port}/app`, `/a/${port}/login`]],
    ] as const) {
      const client = new RawClient(gateway.port)
      const answer = await client.send(text).until((c) => c.received.includes('\r\n\r\n'))
      const values = answer.split('\r\n').filter((line) => /^(set-cookie|location):/i.test(line)).map((line) => line.slice(line.indexOf(':') + 2))
      t.same(values, wanted, `${mode}: ${head.slice(9, 12)}`)
      client.close()
    }
  }
})

t.test('a refusal in a coding that is not undone here does not pass undeclared', async (t) => {
  for (const [coding, status] of [['chunked', 403], ['gzip, chunked', 503]] as const) {
    await using upstream = await startTunnel(`HTTP/1.1 403 No\r\nTransfer-Encoding: ${coding}\r\n\r\n5\r\nhello\r\n0\r\n\r\n`, (socket) => void socket.resume().on('end', () => socket.end()))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const answer = await ask(gateway.port, handshake(`/a/${upstream.port}/`))
    t.same([statusOf(answer), answer.includes('hello')], [status, status === 403], coding)
  }
})

t.test('bytes right behind either head are not lost', async (t) => {
  let early = ''
  await using upstream = await startTunnel(`${switching}\r\nfrom the sandbox`, (socket, text) => {
    early += text
    socket.on('data', (chunk: Buffer) => (early += chunk.toString('latin1'))).on('end', () => socket.end())
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(`${handshake(`/a/${upstream.port}/`)}from the client`)
  await client.until((c) => c.received.endsWith('\r\n\r\nfrom the sandbox'))
  await eventually(() => early === 'from the client', 'early bytes')
  t.equal(early, 'from the client')
  client.close()
})

t.test('each side may stop sending while the other goes on', async (t) => {
  let ended = false
  let finish: () => void = () => undefined
  await using upstream = await startTunnel(`${switching}\r\n`, (socket) => {
    socket.on('data', () => undefined)
    socket.on('end', () => {
      ended = true
      socket.write('after your end')
      finish = () => socket.end()
    })
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(handshake(`/a/${upstream.port}/`))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  client.send('last words')
  client.socket.end()
  await client.until((c) => c.received.endsWith('after your end'))
  t.ok(ended, 'the end of the client reached the sandbox')
  t.notOk(client.ended, 'and did not end the other direction')
  finish()
  await client.untilClosed()

  let heard = ''
  await using closer = await startTunnel(`${switching}\r\n`, (socket) => {
    socket.end('bye')
    socket.on('data', (chunk: Buffer) => (heard += chunk.toString('latin1')))
    socket.on('end', () => undefined)
  })
  const speaker = new RawClient(gateway.port)
  speaker.send(handshake(`/a/${closer.port}/`))
  await speaker.until((c) => c.ended)
  speaker.send('still here')
  await eventually(() => heard === 'still here', 'the direction that is still open')
  t.equal(heard, 'still here')
  speaker.close()
})

t.test('a side that vanishes takes the other with it', async (t) => {
  const opened: Socket[] = []
  await using upstream = await startTunnel(`${switching}\r\n`, (socket) => void opened.push(socket.resume().on('end', () => socket.end())))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  for (const who of ['client', 'sandbox'] as const) {
    const client = new RawClient(gateway.port)
    client.send(handshake(`/a/${upstream.port}/`))
    await client.until((c) => c.received.includes('\r\n\r\n'))
    const socket = opened.pop() as Socket
    const lost = once(socket, 'close')
    if (who === 'client') client.socket.resetAndDestroy()
    else socket.resetAndDestroy()
    await lost
    if (who === 'sandbox') await client.until((c) => c.closed || c.ended)
    t.equal(upstream.sockets.size, 0, `${who} vanished`)
  }
  await eventually(() => gateway.lines.length === 2, 'two access lines')
  t.match(gateway.lines[0], /"msg":"upgrade".*"status":101/)
})

t.test('a side that said its end and then vanishes takes the other with it, too', async (t) => {
  const opened: Socket[] = []
  await using upstream = await startTunnel(`${switching}\r\n`, (socket) => void opened.push(socket.resume()))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port).send(handshake(`/a/${upstream.port}/`))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  const socket = opened.pop() as Socket
  const said = once(socket, 'end')
  const lost = new Promise((resolve) => socket.once('close', resolve))
  client.socket.end()
  await said
  client.close()
  // A sandbox that goes on telling what nobody hears: the client's kernel answers with a reset.
  socket.on('error', () => undefined)
  const telling = setInterval(() => socket.writable && socket.write('more'), 20)
  t.ok(await Promise.race([lost.then(() => true), delay(5_000, false)]), 'the sandbox hears of it')
  clearInterval(telling)
  await eventually(() => gateway.lines.length === 1, 'the access line')
  t.equal((await gateway.gateway.metrics.registry.metrics()).match(/^sallyport_gateway_upgraded_connections (\d+)$/m)?.[1], '0')
})

t.test('a refusal of the sandbox is relayed as it is', async (t) => {
  await using upstream = await startRaw((socket) => {
    socket.once('data', () => socket.write('HTTP/1.1 403 Nope\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5\r\n\r\n5\r\nhello\r\n0\r\n\r\n'))
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  const answer = await client.send(handshake(`/a/${upstream.port}/`)).untilClosed()
  t.match(answer, /^HTTP\/1\.1 403 Nope\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n/)
  t.match(bodyOf(answer), /5\r\nhello\r\n0\r\n\r\n$/)
  client.close()

  await using broken = await startRaw((socket) => void socket.once('data', () => socket.end('HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello')))
  const cut = new RawClient(gateway.port)
  cut.send(handshake(`/a/${broken.port}/`))
  await cut.until((c) => c.closed || c.ended)
  t.ok(cut.reset, 'a refusal that breaks off is no whole one')
})

t.test('no sandbox behind the route: readable, and 503 for a failed dial', async (t) => {
  const gone = await startRaw(() => undefined)
  await gone[Symbol.asyncDispose]()
  await using silent = await startRaw((socket) => void socket.once('data', () => socket.destroy()))
  await using gateway = await startGateway([{ id: 'a' }, { id: 'sec', secureAccessToken: 'tok' }, { id: 'paused', state: 'Paused' }], { mode: 'uri' })
  for (const [target, status] of [[`/a/${gone.port}/`, 503], [`/a/${silent.port}/`, 503], ['/nobody/80/', 404], ['/sec/80/', 401], ['/paused/80/', 503], ['/a/x/', 400]] as const) {
    const client = new RawClient(gateway.port)
    const answer = await client.send(handshake(target)).untilClosed()
    t.equal(statusOf(answer), status, target)
    t.match(answer, /connection: close/i)
    client.close()
  }
  t.equal(bodyOf(await (async () => { const c = new RawClient(gateway.port); const a = await c.send(handshake(`/a/${gone.port}/`)).untilClosed(); c.close(); return a })()), 'Service Unavailable\n', "the original's text for a failed dial")
  await eventually(() => gateway.lines.length === 7, 'refused upgrades are logged, too')
})

t.test('a refused upgrade leaves no connection behind, even when the client stays', async (t) => {
  const gone = await startRaw(() => undefined)
  await gone[Symbol.asyncDispose]()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const clients = ['/nobody/80/', `/a/${gone.port}/`].map((target) => new RawClient(gateway.port).send(`${handshake(target)}and more`))
  for (const client of clients) await client.until((c) => c.ended)
  await eventually(() => gateway.lines.length === 2, 'both logged')
  const connections = async (): Promise<string | undefined> => /client_connections (\d+)/.exec(await gateway.gateway.metrics.registry.metrics())?.[1]
  let open = await connections()
  for (const until = Date.now() + 5_000; open !== '0' && Date.now() < until; open = await connections()) await new Promise((resolve) => setTimeout(resolve, 50))
  t.equal(open, '0')
  for (const client of clients) client.close()
})

t.test('a quiet WebSocket outlives the idle timeout', async (t) => {
  await using upstream = await startEcho()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', idleTimeout: 300 })
  const socket = new WebSocket(`ws://127.0.0.1:${gateway.port}/a/${upstream.port}/`)
  await once(socket, 'open')
  await new Promise((resolve) => setTimeout(resolve, 2_500))
  socket.send('still there')
  t.equal(String((await once(socket, 'message'))[0]), 'still there')
  socket.terminate()
})

t.test('at shutdown clients are told 1001 between two frames', async (t) => {
  await using upstream = await startEcho()
  const gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 3_000 })
  const socket = new WebSocket(`ws://127.0.0.1:${gateway.port}/a/${upstream.port}/`)
  await once(socket, 'open')
  const closed = once(socket, 'close')
  const closing = gateway.close()
  t.equal((await closed)[0], 1001)
  await closing
  t.equal(upstream.sockets.size, 0)

  let send: (bytes: Uint8Array) => void = () => undefined
  await using slow = await startTunnel(`${switching}\r\n`, (tunnel) => {
    tunnel.on('end', () => tunnel.end())
    send = (bytes) => void tunnel.write(bytes)
  })
  const second = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 3_000 })
  const client = new RawClient(second.port)
  client.send(handshake(`/a/${slow.port}/`))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  // Half of a five-byte text frame is under way.
  send(Uint8Array.of(0x81, 5, 0x68, 0x65))
  await client.until((c) => c.received.endsWith('he'))
  const ending = second.close()
  send(Uint8Array.of(0x6c, 0x6c, 0x6f, 0x81, 1, 0x78))
  await client.until((c) => c.received.endsWith('\x88\x02\x03\xe9'))
  t.ok(client.received.endsWith('\x81\x05hello\x88\x02\x03\xe9'), 'the frame under way is completed, nothing follows the 1001')
  client.socket.end()
  await ending
  client.close()
})

t.test('a sandbox that ends takes its tunnels with it', async (t) => {
  await using upstream = await startTunnel(`${switching}\r\n`, (socket) => void socket.resume().on('end', () => socket.end()))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  for (const change of [() => gateway.gateway.table.delete('a'), () => gateway.gateway.table.put(entry({ id: 'a', lifecycle: 'next' }))]) {
    gateway.gateway.table.put(entry({ id: 'a' }))
    const client = new RawClient(gateway.port)
    client.send(handshake(`/a/${upstream.port}/`))
    await client.until((c) => c.received.includes('\r\n\r\n'))
    change()
    await client.until((c) => c.closed || c.ended)
    await eventually(() => upstream.sockets.size === 0, 'the upstream side')
    t.equal(upstream.sockets.size, 0)
  }
})
