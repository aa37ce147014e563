/** Every route of the original, bare and under `/v1`: served, or refused with a code. And requests that never come to a route. */
import { once } from 'node:events'
import { connect, type AddressInfo } from 'node:net'
import t from 'tap'
import { Bench, createBody, gatewayToml } from './bench.ts'

type Method = 'GET' | 'POST' | 'PATCH' | 'DELETE' | 'PUT' | 'OPTIONS'

const metricsEvent = { eventType: 'sandbox.create', sandboxId: 'a', image: 'image:1', createDurationMs: 12, success: true }
/** `{id}`: a sandbox that runs. No body: none is sent, but a JSON content type is, as SDKs do. */
const routes: [method: Method, path: string, status: number, code?: string | undefined, body?: unknown][] = [
  ['POST', '/sandboxes', 202, undefined, createBody],
  ['GET', '/sandboxes', 200],
  ['GET', '/sandboxes/{id}', 200],
  ['PATCH', '/sandboxes/{id}/metadata', 200, undefined, {}],
  ['POST', '/sandboxes/{id}/pause', 202],
  ['POST', '/sandboxes/{id}/resume', 202],
  ['POST', '/sandboxes/{id}/renew-expiration', 200, undefined, { expiresAt: '2027-01-01T00:00:00Z' }],
  ['GET', '/sandboxes/{id}/endpoints/8080', 200],
  ['POST', '/metrics/events', 204, undefined, metricsEvent],
  ['POST', '/sandboxes/{id}/snapshots', 501, 'SNAPSHOT::NOT_IMPLEMENTED'],
  ['POST', '/sandboxes/{id}/snapshots', 501, 'SNAPSHOT::NOT_IMPLEMENTED', { name: 'x' }],
  ['GET', '/snapshots?sandboxId=a&state=Ready', 501, 'SNAPSHOT::NOT_IMPLEMENTED'],
  ['GET', '/snapshots/a', 501, 'SNAPSHOT::NOT_IMPLEMENTED'],
  ['DELETE', '/snapshots/a', 501, 'SNAPSHOT::NOT_IMPLEMENTED'],
  ...(['logs', 'events', 'inspect', 'summary'] as const).map((kind): (typeof routes)[number] => ['GET', `/sandboxes/{id}/diagnostics/${kind}`, 501, 'DIAGNOSTICS_NOT_IMPLEMENTED']),
  ['GET', '/sandboxes/none/diagnostics/logs?scope=container', 501, 'DIAGNOSTICS_NOT_IMPLEMENTED'],
  ['GET', '/pools', 501, 'KUBERNETES::POOL_NOT_SUPPORTED'],
  ['POST', '/pools', 501, 'KUBERNETES::POOL_NOT_SUPPORTED', { name: 'x' }],
  ['GET', '/pools/a', 501, 'KUBERNETES::POOL_NOT_SUPPORTED'],
  ['PUT', '/pools/a', 501, 'KUBERNETES::POOL_NOT_SUPPORTED', {}],
  ['DELETE', '/pools/a', 501, 'KUBERNETES::POOL_NOT_SUPPORTED'],
  ...(['GET', 'POST', 'PUT', 'PATCH', 'DELETE'] as const).flatMap((method): (typeof routes) => [[method, '/sandboxes/{id}/proxy/80', 501, 'NOT_IMPLEMENTED'], [method, '/sandboxes/{id}/proxy/80/a%2Fb?c=d', 501, 'NOT_IMPLEMENTED']]),
  ['DELETE', '/sandboxes/{id}', 204],
  ['DELETE', '/sandboxes/{id}', 404, 'DOCKER::SANDBOX_NOT_FOUND'],
  ['PUT', '/sandboxes/{id}', 405, 'METHOD_NOT_ALLOWED'],
  ['GET', '/sandboxes/{id}/pause', 405, 'METHOD_NOT_ALLOWED'],
  ['GET', '/metrics/events', 405, 'METHOD_NOT_ALLOWED'],
  ['GET', '/sandboxes/{id}/nothing', 404, 'NOT_FOUND'],
  ['GET', '/sandboxes/%zz', 404, 'NOT_FOUND'],
  ['GET', `/sandboxes/${'a'.repeat(300)}`, 404, 'NOT_FOUND'],
]

for (const prefix of ['', '/v1']) {
  t.test(`routes under "${prefix}"`, async (t) => {
    await using bench = new Bench()
    const id = await bench.create()
    for (const [method, path, status, code, body] of routes) {
      const url = prefix + path.replace('{id}', id)
      const why = `${method} ${path}${body === undefined ? '' : ' with a body'}`
      const answer = await bench.call(method, url, body, { 'content-type': 'application/json' })
      t.equal(answer.status, status, why, answer)
      t.match(answer.headers['x-request-id'], /^[0-9a-f]{32}$/, `${why}: has a request id`)
      if (code !== undefined) t.same([Object.keys(answer.body), answer.body.code], [['code', 'message'], code], why)
      const closed = await bench.app.inject({ method, url })
      t.same([closed.statusCode, closed.json().code], [401, 'MISSING_API_KEY'], `${why}: not without the key`)
    }
  })
}

t.test('bare only, and open', async (t) => {
  await using bench = new Bench()
  for (const [path, status] of [['/health', 200], ['/health/ready', 200], ['/docs', 501], ['/redoc', 501], ['/openapi.json', 501]] as const) {
    const answer = await bench.app.inject({ url: path })
    t.equal(answer.statusCode, status, path)
    if (status === 501) t.equal(answer.json().code, 'NOT_IMPLEMENTED')
    t.equal((await bench.call('GET', `/v1${path}`)).status, 404, `not under /v1: ${path}`)
  }
})

t.test('405 says what is allowed', async (t) => {
  await using bench = new Bench()
  const cases: [Method, string, string][] = [['PUT', '/v1/sandboxes', 'GET, POST'], ['POST', '/sandboxes/a', 'GET, DELETE'], ['DELETE', '/health', 'GET'], ['GET', '/v1/sandboxes/a/metadata', 'PATCH'], ['OPTIONS', '/v1/sandboxes', 'GET, POST']]
  for (const [method, path, allow] of cases) t.match(await bench.call(method, path), { status: 405, headers: { allow } }, `${method} ${path}`)
})

t.test("SDKs' own figures", async (t) => {
  await using bench = new Bench()
  const tell = (body: unknown) => bench.call('POST', '/v1/metrics/events', body)
  t.equal((await tell(metricsEvent)).status, 204)
  t.equal((await tell({ eventType: 'sandbox.create', success: false, error: { ignored: true } })).status, 204)
  t.match(bench.clientEvents, [{ type: 'sandbox.create', sandbox: 'a', image: 'image:1', milliseconds: 12, success: true }, { type: 'sandbox.create', success: false }])
  const bad: [why: string, body: unknown][] = [
    ['nothing', undefined], ['no type', { success: true }], ['a negative time', { ...metricsEvent, createDurationMs: -1 }], ['half a millisecond', { ...metricsEvent, createDurationMs: 0.5 }],
    ['success in words', { ...metricsEvent, success: 'yes' }], ['a line as long as a book', { ...metricsEvent, image: 'x'.repeat(600) }], ['no object', [metricsEvent]],
  ]
  for (const [why, body] of bad) t.match(await tell(body), { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER' } }, why)
  t.equal(bench.clientEvents.length, 2)
})

t.test('what is no request gets an answer all the same', async (t) => {
  await using bench = new Bench({ toml: gatewayToml.replace('[server]', '[server]\nmax_body_bytes = 2048') })
  await bench.app.listen({ host: '127.0.0.1', port: 0 })
  const { port } = bench.app.server.address() as AddressInfo
  const key = 'Host: a\r\nOPEN-SANDBOX-API-KEY: k1\r\n'
  const cases: [why: string, bytes: string, status: number, code: string][] = [
    ['no HTTP', 'hello\r\n\r\n', 400, 'BAD_REQUEST'],
    ['two lengths', `POST /v1/sandboxes HTTP/1.1\r\n${key}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}`, 400, 'BAD_REQUEST'],
    ['a length and chunks', `POST /v1/sandboxes HTTP/1.1\r\n${key}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n`, 400, 'BAD_REQUEST'],
    ['a head of 40 KiB', `GET /health HTTP/1.1\r\nHost: a\r\nX-Long: ${'x'.repeat(40_000)}\r\n\r\n`, 431, 'HEADERS_TOO_LARGE'],
    ['a target of 40 KiB', `GET /${'x'.repeat(40_000)} HTTP/1.1\r\n${key}\r\n`, 431, 'HEADERS_TOO_LARGE'],
    ['no host', 'GET /health HTTP/1.1\r\n\r\n', 400, 'BAD_REQUEST'],
    ['a body that says it is too long', `POST /v1/sandboxes HTTP/1.1\r\n${key}Content-Type: application/json\r\nContent-Length: 4096\r\n\r\n`, 413, 'BODY_TOO_LARGE'],
    ['one that turns out to be', `POST /v1/sandboxes HTTP/1.1\r\n${key}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n${' '.repeat(4096)}\r\n0\r\n\r\n`, 413, 'BODY_TOO_LARGE'],
    ['a body for a stranger is not even read', 'POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n', 401, 'MISSING_API_KEY'],
  ]
  for (const [why, bytes, status, code] of cases) {
    const socket = connect(port, '127.0.0.1')
    socket.on('error', () => undefined).write(bytes)
    let text = ''
    socket.setEncoding('utf8').on('data', (chunk: string) => (text += chunk))
    while (!/\r\n\r\n[^]*\}$/.test(text) && !socket.closed) await Promise.race([once(socket, 'data'), once(socket, 'close')])
    socket.destroy()
    t.match(text, new RegExp(`^HTTP/1.1 ${status} `), why)
    const [head = '', body = ''] = text.split('\r\n\r\n')
    t.match(head, /^x-request-id: [0-9a-f]{32}$/m, why)
    t.match(head, /^content-type: application\/json/m, why)
    t.match(JSON.parse(body), { code, message: /\w/ }, why)
  }
})
