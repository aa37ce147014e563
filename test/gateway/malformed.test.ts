/** What never becomes a request still gets an answer that fits, a line in the access log and a place in the counters. */
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { bodyOf, eventually, RawClient, startGateway, startHttp, startRaw, statusOf, type TestGateway } from './support.ts'

type Line = Record<string, string | number>
const linesOf = ({ lines }: TestGateway): Line[] => lines.map((line) => JSON.parse(line) as Line)
const refusedOf = async ({ gateway }: TestGateway, code: string): Promise<number> =>
  Number(new RegExp(`sallyport_gateway_refused_count\\{code="${code}"\\} (\\d+)`).exec(await gateway.metrics.registry.metrics())?.[1] ?? 0)

const unreadable: [why: string, raw: string, status: number, code: string, text: string][] = [
  ['no HTTP at all', 'hello\r\n\r\n', 400, 'EDGE_BAD_REQUEST', 'the request is malformed'],
  ['a head beyond --max-header-bytes', `GET / HTTP/1.1\r\nhost: x\r\na: ${'a'.repeat(20_000)}\r\n\r\n`, 431, 'EDGE_HEADERS_TOO_LARGE', 'the header section is too large'],
]

t.test('bytes that are no request are answered once, counted and logged', async (t) => {
  await using gateway = await startGateway([], { maxHeaderBytes: 8_192 })
  for (const [why, raw, status, code, text] of unreadable) {
    const before = await refusedOf(gateway, code)
    const client = new RawClient(gateway.port).send(raw)
    const answer = await client.untilClosed()
    client.close()
    t.equal(statusOf(answer), status, why)
    t.equal(bodyOf(answer), `OpenSandbox Ingress: ${text}\n`, why)
    t.match(answer.toLowerCase(), /\r\nx-content-type-options: nosniff\r\n/, why)
    t.match(answer.toLowerCase(), /\r\nconnection: close\r\n/, why)
    t.equal(await refusedOf(gateway, code), before + 1, `${why}: counted`)
    t.match(linesOf(gateway).at(-1), { msg: 'malformed', client: '127.0.0.1', status, code }, `${why}: logged`)
  }
})

t.test('nothing behind a request without Host is a request, and nobody is left without an answer before it', async (t) => {
  const seen: string[] = []
  await using sandbox = await startHttp((request, response) => {
    seen.push(`${request.method} ${request.url}`)
    setTimeout(() => response.end('ok'), request.url === '/slow' ? 100 : 0)
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto' })
  const target = (path: string): string => `/a/${sandbox.port}${path}`
  const handshake = `GET ${target('/ws')} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`
  const rows: [why: string, raw: string, answers: number[], reached: string[]][] = [
    ['alone', `GET ${target('/bad')} HTTP/1.1\r\n\r\n`, [400], []],
    ['to the gateway itself', 'GET /status.ok HTTP/1.1\r\n\r\n', [400], []],
    ['for every sandbox', 'OPTIONS * HTTP/1.1\r\n\r\n', [400], []],
    ['absolute-form does not replace it', `GET http://x${target('/bad')} HTTP/1.1\r\n\r\n`, [400], []],
    ['a handshake', handshake, [400], []],
    ['between two others', `GET ${target('/slow')} HTTP/1.1\r\nHost: x\r\n\r\nGET ${target('/bad')} HTTP/1.1\r\n\r\nDELETE ${target('/behind')} HTTP/1.1\r\nHost: x\r\n\r\n`, [200, 400], ['GET /slow']],
    ['an empty one is one', `GET ${target('/empty')} HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n`, [200], ['GET /empty']],
    ['HTTP/1.0 may do without', `GET ${target('/old')} HTTP/1.0\r\n\r\n`, [200], ['GET /old']],
  ]
  for (const [why, raw, answers, reached] of rows) {
    const lines = gateway.lines.length
    const received = await new RawClient(gateway.port).send(raw).untilClosed()
    t.same([...received.matchAll(/HTTP\/1\.1 (\d+) /g)].map(([, status]) => Number(status)), answers, why)
    await eventually(() => gateway.lines.length === lines + answers.length, `${why}: a line for each`)
    if (answers.includes(400)) t.match(linesOf(gateway).at(-1), { status: 400, code: 'EDGE_BAD_REQUEST' }, `${why}: logged`)
    t.same(seen.splice(0), reached, `${why}: what the sandbox saw`)
  }
})

const connectAnswers: [accept: string, type: string, told: RegExp][] = [
  ['*/*', 'text/plain; charset=utf-8', /^OpenSandbox Ingress: CONNECT is not supported\n$/],
  ['application/json', 'application/json', /^\{"code":"EDGE_METHOD_NOT_ALLOWED","message":"CONNECT is not supported","next":"[^"]+","request_id":"[^"]+"\}\n$/],
  ['text/html', 'text/html; charset=utf-8', /<code>EDGE_METHOD_NOT_ALLOWED<\/code>/],
]

t.test('CONNECT reaches nobody and is refused in the words the client asks for', async (t) => {
  let reached = 0
  await using target = await startRaw(() => reached++)
  await using gateway = await startGateway([{ id: 'a' }])
  for (const [accept, type, told] of connectAnswers) {
    const client = new RawClient(gateway.port).send(`CONNECT a-${target.port}.gw.test:80 HTTP/1.1\r\nhost: 127.0.0.1:${target.port}\r\naccept: ${accept}\r\n\r\nGET / HTTP/1.1\r\nhost: a-${target.port}\r\n\r\n`)
    const answer = await client.untilClosed()
    client.close()
    t.equal(statusOf(answer), 405, accept)
    t.match(answer, new RegExp(`\r\ncontent-type: ${type.replaceAll('/', '\\/')}\r\n`), accept)
    t.match(answer, /\r\nallow: GET, /, 'a 405 names what it allows')
    t.match(bodyOf(answer), told, accept)
    t.equal(answer.split('HTTP/1.1 ').length, 2, 'bytes behind it are not answered')
    t.match(linesOf(gateway).at(-1), { msg: 'request', method: 'CONNECT', status: 405, code: 'EDGE_METHOD_NOT_ALLOWED' })
  }
  t.equal(await refusedOf(gateway, 'EDGE_METHOD_NOT_ALLOWED'), connectAnswers.length)
  t.equal(reached, 0)
})

const handedOver: [what: string, request: (port: number) => string][] = [
  ['an upgrade', (port) => `GET /second HTTP/1.1\r\nhost: a-${port}\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n`],
  ['a CONNECT', (port) => `CONNECT a-${port}:80 HTTP/1.1\r\nhost: a-${port}\r\n\r\n`],
]

t.test('a request that takes the connection over never overtakes an answer', async (t) => {
  for (const [what, request] of handedOver) {
    const seen: string[] = []
    let finish: () => void = () => undefined
    await using upstream = await startHttp((asked, response) => void (seen.push(asked.url as string), (finish = () => void response.end('first'))))
    await using gateway = await startGateway([{ id: 'a' }])
    const client = new RawClient(gateway.port).send(`GET /first HTTP/1.1\r\nhost: a-${upstream.port}\r\n\r\n`)
    await eventually(() => seen.length === 1, 'the first request arrives')
    client.send(request(upstream.port))
    await client.untilClosed()
    client.close()
    finish()
    t.equal(client.received, '', `${what} behind an unanswered request: the connection ends, and nothing is taken for the first answer`)
    t.same(seen, ['/first'], what)
    await eventually(() => linesOf(gateway).length === 2, 'both are logged')
    t.ok(linesOf(gateway).some(({ code }) => code === 'EDGE_BAD_REQUEST'), what)
  }
})

/** A request behind which nothing is one, though its connection waits for the answers before it. */
const lastOnes: [what: string, request: (port: number) => string, answers: number][] = [
  ['a target that is refused', () => 'GET /x#y HTTP/1.1\r\nhost: x\r\n\r\n', 400],
  ['an upgrade that nobody follows', (port) => `GET /a/${port}/last HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\n`, 200],
]

t.test('what follows the last request of a connection is ignored, and ends it when it does not end', async (t) => {
  for (const [what, last, status] of lastOnes) {
    let finish: (() => void) | null = null
    await using upstream = await startHttp((request, response) => (request.url === '/held' ? (finish = () => void response.end('held')) : response.end('last')))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const begin = async (): Promise<RawClient> => {
      finish = null
      const client = new RawClient(gateway.port).send(`GET /a/${upstream.port}/held HTTP/1.1\r\nhost: x\r\n\r\n`)
      await eventually(() => finish !== null, 'the first request arrives')
      client.send(last(upstream.port))
      // Not in one packet with what makes it the last: node:http would throw it away.
      await delay(50)
      return client
    }
    const behind = (count: number): string => 'GET /status.ok HTTP/1.1\r\nhost: x\r\n\r\n'.repeat(count)
    const modest = await begin()
    modest.send(behind(20))
    await delay(50)
    ;(finish as unknown as () => void)()
    const received = await modest.untilClosed()
    t.same([...received.matchAll(/HTTP\/1\.1 (\d+) /g)].map(([, code]) => Number(code)), [200, status], `${what}: a few behind it harm nobody, and have no answer`)
    t.match(received, 'held', what)
    const greedy = await begin()
    const before = await refusedOf(gateway, 'EDGE_OVERLOADED')
    for (let sent = 0; sent < 100 && !greedy.closed && !greedy.ended; sent += 10, await delay(5)) greedy.send(behind(10))
    await greedy.untilClosed()
    t.equal(greedy.received, '', `${what}: too many behind it end the connection`)
    t.equal(await refusedOf(gateway, 'EDGE_OVERLOADED'), before + 1, `${what}: counted`)
    for (const client of [modest, greedy]) client.close()
  }
})

t.test('a body that breaks behind its answer is no request that wants another', async (t) => {
  await using gateway = await startGateway([], { mode: 'uri' })
  const client = new RawClient(gateway.port).send('POST /nobody/80/ HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel')
  await client.until(({ received }) => received.endsWith('sandbox not found: nobody\n'))
  client.send('lo\r\nnonsense\r\n')
  const received = await client.untilClosed()
  client.close()
  t.equal(received.split('HTTP/1.1 ').length, 2, 'one answer to one request')
  const again = new RawClient(gateway.port).send('POST /nobody/80/ HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhel')
  await again.until((c) => c.received.endsWith('nobody\n'))
  again.send('lononsense\r\n\r\n')
  t.equal((await again.untilClosed()).split('HTTP/1.1 400 ').length, 2, 'a request behind a whole body does')
  again.close()
})

t.test('connections too many even for a 503 are counted and logged', async (t) => {
  await using gateway = await startGateway([], { maxConnections: 1 })
  const clients = Array.from({ length: 24 }, () => new RawClient(gateway.port))
  await eventually(() => clients.some(({ closed, ended }) => closed || ended), 'some are closed')
  // One served, sixteen to be refused with words, the others closed at once.
  await eventually(() => clients.filter(({ closed, ended }) => closed || ended).length === 7, 'seven are closed')
  t.equal(await refusedOf(gateway, 'EDGE_OVERLOADED'), 7)
  t.equal(linesOf(gateway).filter(({ msg, code, client, status }) => msg === 'malformed' && code === 'EDGE_OVERLOADED' && client === '127.0.0.1' && status === 0).length, 7)
  for (const client of clients) client.close()
})
