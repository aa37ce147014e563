/** Secured sandboxes: the original's decision table and signed routes, end to end. */
import type { IncomingHttpHeaders } from 'node:http'
import t from 'tap'
import { mintAccessToken, parseAccessKeys, signShort, type Minting } from '#policies/access.ts'
import { wholeSandbox } from '#policies/access-token.ts'
import { ask, bodyOf, entry, get, keysText, RawClient, startGateway, startHttp, statusOf } from './support.ts'

const parsed = parseAccessKeys(keysText)
const secret = parsed.ok ? (parsed.keys.get('a') as Uint8Array) : new Uint8Array()
const future = 'x2qxvk'

t.test('the decision table, in header and URI mode', async (t) => {
  await using upstream = await startHttp((request, response) => response.end(request.url))
  const { port } = upstream
  const routes = [{ id: 'sec', secureAccessToken: 'tok' }, { id: 'open' }, { id: 'blank', secureAccessToken: '  ' }]
  await using withKeys = await startGateway(routes, { mode: 'auto', secureAccessKeys: keysText })
  await using without = await startGateway(routes, { mode: 'auto' })
  const good = signShort('a', secret, 'sec', port, future)
  const expired = signShort('a', secret, 'sec', port, '1')
  const to = (token: string): string => `OpenSandbox-Ingress-To: ${token}`
  const hdr = (value: string): string => `OpenSandbox-Secure-Access:${value}`
  const rows: [string, typeof withKeys, string, number, string][] = [
    ['open, header ignored', withKeys, get('/', to(`open-${port}`), hdr(' wrong')), 200, '/'],
    ['blank token is open', withKeys, get('/', to(`blank-${port}`)), 200, '/'],
    ['open, signature never checked', withKeys, get('/', to(`open-${port}-${future}-00000000z`)), 200, '/'],
    ['header', without, get('/p', to(`sec-${port}`), hdr(' tok ')), 200, '/p'],
    ['header wins over a bad signature', withKeys, get('/', to(`sec-${port}-${future}-00000000z`), hdr('tok')), 200, '/'],
    ['wrong header', withKeys, get('/', to(`sec-${port}`), hdr('no')), 401, 'signature: secure access header mismatch'],
    ['empty header is present', withKeys, get('/', to(`sec-${port}`), hdr('')), 401, 'signature: secure access header mismatch'],
    ['wrong header, good signature: no fall-through', withKeys, get('/', to(`sec-${port}-${future}-${good}`), hdr('no')), 401, 'signature: secure access header mismatch'],
    ['first of two headers counts', withKeys, get('/', to(`sec-${port}`), hdr('tok'), hdr('no')), 200, '/'],
    ['first of two headers counts, the other way', withKeys, get('/', to(`sec-${port}`), hdr('no'), hdr('tok')), 401, 'mismatch'],
    ['nothing', withKeys, get('/', to(`sec-${port}`)), 401, 'signature: signature required for this sandbox'],
    ['signature, no keys', without, get('/', to(`sec-${port}-${future}-${good}`)), 503, 'signature: ingress verifier not configured'],
    ['signature', withKeys, get('/p?q', to(`sec-${port}-${future}-${good}`)), 200, '/p?q'],
    ['signature in the deprecated header', withKeys, get('/', `OPEN-SANDBOX-INGRESS: sec-${port}-${future}-${good}`), 200, '/'],
    ['signature in Host', withKeys, get('/').replace('Host: gateway', `Host: sec-${port}-${future}-${good}.gw.ex`), 200, '/'],
    ['signature for another port', withKeys, get('/', to(`sec-${port === 1 ? 2 : port - 1}-${future}-${good}`)), 401, 'signature: unauthorized: signature mismatch'],
    ['unknown key', withKeys, get('/', to(`sec-${port}-${future}-${good.slice(0, 8)}z`)), 401, 'signature: unauthorized: unknown signed_key_id'],
    ['expired, checked before the digest', withKeys, get('/', to(`sec-${port}-1-${expired}`)), 401, 'signature: access expired'],
    ['expired with a bad signature', withKeys, get('/', to(`sec-${port}-1-00000000a`)), 401, 'signature: access expired'],
    ['URI', withKeys, get(`/sec/${port}/${future}/${good}/p/q?z=1`), 200, '/p/q?z=1'],
    ['URI with header strips the segments, too', withKeys, get(`/sec/${port}/${future}/${good}/p`, hdr('tok')), 200, '/p'],
    ['URI on an open sandbox: the segments are its own', withKeys, get(`/open/${port}/${future}/${good}/p`), 200, `/${future}/${good}/p`],
    ['URI, malformed signature is none', withKeys, get(`/sec/${port}/x2qxvj/ABCDEFGHI/p`), 401, 'signature: signature required for this sandbox'],
    ['header mode, malformed signature is no route', withKeys, get('/', to(`sec-${port}-${future}-ABCDEFGHI`)), 400, 'invalid ingress route'],
    ['preflights carry no header', withKeys, get('/', to(`sec-${port}`)).replace('GET', 'OPTIONS'), 401, 'signature required'],
  ]
  for (const [name, gateway, request, status, text] of rows) {
    const answer = await ask(gateway.port, request)
    t.equal(statusOf(answer), status, name)
    t.ok(bodyOf(answer).includes(text), `${name}: ${bodyOf(answer).trim()}`)
  }
  const logged = [...withKeys.lines, ...without.lines].join('')
  for (const leak of [good, future, 'tok"', 'z=1']) t.notOk(logged.includes(leak), `the access log does not hold ${leak}`)
})

t.test('an EventSource of a page gets in by the cookie of the page, event by event, and again after a break', async (t) => {
  const seen: IncomingHttpHeaders[] = []
  let say: (text: string) => void = () => undefined
  let cut: () => void = () => undefined
  await using upstream = await startHttp((request, response) => {
    seen.push(request.headers)
    response.writeHead(200, { 'content-type': 'text/event-stream' }).flushHeaders()
    say = (text) => void response.write(text)
    cut = () => void response.destroy()
  })
  await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok' }], { mode: 'wildcard', baseDomain: 'gw.test', secureAccessKeys: keysText })
  const token = mintAccessToken({ id: 'sec', port: upstream.port, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: BigInt(Math.round(Date.now() / 1000) + 600) })
  const host = (request: string): string => request.replace('Host: gateway', `Host: sec-${upstream.port}.gw.test`)
  const entered = await ask(gateway.port, host(get(`/?sallyport_access=${token}`)))
  const cookie = /set-cookie: (__Host-sallyport-access=[^;]+);/i.exec(entered)?.[1] ?? ''
  // The fields of the HTML standard (server-sent events, 9.2.2 and 9.2.3).
  const source = (...more: string[]): string => host(get('/events', 'Accept: text/event-stream', 'Cache-Control: no-cache', 'Sec-Fetch-Mode: cors', `Cookie: theirs=1; ${cookie}`, ...more))
  for (const [turn, last] of [[1, ''], [2, 'Last-Event-ID: 12']] as const) {
    const client = new RawClient(gateway.port).send(source(...(last === '' ? [] : [last])))
    await client.until((c) => c.received.includes('\r\n\r\n'))
    t.match(client.received, /^HTTP\/1\.1 200 [^]*content-type: text\/event-stream/i, `turn ${turn}: the head comes before any event`)
    for (const id of [turn * 10 + 1, turn * 10 + 2]) {
      say(`id: ${id}\ndata: x\n\n`)
      await client.until((c) => c.received.includes(`id: ${id}\ndata: x\n\n`))
    }
    cut()
    await client.untilClosed()
    t.notOk(client.received.endsWith('0\r\n\r\n'), `turn ${turn}: a break is one, so that the page connects again`)
  }
  t.same(seen.map((headers) => [headers.cookie, headers['last-event-id']]), [['theirs=1', undefined], ['theirs=1', '12']], 'the sandbox sees its own cookies, and where to go on')
  t.equal(statusOf(await ask(gateway.port, source().replace(`; ${cookie}`, ''))), 401, 'without the cookie there is no way in')
})

t.test('the page of a neighbouring sandbox gets nowhere with the cookie that its visitor has for this one', async (t) => {
  let reached = 0
  await using upstream = await startHttp((_request, response) => void (reached++, response.end('in')), (server) => server.on('upgrade', (_request, socket) => void (reached++, socket.end('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))))
  const { port } = upstream
  const routes = [{ id: 'sec', secureAccessToken: 'tok' }]
  const token = mintAccessToken({ id: 'sec', port, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: BigInt(Math.round(Date.now() / 1000) + 600) })
  const host = `sec-${port}.gw.test`
  const [own, neighbour, outer] = [`Origin: https://${host}`, 'Origin: https://b-80.gw.test', 'Origin: https://outer.test']
  const cookie = `Cookie: __Host-sallyport-access=${token}`
  const socket = ['Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==']
  const page = (method: string, ...headers: string[]): string => get('/p', ...headers).replace('GET', method).replace('Host: gateway', `Host: ${host}`)
  const upgrade = (...headers: string[]): string => page('GET', ...socket, ...headers).replace('Connection: close', 'Connection: Upgrade')
  const rows: [why: string, request: string, status: number][] = [
    ['its own WebSocket', upgrade(cookie, own), 101],
    ["a neighbour's", upgrade(cookie, neighbour), 401],
    ["a neighbour's, in a browser that says more", upgrade(cookie, neighbour, 'Sec-Fetch-Site: same-site', 'Sec-Fetch-Mode: websocket'), 401],
    ['that of a page without an origin', upgrade(cookie, 'Origin: null'), 401],
    ["a neighbour's with a token of its own", upgrade('Sallyport-Access: ' + token, cookie, neighbour), 101],
    ['its own form', page('POST', cookie, own), 200],
    ["a neighbour's", page('POST', cookie, neighbour), 401],
    ["a neighbour's image, which has no Origin", page('GET', cookie, 'Sec-Fetch-Site: same-site', 'Sec-Fetch-Mode: no-cors'), 401],
    ["a neighbour's link", page('GET', cookie, 'Sec-Fetch-Site: same-site', 'Sec-Fetch-Mode: navigate'), 200],
    ['a token in the address needs no cookie, and gets none, which would not count the next moment', page('GET', cookie, neighbour).replace('/p ', `/p?sallyport_access=${token} `), 200],
    ['nor does the access header', page('POST', 'OpenSandbox-Secure-Access: tok', cookie, neighbour), 200],
    ['the name outside, said by nobody we trust', page('POST', cookie, outer, 'X-Forwarded-Host: outer.test'), 401],
  ]
  const proxied: typeof rows = [
    ['the name outside', page('POST', cookie, outer, 'X-Forwarded-Host: outer.test'), 200],
    ['the name outside, of several', page('POST', cookie, outer, 'X-Forwarded-Host: outer.test, inner.test'), 200],
    ['the name inside', page('POST', cookie, own, 'X-Forwarded-Host: outer.test'), 200],
    ["a neighbour's", page('POST', cookie, neighbour, 'X-Forwarded-Host: outer.test'), 401],
  ]
  for (const [trustedProxies, table] of [[[], rows], [['127.0.0.0/8'], proxied]] as const) {
    await using gateway = await startGateway(routes, { mode: 'wildcard', baseDomain: 'gw.test', secureAccessKeys: keysText, trustedProxies: [...trustedProxies], authFailuresPerMinute: 1 })
    for (const [why, request, status] of table) {
      const before = reached
      const answer = await ask(gateway.port, request)
      t.equal(statusOf(answer), status, why)
      t.equal(reached - before, status === 200 || status === 101 ? 1 : 0, `${why}: what the sandbox saw`)
      if (status === 401) t.match(bodyOf(answer), 'access token in a cookie does not count for requests of another origin', why)
    }
  }
  await using shared = await startGateway(routes, { mode: 'uri', uriCookies: true, secureAccessKeys: keysText })
  const inUri = (origin: string): string => get(`/sec/${port}/p`, `Cookie: sallyport-access=${token}`, origin).replace('GET', 'POST')
  t.equal(statusOf(await ask(shared.port, inUri('Origin: http://gateway'))), 200, 'in URI mode all sandboxes are one origin')
  t.equal(statusOf(await ask(shared.port, inUri('Origin: http://elsewhere.test'))), 401, 'but the rest of the world is not')
})

t.test('guessing is slow, and a proof that cannot be guessed works all the while', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('in'))
  const { port } = upstream
  const long = 'x'.repeat(22)
  const routes = [{ id: 'sec', secureAccessToken: long, epoch: 3 }, { id: 'weak', secureAccessToken: long.slice(1) }]
  const soon = BigInt(Math.floor(Date.now() / 1000) + 600)
  const mint = (change: Partial<Minting> = {}): string => mintAccessToken({ id: 'sec', port, epoch: 3, scope: wholeSandbox, keyId: 'a', secret, expires: soon, ...change })
  const signed = (signature: string, expires = future): string => get(`/sec/${port}/${expires}/${signature}/`)
  const header = (id: string, value: string): string => get(`/${id}/${port}/`, `OpenSandbox-Secure-Access: ${value}`)
  const strong = (value: string): string => get(`/sec/${port}/`, `Sallyport-Access: ${value}`)
  const cookie = (value: string): string => get(`/sec/${port}/`, `Cookie: sallyport-access=${value}`)
  const good = signShort('a', secret, 'sec', port, future)
  const kinds: [what: string, wrong: (n: number) => string, counts: 'as a guess' | 'as wrong' | 'not at all'][] = [
    ['signatures', (n) => signed(`0000000${n}a`), 'as a guess'],
    ['signatures of an unknown key', (n) => signed(`0000000${n}z`), 'as a guess'],
    ['access headers', (n) => header('sec', `no${n}`), 'as wrong'],
    ['access headers of a weak token', (n) => header('weak', `no${n}`), 'as a guess'],
    ['tokens in a header', (n) => strong(mint({ port: n + 1 })), 'as wrong'],
    ['tokens in a path', (n) => get(`/sec/${port}/${mint({ port: n + 1 })}/`), 'as wrong'],
    ['tokens in a query', (n) => get(`/sec/${port}/?sallyport_access=${mint({ port: n + 1 })}`), 'as wrong'],
    ['tokens that are none', (n) => strong(`sp1.${n}`), 'as wrong'],
    ['no proof at all', () => get(`/sec/${port}/`), 'not at all'],
    ['signatures that have expired', () => signed(signShort('a', secret, 'sec', port, '1'), '1'), 'not at all'],
    ['tokens that have expired', () => strong(mint({ expires: 1n })), 'not at all'],
    ['tokens that were revoked', () => strong(mint({ epoch: 2 })), 'not at all'],
    ['tokens for other methods', () => strong(mint({ scope: { methods: ['PUT'], pathPrefix: '/' } })), 'not at all'],
    ['tokens for other paths', () => strong(mint({ scope: { methods: null, pathPrefix: '/api' } })), 'not at all'],
    ['cookies, which come unasked', (n) => cookie(mint({ port: n + 1 })), 'not at all'],
  ]
  for (const [what, wrong, counts] of kinds) {
    await using gateway = await startGateway(routes, { mode: 'uri', uriCookies: true, secureAccessKeys: keysText, authFailuresPerMinute: 5 })
    const status = async (request: string): Promise<number> => statusOf(await ask(gateway.port, request))
    const seen: number[] = []
    for (let n = 0; n < 7; n++) seen.push(await status(wrong(n)))
    t.same(seen, [401, 401, 401, 401, 401, ...(counts === 'not at all' ? [401, 401] : [429, 429])], what)
    const guessable = counts === 'as a guess' ? 429 : 200
    t.equal(await status(signed(good)), guessable, `${what}: a good signature`)
    t.equal(await status(header('weak', long.slice(1))), guessable, `${what}: the access header with a token that is no secret`)
    t.equal(await status(header('sec', long)), 200, `${what}: with one that is`)
    t.equal(await status(strong(mint())), 200, `${what}: a strong token`)
    t.equal(await status(cookie(mint())), 200, `${what}: in a cookie`)
    t.equal(await status(get(`/sec/${port}/`)), 401, `${what}: who shows nothing is asked for something`)
  }
  await using gateway = await startGateway(routes, { mode: 'uri', secureAccessKeys: keysText, authFailuresPerMinute: 1 })
  await ask(gateway.port, signed('00000000a'))
  t.match(await ask(gateway.port, signed(good)), /^HTTP\/1\.1 429 [^]*\r\nretry-after: /i)
})

t.test('who guesses locks out nobody else behind the same proxy', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('in'))
  const { port } = upstream
  await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok' }], { mode: 'uri', secureAccessKeys: keysText, authFailuresPerMinute: 2, trustedProxies: ['127.0.0.0/8'] })
  const good = `/sec/${port}/${future}/${signShort('a', secret, 'sec', port, future)}/`
  const from = (client: string, target: string): Promise<string> => ask(gateway.port, get(target, `X-Forwarded-For: ${client}`))
  for (let i = 0; i < 2; i++) t.equal(statusOf(await from('192.0.2.1', `/sec/${port}/${future}/0000000${i}a/`)), 401)
  const rows: [client: string, status: number, why: string][] = [
    ['192.0.2.1', 429, 'who guessed has to wait'],
    ['192.0.2.2', 200, 'another client of the same proxy does not'],
    ['192.0.2.2, 192.0.2.1', 429, 'what the guesser claims of itself is not believed'],
    ['192.0.2.1:4711', 429, 'nor is it somebody else on every connection'],
    ['::ffff:192.0.2.1', 429, 'nor when it is written the IPv6 way'],
    ['::ffff:192.0.2.2', 200, 'which others are, too'],
  ]
  for (const [client, status, why] of rows) t.equal(statusOf(await from(client, good)), status, why)
})

t.test('access is asked before readiness: who may not in learns nothing of the state', async (t) => {
  for (const hideMissing of [false, true]) {
    await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok', state: 'Paused' }, { id: 'bare', secureAccessToken: 'tok', host: '' }], { mode: 'uri', secureAccessKeys: keysText, hideMissing })
    for (const [id, what] of [['sec', 'paused'], ['bare', 'no address yet']] as const) {
      const rows: [why: string, status: number, text: string, path: string, ...headers: string[]][] = [
        ['no proof', 401, 'signature required', '/'],
        ['a wrong header', 401, 'signature: ', '/', 'OpenSandbox-Secure-Access: no'],
        ['a wrong signature', 401, 'signature: ', `/${future}/00000000a/`],
        ['a wrong token', 401, '', '/', 'Sallyport-Access: sp1.nonsense'],
        ['the right header', 503, `sandbox not ready: ${id}`, '/', 'OpenSandbox-Secure-Access: tok'],
        ['the right signature', 503, `sandbox not ready: ${id}`, `/${future}/${signShort('a', secret, id, 80, future)}/`],
      ]
      for (const [why, status, text, path, ...headers] of rows) {
        const answer = await ask(gateway.port, get(`/${id}/80${path}`, ...headers))
        const name = `${what}, ${why}${hideMissing ? ', hideMissing' : ''}`
        t.equal(statusOf(answer), status, name)
        t.ok(bodyOf(answer).includes(text), `${name}: ${bodyOf(answer)}`)
      }
    }
  }
})

t.test('hideMissing: an unknown sandbox looks like a refused one, whatever is tried', async (t) => {
  const plain = (answer: string): string => answer.replace(/x-request-id: .*\r\n|Date: .*\r\n|"request_id":"[^"]*"/gi, '')
  const expired = signShort('a', secret, 'sec', 80, '1')
  const elsewhere = mintAccessToken({ id: 'else', port: 80, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: 4_000_000_000n })
  const revoked = mintAccessToken({ id: 'sec', port: 80, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: 4_000_000_000n })
  const rows: [name: string, path: string, ...headers: string[]][] = [
    ['nothing', '/'],
    ['a bad signature', `/${future}/00000000a/`],
    ['an unknown key', `/${future}/00000000z/`],
    ['an expired signature', `/1/${expired}/`],
    ['a wrong header', '/', 'OpenSandbox-Secure-Access: no'],
    ['a wrong header and a signature', `/${future}/00000000a/`, 'OpenSandbox-Secure-Access: no'],
    ['a malformed token', '/', 'Sallyport-Access: sp1.x'],
    ['a token for another sandbox', `/${elsewhere}/`],
    ['a revoked token', `/${revoked}/`],
    ['a token in the query', `/?sallyport_access=${elsewhere}`],
    ['a token and a signature', `/${future}/00000000a/`, `Sallyport-Access: ${elsewhere}`],
    ['as JSON', `/${future}/00000000a/`, 'Accept: application/json'],
  ]
  for (const secureAccessKeys of [keysText, '']) {
    await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok', epoch: 1 }], { mode: 'auto', hideMissing: true, secureAccessKeys, authFailuresPerMinute: 0 })
    for (const [name, path, ...headers] of rows) {
      const [unknown, refused] = [await ask(gateway.port, get(`/nobody/80${path}`, ...headers)), await ask(gateway.port, get(`/sec/80${path}`, ...headers))]
      t.equal(plain(unknown), plain(refused), `${name}, ${secureAccessKeys === '' ? 'without' : 'with'} keys`)
      t.equal(statusOf(unknown), 401, name)
      const [, expires, signature] = path.split('/')
      const token = signature === undefined || signature === '' ? '80' : `80-${expires}-${signature}`
      t.equal(plain(await ask(gateway.port, get('/', `OpenSandbox-Ingress-To: nobody-${token}`, ...headers))), plain(await ask(gateway.port, get('/', `OpenSandbox-Ingress-To: sec-${token}`, ...headers))), `${name}, by header`)
    }
  }
  for (const extra of [[], [`Sallyport-Access: ${elsewhere}`]]) {
    const statuses: number[][] = []
    for (const id of ['nobody', 'sec']) {
      await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok' }], { mode: 'uri', hideMissing: true, secureAccessKeys: keysText, authFailuresPerMinute: 3 })
      const seen: number[] = []
      for (let n = 0; n < 5; n++) seen.push(statusOf(await ask(gateway.port, get(`/${id}/80/${future}/0000000${n}a/`, ...extra))))
      statuses.push(seen)
    }
    t.same(statuses, [[401, 401, 401, 429, 429], [401, 401, 401, 429, 429]], 'guessing is as slow where nobody is')
  }
  const slow: typeof rows = rows.filter(([name]) => name !== 'nothing')
  for (const [name, path, ...headers] of [...slow, ['nothing', '/'], ['a cookie', '/', `Cookie: sallyport-access=${elsewhere}`]] as typeof rows) {
    const statuses: number[][] = []
    for (const id of ['nobody', 'sec']) {
      await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok', epoch: 1 }], { mode: 'uri', uriCookies: true, hideMissing: true, secureAccessKeys: keysText, authFailuresPerMinute: 2 })
      const seen: number[] = []
      for (let n = 0; n < 4; n++) seen.push(statusOf(await ask(gateway.port, get(`/${id}/80${path}`, ...headers))))
      statuses.push(seen)
    }
    const wanted = slow.some(([counted]) => counted === name) ? [401, 401, 429, 429] : [401, 401, 401, 401]
    t.same(statuses, [wanted, wanted], `${name}: as slow where nobody is`)
  }
})

t.test('our strong token: header, path segment, query parameter, cookie', async (t) => {
  await using upstream = await startHttp((request, response) => {
    if (request.url === '/move') return void response.writeHead(302, { location: `${request.headers['x-forwarded-prefix'] ?? ''}/there` }).end()
    response.end(JSON.stringify([request.url, request.rawHeaders.join(' ')]))
  })
  const { port } = upstream
  const routes = [{ id: 'sec', secureAccessToken: 'tok', epoch: 3 }, { id: 'open' }]
  await using gateway = await startGateway(routes, { mode: 'auto', baseDomain: 'gw.test', secureAccessKeys: keysText })
  const soon = BigInt(Math.floor(Date.now() / 1000) + 600)
  const mint = (change: Partial<Minting> = {}): string => mintAccessToken({ id: 'sec', port, epoch: 3, scope: wholeSandbox, keyId: 'a', secret, expires: soon, ...change })
  const token = mint()
  const host = (request: string): string => request.replace('Host: gateway', `Host: sec-${port}.gw.test`)
  const accept = `Sallyport-Access: ${token}`
  const ok: [string, string, string][] = [
    ['header, by routing header', get('/p', `OpenSandbox-Ingress-To: sec-${port}`, accept), '/p'],
    ['header, by host', host(get('/p', accept)), '/p'],
    ['header, URI mode', get(`/sec/${port}/p?q`, accept), '/p?q'],
    ['segment', get(`/sec/${port}/${token}/p?q`), '/p?q'],
    ['segment alone', get(`/sec/${port}/${token}`), '/'],
    ['parameter, URI mode: no cookie, this request only', get(`/sec/${port}/p?a=1&sallyport_access=${token}&b=%2F`), '/p?a=1&b=%2F'],
    ['parameter, another method', host(get(`/p?sallyport_access=${token}`)).replace('GET', 'DELETE'), '/p'],
    ['cookie among others', host(get('/p', `Cookie: a=1; __Host-sallyport-access=${token}; b=2`)), '/p'],
    ['cookies of both kinds, of which none counts', get(`/sec/${port}/p`, accept, `Cookie: sallyport-access=${token}; a=1; __Host-sallyport-access=${token}; b=2`), '/p'],
    ['cookies in two lines', get(`/sec/${port}/p`, accept, 'Cookie: a=1; b=2', `Cookie: sallyport-access=${token}`), '/p'],
    ['the first of several parameters counts, and none is left', get(`/sec/${port}/p?sallyport_access=${token}&a=1&sallyport_access=sp1.nonsense&sallyport_access=`), '/p?a=1'],
    ['an open sandbox sees none of several', get(`/open/${port}/p?a=1&sallyport_access=${token}&sallyport_access=${token}`), '/p?a=1'],
    ['an open sandbox does not see one either', get(`/open/${port}/${token}/p?sallyport_access=${token}`, accept, `Cookie: __Host-sallyport-access=${token}`), '/p'],
    ['scope', get(`/sec/${port}/${mint({ scope: { methods: ['GET'], pathPrefix: '/api' } })}/api/x`), '/api/x'],
    ['a Referer with a segment', get(`/sec/${port}/${token}/p`, `Referer: http://gateway/sec/${port}/${token}/page`), '/p'],
    ['a Referer with a parameter', host(get('/p', accept, `Referer: http://sec-${port}.gw.test/?a=1&sallyport_access=${token}`)), '/p'],
    ['a newer epoch than the sandbox knows', get(`/sec/${port}/${mint({ epoch: 4 })}/p`), '/p'],
  ]
  for (const [name, request, path] of ok) {
    const answer = await ask(gateway.port, request)
    t.equal(statusOf(answer), 200, name)
    const [url, headers] = JSON.parse(bodyOf(answer)) as [string, string]
    t.equal(url, path, name)
    t.notMatch(headers, /sp1\.|sallyport/i, `${name}: the sandbox never sees the token`)
    if (name.startsWith('cookie')) t.ok(headers.includes('Cookie a=1; b=2'), `${name}: ${headers}`)
  }

  const entered = await ask(gateway.port, host(get(`//evil.test/p?x=1&sallyport_access=${token}`)))
  t.equal(statusOf(entered), 302, 'a browser is sent on without the token')
  t.match(entered, /\r\nlocation: \/\.\/\/evil\.test\/p\?x=1\r\n/i, 'and cannot be sent elsewhere')
  const outside: [target: string, why: string][] = [
    ['//evil.test', 'two slashes begin an authority'],
    ['///evil.test', 'browsers take three for two'],
    ['/\\evil.test', 'browsers take a backslash for a slash'],
    ['/\\\\/evil.test', 'or two of them'],
    ['/%5Cevil.test', 'an escape is none'],
    ['/%2Fevil.test', 'nor is this one'],
    ['/@evil.test', 'a path is no user information'],
    ['/.//evil.test', 'a dot that is taken away leaves no authority'],
  ]
  for (const [target, why] of outside) {
    for (const method of ['GET', 'HEAD']) {
      const answer = await ask(gateway.port, host(get(`${target}?sallyport_access=${token}`)).replace('GET', method))
      t.equal(statusOf(answer), 302, `${method} ${target}`)
      const origin = `http://sec-${port}.gw.test`
      const url = new URL(/\r\nlocation: (.*)\r\n/i.exec(answer)?.[1] ?? '', `${origin}/page`)
      t.equal(url.origin, origin, `${method} ${target}: as a browser reads it, it stays on the host: ${why}`)
    }
  }
  const cookie = /set-cookie: (__Host-sallyport-access=[^;]+); Path=\/; Secure; HttpOnly; SameSite=Lax; Max-Age=(\d+)\r\n/i.exec(entered)
  t.ok(Number(cookie?.[2]) > 500 && Number(cookie?.[2]) <= 600, 'no longer than the token')
  t.equal(statusOf(await ask(gateway.port, host(get('/asset.css', `Cookie: ${cookie?.[1]}`)))), 200, 'and what it fetches then follows')
  t.equal(statusOf(await ask(gateway.port, get(`/sec/${port}/asset.css`, `Cookie: ${cookie?.[1]}`))), 401, 'but not in URI mode, where all sandboxes share one origin')
  t.equal(statusOf(await ask(gateway.port, get(`/sec/${port}/asset.css`, `Cookie: sallyport-access=${token}`))), 401, 'nor does the cookie made for URI mode, unless configured')
  t.match(await ask(gateway.port, get(`/sec/${port}/${token}/move`)), `location: /sec/${port}/${token}/there\r\n`, 'a redirect keeps the entry')

  const own = JSON.parse(bodyOf(await ask(gateway.port, get(`/open/${port}/${token}x/p`, `Referer: http://gateway/open/${port}/page`)))) as [string, string]
  t.equal(own[0], `/${token}x/p`, 'what is no whole token may be a path of an open sandbox')
  t.match(own[1], `referer http://gateway/open/${port}/page`, 'and a Referer without one passes')

  const signed = (signature: string, ...headers: string[]): string => get('/p', ...headers).replace('Host: gateway', `Host: sec-${port}-${future}-${signature}.gw.test`)
  const [good, cookies] = [signShort('a', secret, 'sec', port, future), (value: string): string => `Cookie: __Host-sallyport-access=${value}`]
  t.equal(statusOf(await ask(gateway.port, signed(good, cookies('sp1.nonsense')))), 200, 'a signature is asked before a cookie, which a browser sends unasked')

  const bad: [string, string, string][] = [
    ['a wrong signature, which no cookie makes good', signed('00000000a', cookies(token)), 'signature: unauthorized: signature mismatch'],
    ['the first of two parameters', get(`/sec/${port}/p?sallyport_access=sp1.nonsense&sallyport_access=${token}`), 'is malformed'],
    ['a character too many', get(`/sec/${port}/${token}x/p`), 'is malformed'],
    ['a character too many, with another proof', get(`/sec/${port}/${token}x/p`, 'Sallyport-Access: sp1.nonsense'), 'is malformed'],
    ['another sandbox', get(`/sec/${port}/${mint({ id: 'open' })}/`), 'is not valid for this sandbox and port'],
    ['another port', get(`/sec/${port}/${mint({ port: 1 })}/`), 'is not valid'],
    ['a changed scope', get(`/sec/${port}/${token.split('.').with(4, mint({ scope: { methods: ['PUT'], pathPrefix: '/' } }).split('.')[4] as string).join('.')}/`), 'is not valid'],
    ['revoked', get(`/sec/${port}/${mint({ epoch: 2 })}/`), 'was revoked'],
    ['expired', get(`/sec/${port}/${mint({ expires: 1n })}/`), 'has expired'],
    ['beyond its scope', get(`/sec/${port}/${mint({ scope: { methods: null, pathPrefix: '/api' } })}/apix`), 'does not cover'],
    ['out of its scope by dots', get(`/sec/${port}/${mint({ scope: { methods: null, pathPrefix: '/api' } })}/api/..%2fadmin`), 'does not cover'],
    ['a bad header decides alone', get(`/sec/${port}/${token}/`, 'Sallyport-Access: sp1.nonsense'), 'is malformed'],
    ['the original header decides before it', get(`/sec/${port}/${token}/`, 'OpenSandbox-Secure-Access: no'), 'secure access header mismatch'],
  ]
  for (const [name, request, text] of bad) {
    const answer = await ask(gateway.port, request)
    t.equal(statusOf(answer), 401, name)
    t.ok(bodyOf(answer).includes(text), `${name}: ${bodyOf(answer)}`)
  }
  gateway.gateway.table.put(entry({ id: 'sec', secureAccessToken: 'tok', epoch: 4 }))
  t.equal(statusOf(await ask(gateway.port, get(`/sec/${port}/${token}/p`))), 401, 'raising the epoch revokes what was minted before')
  t.notMatch(gateway.lines.join(''), /sp1\.a/, 'no token in the log')

  await using shared = await startGateway(routes, { mode: 'uri', uriCookies: true, secureAccessKeys: keysText })
  const redirected = await ask(shared.port, get(`/sec/${port}/p?sallyport_access=${token}`))
  t.match(redirected, `location: /sec/${port}/p\r\n`)
  t.match(redirected, `set-cookie: sallyport-access=${token}; Path=/sec/${port}/; HttpOnly; SameSite=Lax`)
  t.equal(statusOf(await ask(shared.port, get(`/sec/${port}/p`, `Cookie: sallyport-access=${token}`))), 200, 'configured: the cookie counts in URI mode')

  await using behind = await startGateway(routes, { mode: 'auto', baseDomain: 'gw.test', uriCookies: true, secureAccessKeys: keysText, trustedProxies: ['127.0.0.0/8'] })
  const outer = 'X-Forwarded-Prefix: /outer'
  const [byPath, byHost] = [await ask(behind.port, get(`/sec/${port}/p?sallyport_access=${token}`, outer)), await ask(behind.port, host(get(`/p?sallyport_access=${token}`, outer)))]
  t.match(byPath, `location: /outer/sec/${port}/p\r\n`, 'below the prefix that a proxy of ours took off')
  t.match(byPath, `set-cookie: sallyport-access=${token}; Path=/outer/sec/${port}/; HttpOnly`, 'where the browser sends it')
  t.match(byHost, 'location: /outer/p\r\n')
  t.match(byHost, `set-cookie: __Host-sallyport-access=${token}; Path=/; Secure`)
  t.match(await ask(behind.port, get(`/sec/${port}/${token}/move`, outer)), `location: /outer/sec/${port}/${token}/there\r\n`, 'a redirect keeps prefix and entry')
})
