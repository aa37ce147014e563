/** The policy API on the wire. */
import { once } from 'node:events'
import { request } from 'node:http'
import { connect, type Socket } from 'node:net'
import t, { type Test } from 'tap'
import type { NetworkPolicy } from '#policies/document.ts'
import { compilePolicy } from '#policies/compile.ts'
import { adminLimits, isFromInside, listenAdmin, type AdminDeps } from '../../egress-sidecar/admin.ts'
import { createAlwaysFiles } from '../../egress-sidecar/always-files.ts'
import { createPolicyKeeper, PolicyRefusal, type Change, type PolicyKeeper } from '../../egress-sidecar/policy-keeper.ts'
import { eventually } from '../support/program.ts'

type Answer = { status: number; headers: Record<string, unknown>; text: string }

async function setUp(t: Test, given: Partial<AdminDeps> = {}, limits: Partial<typeof adminLimits> = {}, policy: NetworkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'a.example' }] }) {
  const bodies: string[] = []
  const take = (name: string, reason?: string) => async (body: string) => {
    bodies.push(`${name} ${body}`)
    if (body === 'bad') throw new PolicyRefusal(400, 'invalid policy: bad')
    if (body === 'bug') throw new Error('secret detail')
    return { policy, rules: [], ...(reason === undefined ? {} : { reason }) }
  }
  const keeper: PolicyKeeper = { policy, always: { deny: [], allow: [] }, put: take('put'), patch: take('patch'), remove: take('remove', 'no matching targets found'), reload: async () => false }
  const admin = await listenAdmin({ host: '127.0.0.1', port: 0 }, { keeper: () => keeper, token: '', enforcementMode: 'dns+nft', unready: () => '', changed: () => undefined, refused: () => undefined, inspect: async () => '', metrics: async () => 'egress_x 1\n', floor: ['169.254.169.254'], unauthorized: () => undefined, ...given }, { ...adminLimits, ...limits })
  t.teardown(() => admin.close())
  const call = (method: string, path: string, body = '', headers: Record<string, string> = {}): Promise<Answer> =>
    new Promise((resolve, reject) => {
      const sent = request({ host: '127.0.0.1', port: admin.port, method, path, headers: { 'content-length': Buffer.byteLength(body), ...headers } }, (response) => {
        let text = ''
        response.setEncoding('utf8').on('data', (part: string) => (text += part)).on('end', () => resolve({ status: response.statusCode ?? 0, headers: response.headers, text }))
      })
      sent.on('error', reject)
      sent.end(body)
    })
  return { call, bodies, port: admin.port }
}

t.test('answers have the original\'s keys in its order', async (t) => {
  const { call, bodies } = await setUp(t)
  t.equal((await call('GET', '/policy?x=1')).text, '{"status":"ok","mode":"enforcing","enforcementMode":"dns+nft","policy":{"egress":[{"action":"allow","target":"a.example"}],"defaultAction":"deny"}}\n')
  for (const method of ['POST', 'PUT', 'PATCH']) t.equal((await call(method, '/policy', '{}', { 'content-type': 'application/x-www-form-urlencoded' })).text, '{"status":"ok","mode":"enforcing","enforcementMode":"dns+nft"}\n', method)
  t.equal((await call('DELETE', '/policy', '["x"]')).text, '{"status":"ok","mode":"enforcing","enforcementMode":"dns+nft","reason":"no matching targets found"}\n')
  t.same(bodies, ['put {}', 'put {}', 'patch {}', 'remove ["x"]'])
  t.same(await call('GET', '/healthz').then(({ status, text }) => [status, text]), [200, 'ok'])
})

/** Beginning with default allow and one rule, on a kernel that takes everything. */
function realKeeper(t: Test): PolicyKeeper {
  const start: NetworkPolicy = { defaultAction: 'allow', egress: [{ action: 'allow', target: 'a.example' }] }
  const firewall = { rules: compilePolicy(start), learned: 0, updates: 0, replace: async () => undefined, open: () => 'open' as const }
  return createPolicyKeeper(start, { deny: [], allow: [] }, { firewall, files: createAlwaysFiles(t.testdir({})), policyFile: '', maxRules: 2, floor: [] })
}

t.test('a blank body resets the policy, and only that answer is without the mode of enforcement', async (t) => {
  const warning = '"warning":"mode dns filters names only: connections to addresses are not restricted"'
  for (const [enforcementMode, more] of [['dns+nft', ''], ['dns', `,${warning}`]] as const) {
    const keeper = realKeeper(t)
    const { call } = await setUp(t, { keeper: () => keeper, enforcementMode })
    const rows: [method: string, body: string, text: string][] = [
      ['POST', '', `{"status":"ok","mode":"deny_all","reason":"policy reset to default deny-all"${more}}\n`],
      ['PUT', ' \r\n\t', `{"status":"ok","mode":"deny_all","reason":"policy reset to default deny-all"${more}}\n`],
      ['POST', '{}', `{"status":"ok","mode":"deny_all","enforcementMode":"${enforcementMode}"${more}}\n`],
      ['PUT', 'null', `{"status":"ok","mode":"deny_all","enforcementMode":"${enforcementMode}"${more}}\n`],
    ]
    for (const [method, body, text] of rows) {
      const answer = await call(method, '/policy', body)
      t.same([answer.status, answer.headers['content-type'], answer.text], [200, 'application/json', text], `${method} ${JSON.stringify(body)}, ${enforcementMode}`)
      t.same(keeper.policy, { defaultAction: 'deny', egress: [] })
      await call('POST', '/policy', '{"defaultAction":"allow"}')
    }
  }
})

t.test('every change and every refusal is told', async (t) => {
  const keeper = realKeeper(t)
  const told: string[] = []
  const { call } = await setUp(t, {
    keeper: () => keeper,
    changed: ({ policy, rules }, how) => void told.push([how, policy.defaultAction, ...rules.map(({ target }) => target)].join(' ')),
    refused: ({ status, message }) => void told.push(`refused ${status} ${message}`),
  })
  const rows: [method: string, body: string, want: string[]][] = [
    ['GET', '', []],
    ['OPTIONS', '', []],
    ['PATCH', '[{"target":"b.example"}]', ['patch allow b.example']],
    ['PATCH', '[{"target":"c.example"}]', ['refused 413 egress rule total count 3 exceeds limit 2']],
    ['DELETE', '["a.example","x.example"]', ['delete allow a.example']],
    ['DELETE', '["a.example"]', []],
    ['DELETE', '', ['refused 400 empty body']],
    ['PUT', '{"egress":[{"action":"x","target":"a.b"}]}', ['refused 400 invalid policy: unsupported action "x"']],
    ['PUT', '{"egress":[{"target":"d.example"}]}', ['put deny d.example']],
    ['POST', '', ['put deny']],
  ]
  for (const [method, body, want] of rows) {
    await call(method, '/policy', body)
    t.same(told.splice(0), want, `${method} ${body}`)
  }
  const { call: broken } = await setUp(t, { refused: ({ status, message, cause }) => void told.push(`${status} ${message}: ${(cause as Error).message}`) })
  await broken('POST', '/policy', 'bug')
  t.same(told, ['500 internal error: secret detail'], 'the log hears more than the caller')
})

t.test('health is asked for by any method', async (t) => {
  const { call } = await setUp(t, { token: 'secret' })
  for (const method of ['GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'HEAD']) {
    const { status, headers, text } = await call(method, '/healthz', method === 'POST' ? '{}' : '')
    t.same([status, headers['content-type'], headers['content-length'], text], [200, 'text/plain; charset=utf-8', '2', method === 'HEAD' ? '' : 'ok'], method)
  }
  const { call: early } = await setUp(t, { unready: () => 'not ready' })
  for (const method of ['POST', 'HEAD', 'PUT']) t.equal((await early(method, '/healthz')).status, 503, `${method}, not ready`)
})

t.test('what a policy comes to', async (t) => {
  const rows: [NetworkPolicy, string][] = [
    [{ defaultAction: 'deny', egress: [] }, '{"status":"ok","mode":"deny_all","enforcementMode":"dns+nft","policy":{"egress":[],"defaultAction":"deny"}}\n'],
    [{ defaultAction: 'allow', egress: [] }, '{"status":"ok","mode":"allow_all","enforcementMode":"dns+nft","policy":{"egress":[],"defaultAction":"allow"}}\n'],
    [{ defaultAction: 'allow', egress: [{ action: 'deny', target: 'a.example' }] }, '{"status":"ok","mode":"enforcing","enforcementMode":"dns+nft","policy":{"egress":[{"action":"deny","target":"a.example"}],"defaultAction":"allow"}}\n'],
  ]
  for (const [policy, text] of rows) t.equal((await (await setUp(t, {}, {}, policy)).call('GET', '/policy')).text, text)
})

/** A policy API to which a test speaks bytes of its own. */
async function speakers(t: Test, limits: Partial<typeof adminLimits>, given: Partial<AdminDeps> = {}) {
  const { call, port } = await setUp(t, given, limits)
  const speak = async (text: string): Promise<Socket> => {
    const socket = connect(port, '127.0.0.1').on('error', () => undefined)
    await once(socket, 'connect')
    socket.write(text)
    return socket.resume()
  }
  // `once` would take a reset for a failure.
  const closing = (socket: Socket): Promise<void> => new Promise((resolve) => void (socket.closed ? resolve() : socket.once('close', () => resolve())))
  return { call, speak, closing }
}

async function fillsUp(t: Test, { call, speak, closing }: Awaited<ReturnType<typeof speakers>>, places: number): Promise<void> {
  const held = await Promise.all(Array.from({ length: places }, () => speak('')))
  await closing(await speak('GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n'))
  t.same(held.filter(({ closed }) => closed), [], `the one beyond ${places} is turned away, the others are not`)
  for (const socket of held) socket.destroy()
  await eventually('there is room again', async () => ((await call('GET', '/healthz').catch(() => undefined))?.status === 200 ? true : undefined))
  t.pass('and served when one of them has gone')
}

t.test('whoever says half of it is cut off, and the sandbox has half of the places', async (t) => {
  const { call, speak, closing } = await speakers(t, { headersTimeout: 200, requestTimeout: 400, connectionsCheckingInterval: 50, fromInside: 5 })
  for (const text of ['', 'POST /policy HTTP/1.1\r\nhost: x\r\n', 'POST /policy HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf']) {
    const begun = performance.now()
    await closing(await speak(text))
    t.ok(performance.now() - begun < 3000, `${JSON.stringify(text)}: cut`)
  }
  await fillsUp(t, { call, speak, closing }, 5)
})

t.test('the limits that hold when nothing else is said', async (t) => {
  t.match(adminLimits, { headersTimeout: 5000, requestTimeout: 10_000, keepAliveTimeout: 5000, connections: 128, fromInside: 64 })
})

t.test('when all places are taken, the oldest goes that has shown no right to its own', async (t) => {
  for (const token of ['secret', '']) {
    const works: (() => void)[] = []
    const change = (): Promise<Change> => new Promise((resolve) => works.push(() => resolve({ policy: { defaultAction: 'deny', egress: [] }, rules: [] })))
    const { speak, closing } = await speakers(t, { connections: 4 }, { token, keeper: () => ({ ...realKeeper(t), put: change }) })
    const head = `POST /policy HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n${token === '' ? '' : `opensandbox-egress-auth: ${token}\r\n`}\r\n`
    const owner = await speak(`${head}{}`)
    let heard = ''
    owner.on('data', (part: Buffer) => (heard += part.toString()))
    await eventually('his request is served', async () => works.length === 1 || undefined)
    const slow = token === '' ? null : await speak(head)
    const strangers: Socket[] = []
    const texts = ['', 'POST /policy HTTP/1.1\r\nhost: x\r\n', 'POST /policy HTTP/1.1\r\nhost: x\r\nopensandbox-egress-auth: wrong\r\n', ...(token === '' ? [head] : [])]
    const kept = slow === null ? 3 : 2
    for (let i = 0; i < 20; i++) {
      strangers.push(await speak(texts[i % texts.length]!))
      if (i >= kept) await closing(strangers[i - kept]!)
      t.same(strangers.slice(Math.max(0, i - kept + 1)).filter(({ closed }) => closed), [], `${i}: the others stay`)
    }
    t.notOk(owner.closed || slow?.closed, 'so does who may')
    slow?.write('{}')
    for (let count = slow === null ? 2 : 3; count <= 4; count++) {
      await speak(`${head}{}`)
      await eventually('served, too', async () => works.length === count || undefined)
    }
    await closing(await speak(`${head}{}`))
    t.equal(works.length, 4, 'who may is not turned out by another who may')
    for (const done of works) done()
    await closing(owner)
    t.match(heard, /^HTTP\/1.1 200 /, 'and all of them are answered')
  }
})

t.test('who comes from inside', async (t) => {
  const own = (address: string): never => ({ address }) as never
  const interfaces = { lo: [own('127.0.0.1'), own('::1')], eth0: [own('172.30.0.2'), own('fe80::42:acff:fe11:2'), own('2001:db8::2')] }
  for (const address of ['127.0.0.1', '127.8.0.1', '::1', '::ffff:127.0.0.1', '172.30.0.2', '::ffff:172.30.0.2', '2001:db8::2', 'fe80::42:acff:fe11:2%eth0', 'fe80::42:acff:fe11:2', '', undefined]) t.equal(isFromInside(address, interfaces), true, `${address}`)
  for (const address of ['172.30.0.1', '::ffff:172.30.0.1', '2001:db8::1', 'fe80::1%eth0']) t.equal(isFromInside(address, interfaces), false, address)
})

t.test('mode dns warns in every answer', async (t) => {
  const { call } = await setUp(t, { enforcementMode: 'dns' })
  for (const method of ['GET', 'POST']) t.match(JSON.parse((await call(method, '/policy')).text), { enforcementMode: 'dns', warning: /not restricted/ })
  t.match(JSON.parse((await call('GET', '/policy/effective')).text), { enforcementMode: 'dns', warning: /not restricted/ })
})

t.test('errors are plain text', async (t) => {
  const { call } = await setUp(t)
  const rows: [string, string, string, number, string][] = [
    ['GET', '/nowhere', '', 404, '404 page not found\n'],
    ['OPTIONS', '/policy', '', 405, 'method not allowed\n'],
    ['POST', '/policy', 'bad', 400, 'invalid policy: bad\n'],
    ['POST', '/policy', 'bug', 500, 'internal error\n'],
    ['POST', '/policy', 'x'.repeat((1 << 20) + 1), 413, 'request body exceeds 1048576 bytes\n'],
  ]
  for (const [method, path, body, status, text] of rows) {
    const answer = await call(method, path, body)
    t.same([answer.status, answer.text], [status, text], `${method} ${path}`)
    t.match(answer.headers, { 'content-type': 'text/plain; charset=utf-8', 'x-content-type-options': 'nosniff' })
  }
  t.equal((await call('OPTIONS', '/policy')).headers['allow'], 'GET, POST, PUT, PATCH, DELETE')
  t.equal((await call('HEAD', '/policy')).status, 405)
})

t.test('who may', async (t) => {
  const strangers: string[] = []
  const { call, bodies } = await setUp(t, { token: 'secret', unauthorized: (from) => void strangers.push(from) })
  for (const headers of [{}, { 'opensandbox-egress-auth': 'wrong' }, { 'opensandbox-egress-auth': '' }, { authorization: 'secret' }]) {
    for (const method of ['GET', 'POST', 'OPTIONS']) t.same(await call(method, '/policy', '{}', headers).then(({ status, text }) => [status, text]), [401, 'unauthorized\n'], `${method} ${JSON.stringify(headers)}`)
  }
  t.same(strangers, Array(12).fill('inside'), 'each is told, with where it came from')
  t.equal((await call('GET', '/policy', '', { 'OPENSANDBOX-EGRESS-AUTH': 'secret' })).status, 200)
  t.equal((await call('GET', '/healthz')).status, 200, 'health needs none')
  for (const headers of [{ origin: 'http://evil.example' }, { origin: 'null' }, { origin: '' }, { 'sec-fetch-site': 'cross-site' }, { 'sec-fetch-site': 'same-site' }, { 'sec-fetch-site': '' }]) {
    t.same(await call('POST', '/policy', '{}', { 'opensandbox-egress-auth': 'secret', ...headers }).then(({ status, text }) => [status, text]), [403, 'forbidden\n'], `a browser's page: ${JSON.stringify(headers)}`)
  }
  t.same(bodies, [])
  for (const site of ['none', 'same-origin']) t.equal((await call('POST', '/policy', '{}', { 'opensandbox-egress-auth': 'secret', 'sec-fetch-site': site })).status, 200, `${site}: typed by hand`)
})

t.test('looking in', async (t) => {
  let problem = ''
  const { call } = await setUp(t, { inspect: async () => problem })
  t.same(JSON.parse((await call('GET', '/policy/effective')).text), { enforcementMode: 'dns+nft', defaultAction: 'deny', egress: [{ action: 'allow', target: 'a.example' }], operatorRules: 0, floor: ['169.254.169.254'] })
  t.same(await call('GET', '/metrics').then(({ status, text }) => [status, text]), [200, 'egress_x 1\n'])
  t.same(await call('GET', '/readyz').then(({ status, text }) => [status, text]), [200, 'ready'])
  problem = 'the rules are gone'
  t.same(await call('GET', '/readyz').then(({ status, text }) => [status, text]), [503, 'the rules are gone\n'])
  const closed = await setUp(t, { token: 'secret' })
  for (const path of ['/policy/effective', '/metrics', '/readyz']) t.equal((await closed.call('GET', path)).status, 401, path)
})

t.test('one request for each connection from inside', async (t) => {
  const { port } = await setUp(t)
  const speak = (text: string): Promise<number> => new Promise((resolve) => {
    let heard = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(text))
    socket.setEncoding('utf8').on('data', (part: string) => (heard += part)).on('close', () => resolve(heard.match(/HTTP\/1\.1 /g)?.length ?? 0)).on('error', () => undefined)
  })
  const request = 'GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n'
  t.equal(await speak(request), 1, 'it is answered, and the connection ends')
  t.ok((await speak(request.repeat(2000))) <= 1, 'whoever asks for more in a row is cut off')
})

t.test('not ready yet', async (t) => {
  const { call } = await setUp(t, { unready: () => 'not ready', keeper: () => null })
  t.same(await call('GET', '/healthz').then(({ status, text }) => [status, text]), [503, 'not ready\n'])
  for (const method of ['GET', 'PUT']) t.equal((await call(method, '/policy')).status, 503)
})

t.test('a body that is too long is told as a refusal', async (t) => {
  const told: number[] = []
  const { call } = await setUp(t, { refused: ({ status }) => void told.push(status) })
  t.equal((await call('POST', '/policy', 'x'.repeat((1 << 20) + 1))).status, 413)
  t.same(told, [413])
})
