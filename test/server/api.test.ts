/** The lifecycle API as clients see it, with a fake engine behind. */
import { once } from 'node:events'
import t from 'tap'
import { request } from 'undici'
import { decideStrongAccess } from '#policies/access.ts'
import { toRoute } from '../../server/sandbox-view.ts'
import { Bench, createBody, gatewayToml, policyBody } from './bench.ts'

t.test('who may ask', async (t) => {
  await using bench = new Bench()
  const cases: [why: string, url: string, key: string, status: number, code?: string][] = [
    ['no key', '/v1/sandboxes', '', 401, 'MISSING_API_KEY'],
    ['wrong key', '/v1/sandboxes', 'k2', 401, 'INVALID_API_KEY'],
    ['part of the key', '/v1/sandboxes', 'k', 401, 'INVALID_API_KEY'],
    ['an unknown path says nothing without the key', '/nope', '', 401, 'MISSING_API_KEY'],
    ['and is unknown with it', '/nope', 'k1', 404, 'NOT_FOUND'],
    ['health is open', '/health', '', 200],
    ['readiness too', '/health/ready', '', 200],
    ['what only begins like health is not', '/healthy', '', 401, 'MISSING_API_KEY'],
    ['the route stream wants its own token', '/internal/v1/routes', 'k1', 401, 'INVALID_ROUTE_TOKEN'],
    ['only bare', '/v1/health', 'k1', 404, 'NOT_FOUND'],
  ]
  for (const [why, url, key, status, code] of cases) {
    const answer = await bench.app.inject({ url, headers: key === '' ? {} : { 'open-sandbox-api-key': key } })
    t.equal(answer.statusCode, status, why)
    if (code !== undefined) t.equal(answer.json().code, code, why)
    t.match(answer.headers['x-request-id'], /^[0-9a-f]{32}$/, `${why}: has a request id`)
  }
})

t.test('the envelope', async (t) => {
  await using bench = new Bench()
  t.equal((await bench.call('GET', '/v1/sandboxes', undefined, { 'x-request-id': 'mine' })).headers['x-request-id'], 'mine')
  t.match(await bench.call('PUT', '/v1/sandboxes'), { status: 405, body: { code: 'METHOD_NOT_ALLOWED' } })
  t.match(await bench.call('POST', '/v1/sandboxes', 'x'.repeat(1_100_000)), { status: 413, body: { code: 'BODY_TOO_LARGE' } })
  t.match(await bench.call('POST', '/v1/sandboxes', '{'), { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER', message: 'body: is not JSON' } })
  t.match(await bench.call('POST', '/v1/sandboxes', 'a=b', { 'content-type': 'text/html' }), { status: 400, body: { message: 'body: must be application/json' } })
  t.equal((await bench.call('GET', '/v1/sandboxes/')).status, 200, 'a trailing slash')
  const preflight = await bench.app.inject({ method: 'OPTIONS', url: '/v1/sandboxes', headers: { origin: 'http://a', 'access-control-request-method': 'POST', 'access-control-request-headers': 'x' } })
  t.match([preflight.statusCode, preflight.headers], [200, { 'access-control-allow-origin': 'http://a', 'access-control-allow-headers': 'x', 'access-control-max-age': '600', vary: 'Origin' }])
  const plain = await bench.call('GET', '/nope', undefined, { origin: 'http://a' })
  t.match(plain, { status: 404, headers: { 'access-control-allow-origin': 'http://a', 'access-control-allow-credentials': 'true' } }, 'errors carry it too')
})

t.test('the life of a sandbox', async (t) => {
  await using bench = new Bench()
  t.match((await bench.call('GET', '/sandboxes')).body, { items: [], pagination: { page: 1, pageSize: 20, totalItems: 0, totalPages: 0, hasNextPage: false } })
  const created = await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody, metadata: { team: 'x', 'example.com/k': 'v' }, env: { A: 'b', N: null, E: '' }, resourceLimits: { cpu: '500m', memory: '64Mi' } })
  t.match(created, { status: 202, body: { status: { state: 'Running', reason: 'CONTAINER_RUNNING', message: 'Sandbox container started successfully.' }, metadata: { team: 'x' }, expiresAt: '2026-01-01T00:10:00.000Z', createdAt: '2026-01-01T00:00:00.000Z', entrypoint: ['sleep', '1'] } })
  const { id } = created.body
  t.same(bench.engine.calls.filter((call) => /^(create|start)/.test(call)), ['create network', 'create egress', 'start egress', 'create main', 'start main'])

  const [egress, main] = ['egress', 'main'].map((role) => bench.engine.kept.get(bench.engine.find(role))!.spec)
  t.match(egress, { network: { name: 'sallyport' }, capDrop: ['ALL'], capAdd: ['NET_ADMIN'], securityOpt: ['no-new-privileges:true'], cgroupns: 'host', readOnly: true })
  t.ok(egress!.env.includes('OPENSANDBOX_EGRESS_RULES={"defaultAction":"deny","egress":[{"action":"allow","target":"a.example"}]}'))
  t.ok(egress!.env.includes('OPENSANDBOX_EGRESS_DNS_UPSTREAM=198.51.100.53:53'))
  t.match(main, { network: { join: bench.engine.find('egress') }, env: ['A=b', 'E='], memory: 67108864, nanoCpus: 5e8, pids: 4096, sysctls: {}, capAdd: [] })
  t.ok(['NET_ADMIN', 'NET_RAW'].every((cap) => main!.capDrop.includes(cap)))
  for (const spec of [egress!, main!]) t.notOk(spec.name.includes(id) || spec.name.includes(id.slice(0, 8)), 'a name neighbours can see does not hold the id')

  t.match((await bench.call('GET', `/v1/sandboxes/${id}`)).body, { id, image: { uri: 'image:1' }, status: { state: 'Running', message: 'Sandbox container is running.' } })
  t.match(await bench.call('POST', `/v1/sandboxes/${id}/pause`, '', { 'content-type': 'application/json' }), { status: 202, headers: { 'content-length': '0' } })
  t.match(await bench.call('POST', `/v1/sandboxes/${id}/pause`), { status: 409, body: { code: 'DOCKER::SANDBOX_NOT_RUNNING' } })
  t.equal((await bench.call('GET', `/v1/sandboxes/${id}`)).body.status.state, 'Paused')
  t.equal((await bench.call('POST', `/v1/sandboxes/${id}/resume`)).status, 202)
  t.match(await bench.call('POST', `/v1/sandboxes/${id}/resume`), { status: 409, body: { code: 'DOCKER::SANDBOX_NOT_PAUSED' } })
  t.equal((await bench.call('DELETE', `/v1/sandboxes/${id}`)).status, 204)
  t.equal(bench.engine.kept.size, 0)
  for (const [method, path] of [['GET', ''], ['DELETE', ''], ['POST', '/pause'], ['POST', '/resume'], ['GET', '/endpoints/80']] as const) {
    t.match(await bench.call(method, `/v1/sandboxes/${id}${path}`), { status: 404, body: { code: 'DOCKER::SANDBOX_NOT_FOUND' } }, `${method} ${path}`)
  }
})

t.test('without a policy there is no sidecar, and main owns its namespace', async (t) => {
  await using bench = new Bench()
  await bench.create()
  t.equal(bench.engine.kept.size, 1)
  t.match(bench.engine.kept.get(bench.engine.find('main'))?.spec, { network: { name: 'sallyport' }, sysctls: { 'net.ipv6.conf.default.disable_ipv6': '1' }, dns: ['198.51.100.53'] })
})

t.test('renew', async (t) => {
  await using bench = new Bench()
  const id = await bench.create()
  const renew = (expiresAt: unknown) => bench.call('POST', `/sandboxes/${id}/renew-expiration`, { expiresAt })
  const cases: [unknown, number, unknown][] = [
    ['2026-11-22T14:50:00.123456789+08:00', 200, { expiresAt: '2026-11-22T06:50:00.123Z' }],
    ['2026-02-01T00:00:00', 200, { expiresAt: '2026-02-01T00:00:00.000Z' }],
    ['2025-02-01T00:00:00Z', 400, { code: 'DOCKER::INVALID_EXPIRATION' }],
    ['tomorrow', 400, { code: 'SANDBOX::INVALID_PARAMETER' }],
    ['2026-13-01T00:00:00Z', 400, { code: 'SANDBOX::INVALID_PARAMETER' }],
    [undefined, 400, { code: 'SANDBOX::INVALID_PARAMETER' }],
  ]
  for (const [given, status, body] of cases) t.match(await renew(given), { status, body }, String(given))
  t.equal(bench.store.all()[0]?.expiresAt, Date.UTC(2026, 1, 1), 'the store knows')
  const manual = await bench.create({ timeout: null })
  t.match(await bench.call('POST', `/sandboxes/${manual}/renew-expiration`, { expiresAt: '2027-01-01T00:00:00Z' }), { status: 409, body: { code: 'DOCKER::INVALID_EXPIRATION' } })
  t.equal((await bench.call('POST', '/sandboxes/none/renew-expiration', { expiresAt: '2027-01-01T00:00:00Z' })).status, 404)
})

t.test('metadata', async (t) => {
  await using bench = new Bench()
  const id = await bench.create({ metadata: { a: '1', b: '2' } })
  const patch = (body: unknown) => bench.call('PATCH', `/sandboxes/${id}/metadata`, body)
  t.match((await patch({ a: null, c: '3' })).body.metadata, { b: '2', c: '3' })
  t.same((await patch({ d: '4' })).body.metadata, { b: '2', c: '3', d: '4' }, 'what was deleted stays deleted')
  t.same((await patch({})).body.metadata, { b: '2', c: '3', d: '4' })
  t.match(await patch({ 'opensandbox.io/x': null }), { status: 400, body: { code: 'INVALID_METADATA_LABEL' } })
  t.match(await patch({ e: 'a b' }), { status: 400, body: { code: 'SANDBOX::INVALID_METADATA_LABEL' } })
  t.match(await patch({ e: 1 }), { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER' } })
  t.match(await patch('[]'), { status: 400 })
  t.equal((await patch({ b: null, c: null, d: null })).body.metadata, undefined, 'an empty map is left out')
})

t.test('list', async (t) => {
  await using bench = new Bench()
  for (let i = 0; i < 5; i++) {
    bench.clock.now += 1000
    await bench.create({ metadata: { n: String(i), 'e.com/k': i % 2 === 0 ? 'even' : 'odd' } })
  }
  bench.engine.end([...bench.engine.kept.keys()][4]!, 3)
  await bench.groups.sweep(true)
  const names = async (query: string): Promise<string> => (await bench.call('GET', `/v1/sandboxes${query}`)).body.items.map((item: { metadata: { n: string } }) => item.metadata.n).join('')
  bench.engine.calls.length = 0
  const cases: [query: string, wanted: string][] = [
    ['', '43210'], ['?state=running', '3210'], ['?state=Running&state=FAILED', '43210'], ['?state=', ''], ['?state=nope', ''],
    ['?page=2&pageSize=2', '21'], ['?page=9', ''], ['?metadata=n%3D1', '1'], ['?metadata=e.com%2Fk%3Deven%26n%3D2', '2'],
    ['?metadata=e.com%252Fk%3Dodd', '31'], ['?metadata=n%3D', ''], ['?metadata=', '43210'],
  ]
  for (const [query, wanted] of cases) t.equal(await names(query), wanted, query)
  t.same(bench.engine.calls, [], 'the engine is not asked')
  t.match((await bench.call('GET', '/sandboxes?pageSize=2')).body.pagination, { page: 1, pageSize: 2, totalItems: 5, totalPages: 3, hasNextPage: true })
  for (const query of ['?page=0', '?pageSize=201', '?page=x', '?pageSize=-1']) t.match(await bench.call('GET', `/sandboxes${query}`), { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER' } }, query)
  t.match(await bench.call('GET', '/sandboxes?metadata=broken'), { status: 400, body: { code: 'INVALID_METADATA_FORMAT' } })
})

t.test('endpoints', async (t) => {
  await using bench = new Bench()
  const id = await bench.create(policyBody)
  const secured = await bench.create({ secureAccess: true })
  const get = async (path: string) => bench.call('GET', `/v1/sandboxes/${path}`)
  t.same((await get(`${id}/endpoints/8080?use_server_proxy=false`)).body, { endpoint: `${id}-8080.sandbox.localhost:28888` })
  t.match((await get(`${id}/endpoints/18080`)).body.headers, { 'OPENSANDBOX-EGRESS-AUTH': /^[\w-]{32}$/ })
  t.equal((await get(`${secured}/endpoints/18080`)).body.headers['OPENSANDBOX-EGRESS-AUTH'], undefined, 'without a sidecar there is no token')
  t.match((await get(`${secured}/endpoints/80`)).body.headers, { 'OpenSandbox-Secure-Access': /^[\w-]{32}$/ })
  const signed = (await get(`${secured}/endpoints/80?expires=1900000000`)).body
  t.match(signed.endpoint, new RegExp(`^${secured}-80-${(1_900_000_000).toString(36)}-[0-9a-f]{8}a\\.sandbox`), 'a signed endpoint')
  t.equal(signed.headers, undefined, 'opens by itself')
  const bad: [string, number, string][] = [
    ['0', 400, 'DOCKER::INVALID_PORT'], ['65536', 400, 'DOCKER::INVALID_PORT'], ['-1', 400, 'DOCKER::INVALID_PORT'], ['http', 400, 'SANDBOX::INVALID_PARAMETER'],
    ['80?expires=1', 400, 'SANDBOX::INVALID_PARAMETER'], ['80?expires=x', 400, 'SANDBOX::INVALID_PARAMETER'], ['80?use_server_proxy=maybe', 400, 'SANDBOX::INVALID_PARAMETER'], ['80?use_server_proxy=true', 501, 'NOT_IMPLEMENTED'],
  ]
  for (const [path, status, code] of bad) t.match(await get(`${id}/endpoints/${path}`), { status, body: { code } }, path)
})

t.test('direct mode', async (t) => {
  await using bench = new Bench({ toml: '[server]\nhost = "127.0.0.1"\napi_key = "k1"\n[egress]\nimage = "egress:1"' })
  const id = await bench.create(policyBody)
  const spec = bench.engine.kept.get(bench.engine.find('egress'))!.spec
  const [http, egress] = [spec.publish.get(8080), spec.publish.get(18080)]
  t.ok(http! >= 40000 && http! <= 60000 && egress! >= 40000 && http !== egress)
  t.equal(spec.publishAddress, '127.0.0.1')
  t.same((await bench.call('GET', `/sandboxes/${id}/endpoints/8080`)).body, { endpoint: `127.0.0.1:${http}` })
  t.match((await bench.call('GET', `/sandboxes/${id}/endpoints/18080`)).body, { endpoint: `127.0.0.1:${egress}`, headers: { 'OPENSANDBOX-EGRESS-AUTH': /./ } })
  t.match(await bench.call('GET', `/sandboxes/${id}/endpoints/3000`), { status: 501 })
  t.match(await bench.call('GET', `/sandboxes/${id}/endpoints/8080?expires=1900000000`), { status: 400, body: { code: 'SANDBOX::API_NOT_SUPPORTED' } })
})

t.test('mode dns warns', async (t) => {
  await using bench = new Bench({ toml: gatewayToml.replace('[egress]', '[egress]\nmode = "dns"') })
  t.match((await bench.call('POST', '/sandboxes', { ...createBody, ...policyBody })).body.warnings, [/direct addresses are open/])
  t.equal((await bench.call('POST', '/sandboxes', createBody)).body.warnings, undefined)
})

t.test('the policy of a running sandbox', async (t) => {
  const asked: unknown[] = []
  await using bench = new Bench({
    askPolicy: async (address, token, rules) => {
      asked.push([address, token.length, rules])
      return { mode: 'enforcing', enforcementMode: 'dns+nft', floor: ['169.254.0.0/16'], policy: { defaultAction: 'deny', egress: rules ?? [] } }
    },
  })
  const id = await bench.create(policyBody)
  const open = await bench.create()
  const rules = [{ action: 'allow', target: 'b.example' }]
  t.match(await bench.call('GET', `/v1/sandboxes/${id}/network-policy`), { status: 200, body: { policy: { defaultAction: 'deny' }, floor: ['169.254.0.0/16'] } })
  t.match(await bench.call('PATCH', `/v1/sandboxes/${id}/network-policy`, rules), { status: 200, body: { policy: { egress: rules } } })
  t.match(asked, [[/^172/, 32, null], [/^172/, 32, rules]])
  for (const [why, body] of [['no array', {}], ['empty', []], ['a bad target', [{ action: 'allow', target: '*' }]]] as const) {
    t.match(await bench.call('PATCH', `/v1/sandboxes/${id}/network-policy`, body), { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER', message: /^body|rules/ } }, why)
  }
  t.match(await bench.call('GET', `/v1/sandboxes/${open}/network-policy`), { status: 409, body: { code: 'SANDBOX::NO_NETWORK_POLICY' } })
  t.equal((await bench.call('GET', '/v1/sandboxes/none/network-policy')).status, 404)
})

t.test('a sandbox is described as its sidecar enforces it, not as the server is configured now', async (t) => {
  for (const [mode, floor, configured] of [['dns', ['10.9.0.0/16'], 'dns+nft'], ['dns+nft', [], 'dns']] as const) {
    await using bench = new Bench({
      toml: gatewayToml.replace('[egress]', `[egress]\nmode = "${configured}"`),
      askPolicy: async () => ({ mode: 'enforcing', enforcementMode: mode, floor, policy: { defaultAction: 'deny', egress: [] } }),
    })
    const path = `/v1/sandboxes/${await bench.create(policyBody)}/network-policy`
    for (const answer of [await bench.call('GET', path), await bench.call('PATCH', path, policyBody.networkPolicy.egress)]) {
      t.match(answer, { status: 200, body: { enforcementMode: mode } })
      t.same(answer.body.floor, floor)
      if (mode === 'dns') t.match(answer.body.warnings, [/mode "dns".*direct addresses are open/])
      else t.equal(answer.body.warnings, undefined)
    }
  }
})

t.test('the route stream', async (t) => {
  await using bench = new Bench()
  const first = await bench.create()
  const address = await bench.app.listen({ host: '127.0.0.1', port: 0 })
  const { statusCode, body } = await request(`${address}/internal/v1/routes`, { headers: { authorization: 'Bearer route token' } })
  t.equal(statusCode, 200)
  const events: { type: string; id?: string; sandbox?: { id: string; state: string; host: string } }[] = []
  let rest = ''
  body.setEncoding('utf8').on('data', (chunk: string) => {
    const lines = (rest + chunk).split('\n')
    rest = lines.pop() ?? ''
    events.push(...lines.map((line) => JSON.parse(line)))
  })
  const until = async (fits: () => boolean): Promise<void> => { while (!fits()) await once(body, 'data') }
  await until(() => events.some((event) => event.type === 'synced'))
  t.match(events, [{ type: 'reset' }, { type: 'put', sandbox: { id: first, state: 'Running', host: /^172/ } }, { type: 'synced' }])
  const second = await bench.create()
  await until(() => events.some((event) => event.sandbox?.id === second && event.sandbox.state === 'Running'))
  t.match(events.find((event) => event.sandbox?.id === second), { sandbox: { state: 'Pending', host: '' } }, 'known while it is made, so that a gateway answers 503')
  await bench.call('DELETE', `/sandboxes/${first}`)
  await until(() => events.some((event) => event.type === 'delete'))
  t.equal(events.at(-1)?.id, first)
  body.on('error', () => undefined).destroy()
  t.equal((await request(`${address}/internal/v1/routes`, { headers: { authorization: 'Bearer route' } }).then(async (r) => (await r.body.dump(), r.statusCode))), 401)
})

t.test('too many wrong keys, too many creates', async (t) => {
  await using bench = new Bench({ toml: gatewayToml.replace('[server]', '[server]\nauth_failures_per_minute = 3\ncreates_per_minute = 2') })
  const ask = (key: string, remoteAddress = '198.51.100.7') => bench.app.inject({ url: '/v1/sandboxes', headers: { 'open-sandbox-api-key': key }, remoteAddress })
  for (let n = 0; n < 5; n++) t.equal((await ask('')).statusCode, 401, 'no key is no attempt at one')
  for (const status of [401, 401, 401, 429]) t.equal((await ask('wrong')).statusCode, status)
  const blocked = await ask('k1')
  t.match([blocked.statusCode, blocked.json().code, blocked.headers['retry-after']], [429, 'TOO_MANY_REQUESTS', '60'], 'nor is the right key heard: that would tell which it is')
  t.equal((await ask('k1', '198.51.100.8')).statusCode, 200, 'another client is not concerned')
  for (let n = 0; n < 3; n++) await ask('wrong', `2001:db8:1:2::${n}`)
  t.equal((await ask('k1', '2001:db8:1:2:ffff::1')).statusCode, 429, 'who has one IPv6 address has its network')
  t.equal((await ask('k1', '2001:db8:1:3::1')).statusCode, 200)
  bench.clock.now += 60_000
  t.equal((await ask('k1')).statusCode, 200, 'a minute later')

  await bench.create()
  t.equal((await bench.call('POST', '/sandboxes', {})).status, 400, 'bad ones count too')
  t.match(await bench.call('POST', '/v1/sandboxes', createBody), { status: 429, body: { code: 'TOO_MANY_REQUESTS' } }, 'bare and under /v1 together')
  t.equal((await bench.call('GET', '/v1/sandboxes')).status, 200, 'reading goes on')
})

t.test('our own access tokens, and their end', async (t) => {
  await using bench = new Bench()
  const id = await bench.create({ secureAccess: true })
  const open = await bench.create()
  const strong = async (more = '', sandbox = id) => bench.call('GET', `/v1/sandboxes/${sandbox}/endpoints/80?expires=1900000000&form=strong${more}`)
  const judge = (token: string, { method = 'GET', path = '/', epoch = 0 } = {}) => decideStrongAccess({ token, id, port: 80, method, path, epoch, keys: new Map([['a', Buffer.from('secret')]]), now: bench.clock.now / 1000 }).ok

  const { body } = await strong()
  const token = body.headers['Sallyport-Access']
  t.same(body, { endpoint: `${id}-80.sandbox.localhost:28888`, headers: { 'Sallyport-Access': token }, signedEndpoint: `${id}-80.sandbox.localhost:28888/?sallyport_access=${token}` }, 'the sandbox’s own token is not told along')
  t.ok(judge(token, { method: 'POST', path: '/any' }))
  const scoped = (await strong('&methods=GET,HEAD&path_prefix=/api')).body
  t.match(scoped.signedEndpoint, /28888\/api\?sallyport_access=sp1\./)
  t.same([judge(scoped.headers['Sallyport-Access'], { path: '/api/x' }), judge(scoped.headers['Sallyport-Access'], { path: '/other' }), judge(scoped.headers['Sallyport-Access'], { method: 'POST', path: '/api' })], [true, false, false])

  t.match(await bench.call('POST', `/v1/sandboxes/${id}/access/revoke`), { status: 200, body: { epoch: 1 } })
  t.same([judge(token, { epoch: 1 }), judge((await strong()).body.headers['Sallyport-Access'], { epoch: 1 })], [false, true], 'minted before, and after')
  t.equal(bench.store.all().find((record) => record.id === id)?.accessEpoch, 1, 'stored')
  t.equal(toRoute(bench.groups.get(id)).epoch, 1, 'and told to gateways')

  const refused: [why: string, answer: Promise<{ status: number; body: { code: string } }>, code: string][] = [
    ['no such form', bench.call('GET', `/sandboxes/${id}/endpoints/80?form=odd`), 'SANDBOX::INVALID_PARAMETER'],
    ['no end', bench.call('GET', `/sandboxes/${id}/endpoints/80?form=strong`), 'SANDBOX::INVALID_PARAMETER'],
    ['bad methods', strong('&methods=get'), 'SANDBOX::INVALID_PARAMETER'],
    ['a way out of the prefix', strong('&path_prefix=/a/../b'), 'SANDBOX::INVALID_PARAMETER'],
    ['a sandbox that is open', strong('', open), 'SANDBOX::API_NOT_SUPPORTED'],
    ['nothing to revoke', bench.call('POST', `/v1/sandboxes/${open}/access/revoke`), 'SANDBOX::API_NOT_SUPPORTED'],
  ]
  for (const [why, answer, code] of refused) t.match(await answer, { status: 400, body: { code } }, why)
  t.equal((await bench.call('POST', '/v1/sandboxes/none/access/revoke')).status, 404)

  for (const [mode, address, endpoint] of [['uri', '127.0.0.1:28888', /^127\.0\.0\.1:28888\/[^/]+\/80\/sp1\.[^/]+\/$/], ['header', '127.0.0.1:28888', undefined]] as const) {
    await using other = new Bench({ toml: gatewayToml.replace('"wildcard"', `"${mode}"`).replace('*.sandbox.localhost:28888', address) })
    const { body } = await other.call('GET', `/v1/sandboxes/${await other.create({ secureAccess: true })}/endpoints/80?expires=1900000000&form=strong`)
    if (endpoint === undefined) t.match([body.signedEndpoint, Object.keys(body.headers)], [undefined, ['OpenSandbox-Ingress-To', 'Sallyport-Access']], mode)
    else t.match(body.signedEndpoint, endpoint, mode)
  }
})

t.test('renew on access', async (t) => {
  await using bench = new Bench()
  const renewing = { extensions: { 'access.renew.extend.seconds': '300' }, timeout: 100 }
  const [id, plain] = [await bench.create(renewing), await bench.create({ timeout: 100 })]
  const end = (sandbox: string): number => (bench.groups.get(sandbox).record.expiresAt ?? 0) - bench.clock.now
  const report = (sandboxes: unknown, token = 'route token') => bench.call('POST', '/internal/v1/renewals', { sandboxes }, { authorization: `Bearer ${token}` })
  const used = (...ids: string[]) => report(ids.map((each) => ({ id: each, observedAt: new Date(bench.clock.now).toISOString() })))
  t.same([toRoute(bench.groups.get(id)).renewOnAccess, toRoute(bench.groups.get(plain)).renewOnAccess], [true, undefined], 'gateways know whom to report')

  t.equal((await used(id, plain, 'gone')).status, 204)
  t.same([end(id), end(plain)], [300_000, 100_000], 'only the one that asked for it')
  bench.clock.now += 59_000
  await used(id)
  t.equal(end(id), 241_000, 'not twice within the interval')
  bench.clock.now += 1000
  await used(id)
  t.equal(end(id), 300_000)
  t.equal(bench.store.all().find((record) => record.id === id)?.expiresAt, bench.clock.now + 300_000, 'stored')
  bench.clock.now += 120_000
  t.equal((await report([{ id, observedAt: new Date(bench.clock.now - 301_000).toISOString() }])).status, 204)
  t.equal(end(id), 180_000, 'long ago')
  await bench.call('POST', `/sandboxes/${id}/renew-expiration`, { expiresAt: new Date(bench.clock.now + 900_000).toISOString() })
  await used(id)
  t.equal(end(id), 900_000, 'never shorter')
  await bench.call('POST', `/sandboxes/${id}/renew-expiration`, { expiresAt: new Date(bench.clock.now + 60_000).toISOString() })
  await bench.call('POST', `/sandboxes/${id}/pause`)
  await used(id)
  t.equal(end(id), 60_000, 'a paused one is not in use')

  for (const [why, body] of [['no list', {}], ['no moment', [{ id, observedAt: 'yesterday' }]], ['too many', Array.from({ length: 1001 }, () => ({ id, observedAt: '2026-01-01T00:00:00Z' }))]] as const) {
    t.match(await report(body), { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER', message: /sandboxes/ } }, why)
  }
  t.match(await report([], 'wrong'), { status: 401, body: { code: 'INVALID_ROUTE_TOKEN' } })
  t.match(await bench.call('POST', '/internal/v1/renewals', { sandboxes: [] }), { status: 401 }, 'the API key is not the route token')

  await using off = new Bench({ toml: `${gatewayToml}\n[renew_intent]\nenabled = false` })
  const still = await off.create(renewing)
  t.equal((await off.call('POST', '/internal/v1/renewals', { sandboxes: [{ id: still, observedAt: new Date(off.clock.now).toISOString() }] }, { authorization: 'Bearer route token' })).status, 204)
  t.equal((off.groups.get(still).record.expiresAt ?? 0) - off.clock.now, 100_000, 'switched off')
})
