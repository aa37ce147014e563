/** Every fault by name: its status, and what a person, a program and a client of the original read when it happens. */
import t, { type Test } from 'tap'
import { faults } from '#policies/fault.ts'
import { ask, bodyOf, eventually, get, keysText, RawClient, startGateway, startHttp, startRaw, statusOf, type TestGateway } from './support.ts'

/** Clients and dashboards hold on to these: a change here is a change for them. */
const statuses: Readonly<Record<string, number>> = {
  EDGE_BAD_ROUTE: 400,
  EDGE_BAD_REQUEST: 400,
  EDGE_UNAUTHORIZED: 401,
  EDGE_NO_ROUTE: 404,
  EDGE_METHOD_NOT_ALLOWED: 405,
  EDGE_TOO_MANY_ATTEMPTS: 429,
  EDGE_HEADERS_TOO_LARGE: 431,
  EDGE_BUG: 500,
  EDGE_UPSTREAM_REFUSED: 502,
  EDGE_UPSTREAM_BROKEN: 502,
  EDGE_UPSTREAM_FORBIDDEN: 502,
  EDGE_NOT_READY: 503,
  EDGE_ROUTES_STALE: 503,
  EDGE_DRAINING: 503,
  EDGE_OVERLOADED: 503,
  EDGE_VERIFIER_MISSING: 503,
  EDGE_UPSTREAM_TIMEOUT: 504,
}

const wait = new Set(['EDGE_TOO_MANY_ATTEMPTS', 'EDGE_NOT_READY', 'EDGE_ROUTES_STALE', 'EDGE_DRAINING', 'EDGE_OVERLOADED', 'EDGE_VERIFIER_MISSING'])

/** Not by the rows below: the first two have tests of their own here, the third cannot be provoked as long as it is not there. */
const elsewhere = ['EDGE_DRAINING', 'EDGE_HEADERS_TOO_LARGE', 'EDGE_BUG']

const asText = 'Accept: */*'
const asJson = 'Accept: application/json'
const asPage = 'Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8'

type Told = { code: string; message: string; next: string; request_id: string }

function utf8(latin1: string): string {
  return Buffer.from(latin1, 'latin1').toString('utf8')
}

function headerOf(answer: string, name: string): string | undefined {
  return new RegExp(`\r\n${name}: ([^\r]*)\r\n`, 'i').exec(answer)?.[1]
}

/** What a browser shows of a page: no markup, and escapes as what they stand for. */
function shown(page: string): string {
  const signs: Readonly<Record<string, string>> = { lt: '<', gt: '>', quot: '"', amp: '&' }
  return page.replace(/<style>.*?<\/style>/s, '').replace(/<[^>]*>/g, '\n').replace(/&(lt|gt|quot|amp);/g, (_all, name: string) => signs[name] as string)
}

const ownTags = ['body', 'code', 'footer', 'h1', 'head', 'header', 'html', 'link', 'main', 'meta', 'p', 'style', 'title']

/** Asks three times and holds what comes back against what is wanted. @param send one request with these header lines more */
async function readThreeWays(t: Test, what: string, code: string, text: string, send: (...headers: string[]) => Promise<string>, body = `OpenSandbox Ingress: ${text}\n`): Promise<void> {
  const id = 'id-<b>&amp;1'
  const [plain, json, page] = await Promise.all([send(asText), send(asJson), send(asPage, `X-Request-Id: ${id}`)])
  for (const [form, answer] of Object.entries({ plain, json, page })) {
    t.equal(statusOf(answer), statuses[code], `${what}: ${form}`)
    t.equal(headerOf(answer, 'retry-after') !== undefined, wait.has(code), `${what}: ${form}, when to come again`)
    t.equal(Number(headerOf(answer, 'content-length')), bodyOf(answer).length, `${what}: ${form}, whole`)
    t.equal(headerOf(answer, 'cache-control'), 'no-store', `${what}: ${form}`)
  }
  t.equal(headerOf(plain, 'content-type'), 'text/plain; charset=utf-8', what)
  t.equal(utf8(bodyOf(plain)), body, what)

  t.equal(headerOf(json, 'content-type'), 'application/json', what)
  const told = JSON.parse(utf8(bodyOf(json))) as Told
  t.same(Object.keys(told), ['code', 'message', 'next', 'request_id'], `${what}: these four and nothing of our inside`)
  t.match(told, { code, message: text, next: /^\S.{8,}/, request_id: /^[0-9a-f]{12}-/ }, what)
  t.equal(told.request_id, headerOf(json, 'x-request-id'), `${what}: the id to report it with`)

  t.equal(headerOf(page, 'content-type'), 'text/html; charset=utf-8', what)
  const html = utf8(bodyOf(page))
  t.same([...new Set([...html.matchAll(/<([a-z0-9]+)/gi)].map(([, tag]) => tag))].sort(), ownTags, `${what}: no markup but ours`)
  for (const part of [code, text, told.next, id]) t.ok(shown(html).includes(part), `${what}: the page says ${part}`)
}

t.test('a code means one status, for good', async (t) => {
  t.same(Object.fromEntries(Object.entries(faults).map(([code, { status }]) => [code, status])), statuses)
})

t.test('each fault is told as text, as JSON and as a page', async (t) => {
  const gone = await startRaw(() => undefined)
  await gone[Symbol.asyncDispose]()
  await using cuts = await startRaw((socket) => void socket.once('data', () => socket.destroy()))
  await using mute = await startRaw((socket) => void socket.resume())
  await using busy = await startRaw((socket) => void socket.resume())
  const routes = [{ id: 'a' }, { id: 'sec', secureAccessToken: 'tok' }, { id: 'paused', state: 'Paused' as const }]
  await using uri = await startGateway(routes, { mode: 'uri', maxRequestsPerPort: 1, maxHeaderBytes: 4_096 })
  await using header = await startGateway(routes, { mode: 'header', secureAccessKeys: keysText })
  await using impatient = await startGateway(routes, { mode: 'uri', firstByteTimeout: 100 })
  await using strict = await startGateway(routes, { mode: 'uri', allowLoopbackUpstreams: false, authFailuresPerMinute: 1, secureAccessKeys: keysText })
  await using stale = await startGateway(routes, { mode: 'uri' })
  stale.gateway.table.alive(-120_000)
  const held = new RawClient(uri.port).send(get(`/a/${busy.port}/`))
  await eventually(() => busy.sockets.size === 1, 'the one request that the port may have')
  const guess = '/sec/80/x2qxvk/00000000a/'
  t.equal(statusOf(await ask(strict.port, get(guess))), 401, 'the one guess that a client may have')

  const to = (target: string) => (...headers: string[]) => get(target, ...headers)
  const by = (route: string, ...more: string[]) => (...headers: string[]) => get('/', `OpenSandbox-Ingress-To: ${route}`, ...more, ...headers)
  const rows: [why: string, code: string, gateway: TestGateway, request: (...headers: string[]) => string, text: string][] = [
    // The original's texts.
    ['nothing names a sandbox', 'EDGE_BAD_ROUTE', header, (...headers) => `GET / HTTP/1.0\r\n${headers.join('\r\n')}\r\n\r\n`, "missing header 'Opensandbox-Ingress-To' or 'Host'"],
    ['a host that names none', 'EDGE_BAD_ROUTE', header, to('/'), 'invalid ingress route: invalid host: gateway'],
    ['a path that is too short', 'EDGE_BAD_ROUTE', uri, to('/x'), "invalid ingress route: invalid URI path format: expected '/<sandbox-id>/<sandbox-port>/<path-to-request>', got: /x"],
    ['an empty id', 'EDGE_BAD_ROUTE', uri, to('//80'), 'invalid ingress route: missing sandbox-id or sandbox-port in URI path'],
    ['a port that is none', 'EDGE_BAD_ROUTE', uri, to('/a/x/'), 'invalid ingress route: invalid port format: invalid port "x"'],
    ['a wrong header', 'EDGE_UNAUTHORIZED', header, by('sec-80', 'OpenSandbox-Secure-Access: no'), 'signature: secure access header mismatch'],
    ['no proof', 'EDGE_UNAUTHORIZED', header, by('sec-80'), 'signature: signature required for this sandbox'],
    ['a proof too old', 'EDGE_UNAUTHORIZED', header, by('sec-80-1-00000000a'), 'signature: access expired'],
    ['a key nobody knows', 'EDGE_UNAUTHORIZED', header, by('sec-80-x2qxvk-00000000z'), 'signature: unauthorized: unknown signed_key_id'],
    ['a wrong signature', 'EDGE_UNAUTHORIZED', header, by('sec-80-x2qxvk-00000000a'), 'signature: unauthorized: signature mismatch'],
    ['no such sandbox', 'EDGE_NO_ROUTE', uri, to('/nobody/80/'), 'sandbox not found: nobody'],
    ['an id that would like to be markup', 'EDGE_NO_ROUTE', uri, to('/<script>"&lt;/80/'), 'sandbox not found: <script>"&lt;'],
    ['a sandbox that does not run', 'EDGE_NOT_READY', uri, to('/paused/80/'), 'sandbox not ready: paused (Paused)'],
    ['a signature and no keys', 'EDGE_VERIFIER_MISSING', uri, to(guess), 'signature: ingress verifier not configured'],
    // Ours.
    ['a Host that is none', 'EDGE_BAD_REQUEST', uri, (...headers) => get('/a/80/', ...headers).replace('Host: gateway', 'Host: a/b'), 'malformed Host'],
    ['a tunnel to anywhere', 'EDGE_METHOD_NOT_ALLOWED', uri, (...headers) => get('a:80', ...headers).replace('GET', 'CONNECT'), 'CONNECT is not supported'],
    ['a guess too many', 'EDGE_TOO_MANY_ATTEMPTS', strict, to(guess), 'too many refused attempts'],
    ['nobody listens', 'EDGE_UPSTREAM_REFUSED', impatient, to(`/a/${gone.port}/`), 'nothing answers on that port of the sandbox'],
    ['the connection ends before the answer', 'EDGE_UPSTREAM_BROKEN', impatient, to(`/a/${cuts.port}/`), 'the sandbox broke off the answer'],
    ['an address of our own', 'EDGE_UPSTREAM_FORBIDDEN', strict, to(`/a/${busy.port}/`), 'the sandbox has an address the gateway does not dial'],
    ['no answer', 'EDGE_UPSTREAM_TIMEOUT', impatient, to(`/a/${mute.port}/`), 'no answer in time'],
    ['more than the port may have', 'EDGE_OVERLOADED', uri, to(`/a/${busy.port}/`), 'too many requests at once for this port'],
    ['routes that may be wrong by now', 'EDGE_ROUTES_STALE', stale, to('/a/80/'), 'the gateway has lost its routes'],
  ]
  for (const [why, code, gateway, request, text] of rows) await readThreeWays(t, why, code, text, (...headers) => ask(gateway.port, request(...headers)))
  t.same([...new Set(rows.map(([, code]) => code)), ...elsewhere].sort(), Object.keys(statuses).sort(), 'a new fault has a row here, too')

  // Its end was not found, so nobody knows what it accepts.
  const large = await ask(uri.port, get('/a/80/', asJson, `X: ${'y'.repeat(5_000)}`))
  t.equal(statusOf(large), statuses['EDGE_HEADERS_TOO_LARGE'])
  t.equal(bodyOf(large), 'OpenSandbox Ingress: the header section is too large\n')
  held.close()
})

const page = 'text/html; charset=utf-8'
const text = 'text/plain; charset=utf-8'
const json = 'application/json'

t.test('which form a client gets', async (t) => {
  await using gateway = await startGateway([], { mode: 'uri' })
  const rows: [who: string, accept: string[], type: string][] = [
    ['says nothing', [], text],
    ['curl', ['*/*'], text],
    ['a browser that opens a page', ['text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8'], page],
    ['a browser that loads an image', ['image/avif,image/webp,image/png,*/*;q=0.8'], text],
    ['EventSource', ['text/event-stream'], text],
    ['a program', ['application/json'], json],
    ['axios', ['application/json, text/plain, */*'], json],
    ['a program that knows RFC 9457', ['application/problem+json'], json],
    ['in two lines', ['text/csv', 'application/json'], json],
  ]
  for (const [who, accept, type] of rows) {
    const answer = await ask(gateway.port, get('/nobody/80/', ...accept.map((value) => `Accept: ${value}`)))
    t.equal(headerOf(answer, 'content-type'), type, who)
  }
})

t.test('which form a client likes best', async (t) => {
  await using gateway = await startGateway([], { mode: 'uri' })
  const rows: [who: string, accept: string, type: string][] = [
    ['JSON rather than a page', 'application/json, text/html;q=0.5', json],
    ['a page rather than JSON', 'application/json;q=0.5, text/html', page],
    ['anything but a page', 'text/html;q=0, */*', text],
    ['types have no case', 'Application/JSON', json],
  ]
  for (const [who, accept, type] of rows) t.equal(headerOf(await ask(gateway.port, get('/nobody/80/', `Accept: ${accept}`)), 'content-type'), type, who)
})

t.test('a refused upgrade is told in the same three forms', async (t) => {
  const gone = await startRaw(() => undefined)
  await gone[Symbol.asyncDispose]()
  await using gateway = await startGateway([{ id: 'a' }, { id: 'sec', secureAccessToken: 'tok' }], { mode: 'uri' })
  const upgrade = (target: string) => (...headers: string[]): Promise<string> =>
    ask(gateway.port, `GET ${target} HTTP/1.1\r\n${['Host: x', 'Connection: Upgrade', 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==', ...headers].join('\r\n')}\r\n\r\n`)
  await readThreeWays(t, 'no such sandbox', 'EDGE_NO_ROUTE', 'sandbox not found: nobody', upgrade('/nobody/80/'))
  await readThreeWays(t, 'no proof', 'EDGE_UNAUTHORIZED', 'signature: signature required for this sandbox', upgrade('/sec/80/'))
  await readThreeWays(t, 'a failed dial', 'EDGE_NOT_READY', 'sandbox not ready', upgrade(`/a/${gone.port}/`), 'Service Unavailable\n')
  await eventually(() => gateway.lines.length === 9, 'each has its access line')
})

t.test('while draining, too: on connections that had begun to ask', async (t) => {
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  /** @returns says the rest, with these header lines more */
  const begin = async (start: string): Promise<(...headers: string[]) => Promise<string>> => {
    const client = new RawClient(gateway.port)
    t.teardown(() => client.close())
    // The answer to the first request says that the beginning of the second, which came with it, is read.
    await client.send(`GET /status.ok HTTP/1.1\r\nHost: x\r\n\r\n${start}`).until(({ received }) => received.endsWith('OK'))
    client.received = ''
    return (...headers) => client.send(`${headers.map((line) => `${line}\r\n`).join('')}\r\n`).untilClosed()
  }
  const begun: [what: string, rest: ((...headers: string[]) => Promise<string>)[]][] = []
  for (const [what, start] of [
    ['/readyz', 'GET /readyz HTTP/1.1\r\nHost: x\r\n'],
    ['an upgrade', 'GET /a/80/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n'],
  ] as const) begun.push([what, [await begin(start), await begin(start), await begin(start)]])
  const closing = gateway.close()
  for (const [what, rest] of begun) await readThreeWays(t, what, 'EDGE_DRAINING', 'the gateway is shutting down', async (...headers) => (await rest.pop()?.(...headers)) ?? '')
  await closing
})

t.test('a refusal costs a client neither its connection nor its next answer', async (t) => {
  const seen: string[] = []
  await using upstream = await startHttp((request, response) => {
    seen.push(request.url as string)
    response.end(`app ${request.url}`)
  })
  await using gateway = await startGateway([{ id: 'a' }, { id: 'sec', secureAccessToken: 'tok' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  t.teardown(() => client.close())
  const next = async (request: string, end: string): Promise<string> => {
    client.received = ''
    const answer = await client.send(request).until(({ received }) => received.includes(end))
    t.notMatch(answer, /connection: close/i, request)
    return answer
  }
  const smuggled = get(`/a/${upstream.port}/smuggled`)
  t.equal(statusOf(await next('GET /nobody/80/ HTTP/1.1\r\nHost: x\r\n\r\n', 'not found: nobody\n')), 404)
  t.equal(statusOf(await next(`GET /sec/80/ HTTP/1.1\r\nHost: x\r\n${asJson}\r\n\r\n`, '}\n')), 401)
  t.equal(statusOf(await next(`GET /a/${upstream.port}/one HTTP/1.1\r\nHost: x\r\n\r\n`, 'app /one')), 200)
  t.equal(statusOf(await next(`POST /nobody/80/ HTTP/1.1\r\nHost: x\r\nContent-Length: ${smuggled.length}\r\n\r\n${smuggled}`, 'not found: nobody\n')), 404)
  t.equal(statusOf(await next(`GET /a/${upstream.port}/two HTTP/1.1\r\nHost: x\r\n\r\n`, 'app /two')), 200)
  t.same(seen, ['/one', '/two'], 'the body of a refused request is no request')
  t.equal(client.ended, false)
})
