/** What an operator relies on: health, faults, time limits, access lines, draining. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { IncomingMessage, Server } from 'node:http'
import { connect, type AddressInfo, type Socket } from 'node:net'
import t from 'tap'
import { openAdmin } from '../../gateway/admin.ts'
import { metricsType } from '../../gateway/metrics.ts'
import { ask, bodyOf, eventually, get, RawClient, startGateway, startHttp, startRaw, statusOf, type TestGateway } from './support.ts'

t.test('/status.ok for everybody, /readyz where no sandbox is named', async (t) => {
  await using upstream = await startHttp((request, response) => response.end(`app ${request.url}`))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'header' })
  for (const request of [get('/status.ok'), get('/status.ok?x'), get('/status.ok', `OpenSandbox-Ingress-To: a-${upstream.port}`), get('/status.ok').replace('GET', 'POST')]) {
    const answer = await ask(gateway.port, request)
    t.equal(statusOf(answer), 200)
    t.equal(bodyOf(answer), 'OK')
  }
  t.equal(bodyOf(await ask(gateway.port, get('/status.ok/', `OpenSandbox-Ingress-To: a-${upstream.port}`))), 'app /status.ok/', 'only the exact path')
  t.equal(bodyOf(await ask(gateway.port, get('/readyz'))), 'OK')
  t.equal(bodyOf(await ask(gateway.port, get('/readyz', `OpenSandbox-Ingress-To: a-${upstream.port}`))), 'app /readyz', "a sandbox's own /readyz is its own")
  t.match(await ask(gateway.port, 'OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'), /^HTTP\/1\.1 200/)
})

t.test('stale routes refuse new requests', async (t) => {
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  gateway.gateway.table.alive(-120_000)
  const answer = await ask(gateway.port, get('/a/80/'))
  t.equal(statusOf(answer), 503)
  t.match(answer, /retry-after: 5/i)
  t.equal(statusOf(await ask(gateway.port, get('/nobody/80/'))), 503, 'an unknown sandbox may only be unknown to us')
  t.equal(statusOf(await ask(gateway.port, get('/readyz'))), 503)
  t.equal(statusOf(await ask(gateway.port, get('/status.ok'))), 200, 'alive all the same')
})

t.test('/readyz of the admin listener says why nobody should ask', async (t) => {
  const gateway = await startGateway([], { mode: 'uri' })
  const { metrics, table, unready } = gateway.gateway
  const admin = await openAdmin({ contentType: metricsType, metrics: () => metrics.registry.metrics(), unready: async () => unready() }, 0, '127.0.0.1', (error) => t.fail(String(error)))
  t.teardown(() => admin.close())
  const rows: [when: string, change: () => void, status: number, text: string][] = [
    ['at work', () => undefined, 200, 'OK'],
    ['no word from the provider', () => table.alive(-120_000), 503, 'routes are stale\n'],
    ['it is heard again', () => table.alive(Infinity), 200, 'OK'],
    ['shutdown', () => void gateway.close(), 503, 'draining\n'],
  ]
  for (const [when, change, status, text] of rows) {
    change()
    const answer = await ask((admin.address() as AddressInfo).port, get('/readyz'))
    t.same([statusOf(answer), bodyOf(answer)], [status, text], when)
  }
  await gateway.close()
})

t.test('faults in three forms', async (t) => {
  await using gateway = await startGateway([{ id: 'p', state: 'Pausing' }], { mode: 'uri' })
  const rows: [string, number, string, string][] = [
    ['/nobody/80/', 404, 'EDGE_NO_ROUTE', 'sandbox not found: nobody'],
    ['/p/80/', 503, 'EDGE_NOT_READY', 'sandbox not ready: p'],
    ['/p/0/', 400, 'EDGE_BAD_ROUTE', 'invalid ingress route: invalid port format: invalid port "0"'],
    ['/x', 400, 'EDGE_BAD_ROUTE', "invalid ingress route: invalid URI path format: expected '/<sandbox-id>/<sandbox-port>/<path-to-request>', got: /x"],
    ['/<script>alert(1)/80/', 404, 'EDGE_NO_ROUTE', 'sandbox not found: '],
  ]
  for (const [target, status, code, text] of rows) {
    const plain = await ask(gateway.port, get(target))
    t.equal(statusOf(plain), status, target)
    t.match(plain, /content-type: text\/plain; charset=utf-8\r\n/i)
    t.match(plain, /x-content-type-options: nosniff/i)
    t.ok(bodyOf(plain).startsWith(`OpenSandbox Ingress: ${text}`), bodyOf(plain))
    const json = await ask(gateway.port, get(target, 'Accept: application/json'))
    const body = JSON.parse(bodyOf(json)) as { code: string; message: string; next: string; request_id: string }
    t.equal(body.code, code)
    t.ok(body.message.startsWith(text))
    t.not(body.next, '')
    t.match(json, new RegExp(`x-request-id: ${body.request_id}`, 'i'))
    const page = await ask(gateway.port, get(target, 'Accept: text/html,application/xhtml+xml,*/*'))
    t.match(page, /content-type: text\/html/i)
    t.match(bodyOf(page), `<code>${code}</code>`)
    t.notMatch(bodyOf(page), /(src|href)="(?!data:)|url\(/, 'the page fetches nothing')
    t.notOk(bodyOf(page).includes('<script>'), 'nothing of the request becomes markup')
    t.equal(bodyOf(await ask(gateway.port, get(target).replace('GET', 'HEAD'))), '')
    t.equal((await ask(gateway.port, get(target))).includes('retry-after'), status === 503)
  }
  await eventually(() => gateway.lines.length === 25, 'refused requests are logged')
  t.match(gateway.lines[0], /"status":404,"code":"EDGE_NO_ROUTE"/)
})

t.test('bytes that never became a request are logged and counted, too', async (t) => {
  await using gateway = await startGateway([], { mode: 'uri' })
  t.equal(statusOf(await ask(gateway.port, 'nonsense\r\n\r\n')), 400)
  t.equal(statusOf(await ask(gateway.port, get('/', `X: ${'y'.repeat(70_000)}`))), 431)
  t.same(gateway.lines.map((line) => (JSON.parse(line) as { code: string }).code), ['EDGE_BAD_REQUEST', 'EDGE_HEADERS_TOO_LARGE'])
  t.match(await gateway.gateway.metrics.registry.metrics(), /sallyport_gateway_refused_count\{code="EDGE_HEADERS_TOO_LARGE"\} 1/)
})

t.test('the access line is JSON, whatever the request holds', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('hello'))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  await ask(gateway.port, get(`/a/${upstream.port}/p"\\q?token=secret`, 'X-Request-Id: mine-1'))
  await ask(gateway.port, get(`/a/${upstream.port}/`, 'X-Request-Id: bad"id'))
  await eventually(() => gateway.lines.length === 2, 'lines')
  const [first, second] = gateway.lines.map((line) => JSON.parse(line) as Record<string, unknown>)
  t.match(first, { msg: 'request', request_id: 'mine-1', client: '127.0.0.1', method: 'GET', sandbox_id: 'a', port: upstream.port, path: '/p"\\q', status: 200, bytes_out: 5, code: '' })
  t.notOk(gateway.lines[0]?.includes('secret'), 'no query')
  t.match(second?.['request_id'], /^[0-9a-f]{12}-/, 'an odd request id is replaced')
})

t.test('the access line says when, and how many bytes of body went each way', async (t) => {
  await using upstream = await startHttp((request, response) => void request.resume().on('end', () => response.end(request.method === 'HEAD' ? undefined : 'answer')))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const target = `/a/${upstream.port}/`
  const post = (field: string, body: string): string => get(target, field).replace('GET', 'POST') + body
  const rows: [what: string, request: string, bytesIn: number, bytesOut: number][] = [
    ['no body', get(target), 0, 6],
    ['a length', post('Content-Length: 4', 'four'), 4, 6],
    ['chunks, without their framing', post('Transfer-Encoding: chunked', '3\r\none\r\n5\r\nthree\r\n0\r\n\r\n'), 8, 6],
    ['no answer to see', get(target).replace('GET', 'HEAD'), 0, 0],
  ]
  for (const [n, [what, request, bytesIn, bytesOut]] of rows.entries()) {
    const before = Date.now()
    await ask(gateway.port, request)
    await eventually(() => gateway.lines.length > n, `${what}: logged`)
    const line = JSON.parse(gateway.lines[n] as string) as { level: string; ts: string; bytes_in: number; bytes_out: number }
    t.match(line, { level: 'info', bytes_in: bytesIn, bytes_out: bytesOut }, what)
    t.match(line.ts, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/, `${what}: RFC 3339`)
    t.ok(Date.parse(line.ts) >= before && Date.parse(line.ts) <= Date.now(), `${what}: ${line.ts} is now`)
  }
})

type Line = { msg: string; request_id: string; path: string; status: number; code: string; duration_us: number; locate_us: number; dial_us: number; first_byte_us: number }
const linesOf = ({ lines }: TestGateway): Line[] => lines.map((line) => JSON.parse(line) as Line)

t.test('the access line says where the time went', async (t) => {
  // A timer may be a little early, and a request may always be late: nothing here is held to an upper limit.
  const [before, within] = [50, 100]
  const atLeast = (ms: number): number => (ms - 5) * 1_000
  let finish: () => void = () => undefined
  await using upstream = await startHttp((request, response) => {
    if (request.url === '/at-once') return void response.end('whole')
    setTimeout(() => response.write('half'), before)
    finish = () => void response.end('whole')
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port).send(get(`/a/${upstream.port}/slow`))
  await client.until(({ received }) => received.includes('half'))
  setTimeout(finish, within)
  await client.untilClosed()
  client.close()
  for (const target of [`/a/${upstream.port}/at-once`, '/nobody/80/refused']) await ask(gateway.port, get(target))
  await eventually(() => gateway.lines.length === 3, 'a line at the end of each')
  const [slow, atOnce, refused] = linesOf(gateway) as [Line, Line, Line]
  t.ok(slow.first_byte_us >= atLeast(before), `it waited for the answer: ${slow.first_byte_us}`)
  t.ok(slow.duration_us >= slow.first_byte_us + atLeast(within), `and then for the rest of it, which is no stage: ${slow.duration_us}`)
  for (const line of [slow, atOnce]) {
    t.ok(line.locate_us > 0 && line.dial_us > 0 && line.first_byte_us > 0, `${line.path}: each stage takes a time`)
    // Each of the four is rounded.
    t.ok(line.locate_us + line.dial_us + line.first_byte_us <= line.duration_us + 2, `${line.path}: and they follow each other`)
  }
  t.match(refused, { dial_us: 0, first_byte_us: 0 }, 'a stage that was not reached took none')
  t.ok(refused.duration_us > 0)
})

t.test('one line per request, with the id that the sandbox and the client got', async (t) => {
  const seen = new Map<string, string>()
  await using upstream = await startHttp((request, response) => {
    seen.set(request.url as string, request.headers['x-request-id'] as string)
    if (request.url === '/cut') return void response.write('half', () => response.destroy())
    response.end('ok')
  })
  upstream.server.on('upgrade', (request: IncomingMessage, socket: Socket) => {
    seen.set(request.url as string, request.headers['x-request-id'] as string)
    socket.end(request.url === '/no' ? 'HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno' : 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n')
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const own = (path: string): string => `/a/${upstream.port}${path}`
  const upgrade = (target: string): string => get(target, 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==').replace('Connection: close', 'Connection: Upgrade')
  const rows: [what: string, request: string, line: [msg: string, status: number, code: string], reaches?: string][] = [
    ['an answer', get(own('/1')), ['request', 200, ''], '/1'],
    ['the next', get(own('/2')), ['request', 200, ''], '/2'],
    ['half an answer', get(own('/cut')), ['request', 200, 'EDGE_UPSTREAM_BROKEN'], '/cut'],
    ['an upgrade, when it is over', upgrade(own('/yes')), ['upgrade', 101, ''], '/yes'],
    ['an upgrade that the sandbox refuses', upgrade(own('/no')), ['request', 403, ''], '/no'],
    ['one that the gateway refuses', upgrade('/nobody/80/'), ['request', 404, 'EDGE_NO_ROUTE']],
    ['a refusal', get('/nobody/80/'), ['request', 404, 'EDGE_NO_ROUTE']],
    ['no version of ours', get('/').replace('HTTP/1.1', 'HTTP/2.0'), ['request', 400, 'EDGE_BAD_REQUEST']],
    ['CONNECT', get('a:80').replace('GET', 'CONNECT'), ['request', 405, 'EDGE_METHOD_NOT_ALLOWED']],
    ['the gateway’s own answers', get('/status.ok'), ['request', 200, '']],
    ['and again', get('/readyz'), ['request', 200, '']],
  ]
  const ids = new Set<string>()
  for (const [what, request, [msg, status, code], reaches] of rows) {
    const before = gateway.lines.length
    const client = new RawClient(gateway.port, false).send(request)
    const answer = await client.untilClosed()
    client.close()
    await eventually(() => gateway.lines.length > before, `${what}: logged`)
    const line = linesOf(gateway).at(-1) as Line
    t.match(line, { msg, status, code }, what)
    if (reaches !== undefined) t.equal(seen.get(reaches), line.request_id, `${what}: the sandbox has the id`)
    else if (code !== '') t.match(answer, `x-request-id: ${line.request_id}\r\n`, `${what}: the client has the id`)
    ids.add(line.request_id)
  }
  t.equal(gateway.lines.length, rows.length, 'and no other lines')
  t.equal(ids.size, rows.length, 'no id twice')
  for (const id of ids) t.match(id, /^[0-9a-f]{12}-[0-9a-z]+$/)
})

t.test('an upload may take as long as it wants', async (t) => {
  const limits: number[] = []
  await using gateway = await startGateway([], { mode: 'uri' })
  // Node's own limit is five minutes for a whole request, however steadily its bytes come; nobody wants to wait for that here.
  const onRequest = (message: unknown): void => {
    const { server } = message as { server: Server }
    if ((server.address() as AddressInfo).port === gateway.port) limits.push(server.requestTimeout)
  }
  subscribe('http.server.request.start', onRequest)
  t.teardown(() => unsubscribe('http.server.request.start', onRequest))
  await ask(gateway.port, get('/status.ok'))
  t.same(limits, [0], 'a whole request has no limit')
})

t.test('a time limit of 0 is none', async (t) => {
  // Limits are looked after once a second.
  const quiet = 2_500
  await using upstream = await startHttp((request, response) => {
    if (request.url === '/stops') response.write('half ')
    setTimeout(() => response.end('whole'), quiet)
  })
  upstream.server.on('upgrade', (request: IncomingMessage, socket: Socket) => {
    const refuses = request.url === '/no'
    if (refuses) socket.write('HTTP/1.1 403 No\r\nContent-Length: 10\r\n\r\nhalf ')
    setTimeout(() => socket.end(refuses ? 'whole' : 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'), quiet)
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', firstByteTimeout: 0, idleTimeout: 0 })
  const target = `/a/${upstream.port}`
  const upgrade = (path: string): string => get(target + path, 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==').replace('Connection: close', 'Connection: Upgrade')
  const rows: [why: string, request: string, answer: RegExp][] = [
    ['until it begins to answer', get(`${target}/late`), /^HTTP\/1\.1 200 [\s\S]*whole/],
    ['between two pieces of an answer', get(`${target}/stops`), /^HTTP\/1\.1 200 [\s\S]*half [\s\S]*whole/],
    ['until it upgrades', upgrade('/'), /^HTTP\/1\.1 101 /],
    ['between two pieces of a refused upgrade', upgrade('/no'), /^HTTP\/1\.1 403 [\s\S]*half whole$/],
  ]
  await Promise.all(rows.map(async ([why, request, answer]) => t.match(await ask(gateway.port, request), answer, why)))
})

t.test('time limits', async (t) => {
  await using mute = await startRaw((socket) => void socket.resume())
  await using stalls = await startRaw((socket) => void socket.once('data', () => socket.write('HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello')))
  const eventTypes = new Map([['/plain', 'text/event-stream'], ['/charset', 'text/event-stream; charset=utf-8'], ['/case', 'Text/Event-Stream;charset=UTF-8']])
  const closeEvents: (() => void)[] = []
  await using events = await startHttp((request, response) => {
    response.writeHead(200, { 'content-type': eventTypes.get(request.url as string) }).write('data: 1\n\n')
    closeEvents.push(() => void response.end('data: 2\n\n'))
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', firstByteTimeout: 300, idleTimeout: 300, headerTimeout: 500, keepAliveTimeout: 400 })
  const late = await ask(gateway.port, get(`/a/${mute.port}/`))
  t.equal(statusOf(late), 504, 'no answer in time')
  const half = new RawClient(gateway.port)
  half.send(get(`/a/${stalls.port}/`))
  await half.until((c) => c.closed || c.ended)
  t.ok(half.received.endsWith('hello'), 'an answer that stops is broken off')
  const streams = [...eventTypes.keys()].map((path) => new RawClient(gateway.port).send(get(`/a/${events.port}${path}`)))
  const upload = new RawClient(gateway.port)
  upload.send(`POST /a/${mute.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhello`)
  const slow = new RawClient(gateway.port)
  slow.send('GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ')
  const idle = new RawClient(gateway.port)
  const between = new RawClient(gateway.port)
  between.send('GET /status.ok HTTP/1.1\r\nHost: x\r\n\r\n')
  await Promise.all([upload.untilClosed(8_000), slow.untilClosed(8_000), idle.untilClosed(8_000), between.untilClosed(8_000)])
  t.equal(statusOf(upload.received), 504, 'an upload that stops')
  t.equal(statusOf(slow.received), 408, 'a head that never ends')
  t.notMatch(idle.received, / 200 /, 'a connection that never asks')
  t.match(between.received, /^HTTP\/1\.1 200/, 'and one that asks no more')
  t.same(streams.map((stream) => stream.ended), [false, false, false], 'event streams are spared, however their type is written and whatever else it says')
  for (const close of closeEvents) close()
  for (const stream of streams) await stream.until((c) => c.received.includes('data: 2'))
  for (const client of [half, ...streams, upload, slow, idle, between]) client.close()
})

t.test('limits answer, and are lifted again', async (t) => {
  let release: (() => void)[] = []
  await using upstream = await startHttp((_request, response) => void release.push(() => response.end('ok')))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', maxRequestsPerPort: 3, maxConnections: 6 })
  const held = [1, 2, 3].map(() => new RawClient(gateway.port).send(get(`/a/${upstream.port}/`)))
  await eventually(() => release.length === 3, 'three under way')
  const fourth = await ask(gateway.port, get(`/a/${upstream.port}/`))
  t.equal(statusOf(fourth), 503)
  t.match(fourth, /retry-after/i)
  const idle = [1, 2, 3, 4].map(() => connect(gateway.port, '127.0.0.1'))
  await eventually(() => idle.every((socket) => !socket.connecting), 'connected')
  t.equal(statusOf(await ask(gateway.port, get('/nobody/1/'))), 503, 'too many connections')
  for (const socket of idle) socket.destroy()
  for (const answer of release) answer()
  release = []
  for (const client of held) t.equal(statusOf(await client.untilClosed()), 200)
  const again = new RawClient(gateway.port).send(get(`/a/${upstream.port}/`))
  await eventually(() => release.length === 1, 'a place is free')
  release[0]?.()
  t.equal(statusOf(await again.untilClosed()), 200)
  for (const client of [...held, again]) client.close()
})

t.test('draining: no new connections, the running requests end, then the rest is broken off', async (t) => {
  let finish: () => void = () => undefined
  let begun: () => void = () => undefined
  const started = new Promise<void>((resolve) => (begun = resolve))
  await using upstream = await startHttp((request, response) => {
    if (request.url === '/hang') return
    response.write('begun ')
    begun()
    finish = () => void response.end('done')
  })
  const gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 2_000 })
  const client = new RawClient(gateway.port).send(`GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\n\r\n`)
  await started
  await client.until((c) => c.received.includes('begun'))
  const hanging = new RawClient(gateway.port).send(get(`/a/${upstream.port}/hang`))
  await eventually(() => upstream.sockets.size === 2, 'both under way')
  const closed = gateway.close()
  await t.rejects(new Promise((resolve, reject) => connect(gateway.port, '127.0.0.1').once('connect', resolve).once('error', reject)), 'no new connections')
  finish()
  await client.until((c) => c.received.endsWith('0\r\n\r\n'))
  await closed
  await hanging.untilClosed()
  t.notMatch(hanging.received, / 200 /, 'what did not end in time was broken off')
  for (const socket of [client, hanging]) socket.close()
})

t.test('metrics count without naming sandboxes', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('ok'))
  await using gateway = await startGateway([{ id: 'very-secret-id' }], { mode: 'uri' })
  await ask(gateway.port, get(`/very-secret-id/${upstream.port}/`))
  await ask(gateway.port, get('/nobody/80/'))
  await eventually(() => gateway.lines.length === 2, 'both done')
  const text = await gateway.gateway.metrics.registry.metrics()
  t.match(text, /ingress_http_request_count\{method="GET",status_code="200",proxy_type="http"\} 1/)
  t.match(text, /ingress_routing_resolutions_count\{result="not_found"\} 1/)
  t.match(text, /ingress_http_request_duration_seconds_count\{method="GET",proxy_type="http"\} 2/)
  t.match(text, /sallyport_gateway_refused_count\{code="EDGE_NO_ROUTE"\} 1/)
  t.notMatch(text, /very-secret-id|nobody/)
})
