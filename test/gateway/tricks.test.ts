/** Requests that try to reach what no route leads to: the gateway's own endpoints past a sandbox, and other addresses through a route. */
import t from 'tap'
import { ask, bodyOf, get, keysText, startGateway, startHttp, startRaw, statusOf } from './support.ts'

t.test("a sandbox's paths are its own, and the gateway's are reached by their exact name only", async (t) => {
  await using upstream = await startHttp((request, response) => response.end(`app ${request.url}`))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto', baseDomain: 'gw.test' })
  const { port } = upstream
  const own = ['/status.ok', '/readyz', '/metrics']
  const tricks = own.flatMap((path) => [`/${path}`, `/.${path}`, `/x/..${path}`, `/%2e${path}`, path.replace(/^\/(.)/, (_all, letter: string) => `/%${letter.charCodeAt(0).toString(16)}`), `${path}/`, `${path};x`, `${path}%3fx`, `${path}%00`, `${path}%20`, path.toUpperCase(), `/..%2f${path.slice(1)}`, `\\${path.slice(1)}`.replace('\\', '/%5c')])
  for (const path of [...tricks, '/readyz', '/metrics', '/readyz?x', '/internal/v1/routes', '/.well-known/x']) {
    for (const [door, request] of [
      ['header', get(path, `OpenSandbox-Ingress-To: a-${port}`)],
      ['host', get(path).replace('Host: gateway', `Host: a-${port}.gw.test`)],
      ['path', get(`/a/${port}${path}`)],
      ['absolute', get(`http://a-${port}.gw.test${path}`)],
    ] as const) t.equal(bodyOf(await ask(gateway.port, request)), `app ${path}`, `${door}: ${path}`)
  }
  t.equal(bodyOf(await ask(gateway.port, get(`/a/${port}/status.ok`))), 'app /status.ok', 'behind a prefix it is the sandbox’s')
  t.equal(bodyOf(await ask(gateway.port, get(`/a/${port}/../../status.ok`))), 'app /../../status.ok', 'dots lead nowhere')
  t.equal(bodyOf(await ask(gateway.port, get(`/a/${port}/../../readyz`))), 'app /../../readyz')

  // Where no sandbox is named there is nothing but the two.
  for (const path of [...tricks, '/metrics', '/', '/internal/v1/routes', '/admin', '/debug/pprof/', '/server-status']) {
    const answer = await ask(gateway.port, get(path))
    t.ok([400, 404].includes(statusOf(answer)), `${path}: ${answer.slice(0, 40)}`)
    t.notMatch(bodyOf(answer), /^OK|# HELP/, path)
  }
})

t.test('no route leads to an address that a client names', async (t) => {
  let reached = 0
  await using secret = await startRaw((socket) => {
    reached++
    socket.end('HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret')
  })
  const { port } = secret
  await using gateway = await startGateway([{ id: 'a', host: '198.51.100.1', secureAccessToken: 'tok' }], { mode: 'auto', secureAccessKeys: keysText, allowLoopbackUpstreams: true, connectTimeout: 200, firstByteTimeout: 500 })
  const ids = ['127.0.0.1', 'localhost', '[::1]', '::1', '[::ffff:127.0.0.1]', '169.254.169.254', '0', '0.0.0.0', '2130706433', '0x7f000001', '0177.0.0.1', '127.1', 'metadata.google.internal', 'a@127.0.0.1', 'a:tok@127.0.0.1', '127.0.0.1#a', '127.0.0.1%23', 'a%00', 'a%2f..', '..', '.', '%2e%2e', '*', 'a.', '.a', 'http:%2f%2f127.0.0.1', '127.0.0.1%3a80', 'unix:%2fvar%2frun%2fdocker.sock', '%3127.0.0.1', 'constructor', '__proto__', 'toString', 'hasOwnProperty']
  const ports = [String(port), `${port}%2f`, `0${port}`, `+${port}`, `${port}@127.0.0.1`, `127.0.0.1:${port}`, `:${port}`]
  for (const id of ids) {
    for (const asked of ports) {
      for (const request of [
        get(`/${id}/${asked}/`),
        get('/', `OpenSandbox-Ingress-To: ${id}-${asked}`),
        get('/').replace('Host: gateway', `Host: ${id}-${asked}.gw`),
        get(`http://${id}:${asked}/`),
        `CONNECT ${id}:${asked} HTTP/1.1\r\nHost: ${id}:${asked}\r\n\r\n`,
      ]) {
        const answer = await ask(gateway.port, request)
        if (![400, 404, 405].includes(statusOf(answer))) t.fail(`${JSON.stringify(request)}: ${answer.slice(0, 60)}`)
      }
    }
  }
  for (const name of ['X-Forwarded-Host', 'X-Original-URL', 'X-Rewrite-URL', 'Forwarded', 'X-Host', 'Destination', 'Location', 'X-Backend-Host', 'X-Forwarded-Server']) {
    const answer = await ask(gateway.port, get('/a/80/', `${name}: http://127.0.0.1:${port}/`))
    t.equal(statusOf(answer), 401, `${name} names nothing`)
  }
  t.equal(reached, 0, 'nobody got there')
})
