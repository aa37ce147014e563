/**
 * What a sandbox may say on the wire and node:http or undici read, but do not write: every answer gets its client an end, in order, and the
 * gateway goes on. Each row ends with a request to another sandbox.
 */
import { connect } from 'node:net'
import t from 'tap'
import { ask, bodyOf, eventually, get, RawClient, startGateway, startRaw, statusOf } from './support.ts'

const handshake = (port: number): string => `GET /a/${port}/ HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`
const length = 'Content-Length: 2\r\n\r\nno'
const broken = 502
/** What a failed handshake is answered with, as by the original. */
const unavailable = 503

const rows: [why: string, answer: string, get: number, upgrade: number][] = [
  ['a control character in the reason', `HTTP/1.1 403 No\x01pe\r\n${length}`, 403, unavailable],
  ['NUL in the reason', `HTTP/1.1 403 No\x00pe\r\n${length}`, 403, unavailable],
  ['DEL in the reason', `HTTP/1.1 403 No\x7fpe\r\n${length}`, 403, unavailable],
  ['a reason in Latin-1', `HTTP/1.1 404 Non trouv\xe9\r\n${length}`, 404, 404],
  ['a reason in UTF-8', `HTTP/1.1 404 ${Buffer.from('見つかりません').toString('latin1')}\r\n${length}`, 404, 404],
  ['a status below 100', `HTTP/1.1 099 X\r\n${length}`, broken, unavailable],
  ['status 0', `HTTP/1.1 000 X\r\n${length}`, broken, unavailable],
  ['a status nobody knows', `HTTP/1.1 999 X\r\n${length}`, 999, 999],
  ['101 without an upgrade', 'HTTP/1.1 101 X\r\nX-A: b\r\n\r\nabc', broken, unavailable],
  ['a hint in Latin-1 before it', `HTTP/1.1 103 Hi\r\nLink: </\xe9>\r\n\r\nHTTP/1.1 403 X\r\nX-L: \xe9\r\n${length}`, 403, 403],
  ['a hint with a strange reason before it', `HTTP/1.1 103 H\x7fi\r\nLink: </a>\r\n\r\nHTTP/1.1 403 X\r\n${length}`, 403, 403],
  ['a Trailer field with a length', `HTTP/1.1 403 X\r\nTrailer: x\r\n${length}`, 403, 403],
  ['names of an object', `HTTP/1.1 403 X\r\n__proto__: a\r\nconstructor: b\r\n${length}`, 403, 403],
  ['nothing at all', '', broken, unavailable],
]

t.test('whatever it says, the client gets an end and the gateway goes on', async (t) => {
  for (const [why, answer, ...wanted] of rows) {
    await using hostile = await startRaw((socket) => void socket.once('data', () => socket.end(answer, 'latin1')))
    await using honest = await startRaw((socket) => void socket.once('data', () => socket.end('HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok')))
    await using gateway = await startGateway([{ id: 'a' }, { id: 'b' }], { mode: 'uri', firstByteTimeout: 3_000 })
    for (const [nth, request] of [get(`/a/${hostile.port}/`), handshake(hostile.port)].entries()) {
      const client = new RawClient(gateway.port).send(request)
      const received = await client.untilClosed(6_000)
      client.close()
      const final = received.replace(/^HTTP\/1\.1 103 Early Hints\r\n[^]*?\r\n\r\n/, '')
      t.equal(statusOf(final), wanted[nth], `${why}, ${nth === 0 ? 'to a GET' : 'to an upgrade'}`)
      t.equal(bodyOf(final).length, Number(/^content-length: (\d+)\r$/im.exec(final)?.[1]), `${why}: one whole answer, and nothing behind it`)
      t.match(final.slice(0, final.indexOf('\r\n')), /^HTTP\/1\.1 \d{3} [\t\x20-\x7e\x80-\xff]*$/, `${why}: a status line that any client reads`)
      await eventually(() => gateway.lines.length === nth * 2 + 1, `${why}: its access line`)
      const other = new RawClient(gateway.port).send(get(`/b/${honest.port}/`))
      t.equal(statusOf(await other.untilClosed()), 200, `${why}: others are served`)
      other.close()
      await eventually(() => gateway.lines.length === nth * 2 + 2, 'and the other')
    }
  }
})

t.test('a refused handshake with a long answer arrives whole, also at a client that is slow', async (t) => {
  const size = 10_000_000
  await using upstream = await startRaw((socket) => void socket.once('data', () => socket.write(Buffer.concat([Buffer.from(`HTTP/1.1 403 X\r\nContent-Length: ${size}\r\n\r\n`), Buffer.alloc(size)]))))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const socket = connect(gateway.port, '127.0.0.1').pause()
  socket.write(handshake(upstream.port))
  await eventually(() => upstream.sockets.size === 1, 'it is refused')
  let got = 0
  let ended = false
  setTimeout(() => socket.on('data', (chunk: Buffer) => (got += chunk.length)).on('end', () => (ended = true)).resume(), 300)
  await eventually(() => ended, 'the end', 10_000)
  t.ok(got > size, `${got} bytes`)
  socket.destroy()
})

t.test('a sandbox that keeps its connections open keeps none of ours for long', async (t) => {
  const rows: [what: string, answer: string, request: (port: number) => string, ms: number][] = [
    ['a refused handshake', 'HTTP/1.1 403 No\r\nConnection: keep-alive\r\nKeep-Alive: timeout=600\r\nContent-Length: 0\r\n\r\n', handshake, 2_000],
    // As long as without the field, and the coarse clock of undici on top.
    ['an answer that promises ten minutes', 'HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=600\r\nContent-Length: 0\r\n\r\n', (port) => get(`/a/${port}/`), 10_000],
  ]
  await Promise.all(rows.map(async ([what, answer, request, ms]) => {
    await using upstream = await startRaw((socket) => void socket.on('data', () => socket.write(answer)).on('end', () => socket.end()))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    for (const client of [1, 2, 3].map(() => new RawClient(gateway.port).send(request(upstream.port)))) {
      t.match(await client.untilClosed(), /^HTTP\/1\.1 (403|200) /, what)
      client.close()
    }
    await eventually(() => upstream.sockets.size === 0, `${what}: all are closed`, ms)
  }))
})

t.test('a refusal that falls silent ends at the idle timeout', async (t) => {
  await using upstream = await startRaw((socket) => void socket.once('data', () => socket.write('HTTP/1.1 403 X\r\nContent-Length: 100\r\n\r\nhalf')))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', idleTimeout: 500 })
  const client = new RawClient(gateway.port).send(handshake(upstream.port))
  await client.until(({ received }) => received.endsWith('half'))
  await client.until(({ closed }) => closed, 5_000)
  t.ok(client.reset, 'and half of it does not look whole')
})

t.test('a body behind the answer to a HEAD is never read as the answer to the next request', async (t) => {
  const body = 'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted'
  await using upstream = await startRaw((socket) => {
    let owed = ''
    socket.on('end', () => socket.end()).on('data', (chunk: Buffer) => {
      const path = /^\S+ (\S+)/.exec(chunk.toString('latin1'))?.[1] as string
      // As where a handler for GET answers HEAD, and its body leaves a packet later than its head: here not before the next request has come.
      socket.write(chunk.toString('latin1', 0, 5) === 'HEAD ' ? `HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: ${body.length}\r\n\r\n` : `${owed}HTTP/1.1 200 OK\r\nContent-Length: ${path.length}\r\n\r\n${path}`)
      owed = chunk.toString('latin1', 0, 5) === 'HEAD ' ? body : ''
    })
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  // A connection that served before, and one that never did.
  for (const before of [[], ['/warm']]) {
    for (const path of before) t.equal(bodyOf(await ask(gateway.port, get(`/a/${upstream.port}${path}`))), path)
    t.equal(statusOf(await ask(gateway.port, get(`/a/${upstream.port}/file`).replace('GET', 'HEAD'))), 200)
    t.equal(bodyOf(await ask(gateway.port, get(`/a/${upstream.port}/victim`))), '/victim')
  }
})

t.test('hints without end are broken off, for a request and for a handshake', async (t) => {
  const hint = 'HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n'
  await using upstream = await startRaw((socket) => void socket.on('data', () => socket.write(hint.repeat(1000))))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  for (const [what, request, status] of [['a request', get(`/a/${upstream.port}/`), 502], ['a handshake', handshake(upstream.port), 503]] as const) {
    const client = new RawClient(gateway.port).send(request)
    await client.until(({ received }) => received.includes(` ${status} `))
    client.close()
    t.equal(client.received.split('103 Early').length - 1, 16, `${what}: sixteen pass`)
  }
})

/** One connection, several requests: the first answer is late, so that the others wait for their turn. */
t.test('what comes early for a request that waits for its turn stays in front of its own answer', async (t) => {
  const body = 'b'.repeat(20_000)
  await using upstream = await startRaw((socket) => void socket.on('data', (chunk: Buffer) => {
    const path = /^\S+ (\S+)/.exec(chunk.toString('latin1'))?.[1]
    if (path === '/slow') setTimeout(() => socket.write('HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst'), 200)
    if (path === '/hint') socket.write(`HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: ${body.length}\r\n\r\n${body}`)
    if (path === '/post') socket.write(`HTTP/1.1 413 Too Large\r\nContent-Length: ${body.length}\r\n\r\n${body}`)
    if (path === '/last') socket.write('HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast')
  }))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const request = (method: string, path: string, fields = ''): string => `${method} /a/${upstream.port}${path} HTTP/1.1\r\nHost: x\r\n${fields}\r\n`
  const last = request('GET', '/last', 'Connection: close\r\n')
  const sequences: [what: string, sent: string, interim: RegExp, status: number][] = [
    ['a hint', request('GET', '/hint'), /^HTTP\/1\.1 103 Early Hints\r\nlink: <\/a\.css>\r\n\r\n/i, 200],
    ['100 Continue', `${request('POST', '/post', 'Expect: 100-continue\r\nContent-Length: 5\r\n')}hello`, /^(HTTP\/1\.1 100 Continue\r\n\r\n)?/, 413],
  ]
  for (const [what, sent, interim, status] of sequences) {
    const client = new RawClient(gateway.port).send(request('GET', '/slow') + sent + last)
    const received = await client.untilClosed()
    client.close()
    const behind = received.slice(received.indexOf('first') + 5)
    t.match(behind, interim, what)
    const answer = behind.replace(interim, '')
    t.equal(statusOf(answer), status, `${what}: then its answer`)
    t.equal(answer.slice(answer.indexOf('\r\n\r\n') + 4).slice(0, body.length), body, `${what}: the body is the sandbox's, and nothing else`)
    t.notMatch(answer.slice(20), /HTTP\/1\.1 10/, `${what}: nothing comes late`)
  }
})

t.test('requests that wait for their turn end with their client, however it goes', async (t) => {
  const ends: [what: string, sent: string][] = [
    ['an upgrade behind them', handshake(80)], ['a CONNECT behind them', 'CONNECT a:80 HTTP/1.1\r\nhost: x\r\n\r\n'], ['nonsense behind them', 'nonsense\r\n\r\n'], ['the client leaves', ''],
  ]
  for (const [what, sent] of ends) {
    await using mute = await startRaw((socket) => void socket.resume().on('end', () => socket.end()))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 200 })
    const client = new RawClient(gateway.port).send([1, 2, 3].map((n) => `GET /a/${mute.port}/${n} HTTP/1.1\r\nhost: x\r\n\r\n`).join(''))
    await eventually(() => mute.sockets.size === 3, 'three at the sandbox')
    if (sent === '') client.close()
    else client.send(sent)
    await eventually(() => mute.sockets.size === 0, `${what}: the sandbox is let go`)
    const paths = gateway.lines.map((line) => (JSON.parse(line) as { path?: string }).path).filter((path) => /^\/\d$/.test(path ?? ''))
    t.same(paths.sort(), ['/1', '/2', '/3'], `${what}: a line for each`)
    const metrics = await gateway.gateway.metrics.registry.metrics()
    t.match(metrics, /sallyport_gateway_requests_in_flight 0/, what)
    client.close()
  }
})
