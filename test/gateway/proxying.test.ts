/** What HTTP promises, through the gateway, against real servers on loopback. What happens when a side breaks it: `breaking-off.test.ts`. */
import { createHash } from 'node:crypto'
import { request as httpRequest, type IncomingMessage } from 'node:http'
import { PassThrough } from 'node:stream'
import t from 'tap'
import { ask, bodyOf, eventually, get, RawClient, startGateway, startHttp, startRaw, statusOf } from './support.ts'

/** Answers with what it was asked. */
function echo(request: IncomingMessage, response: import('node:http').ServerResponse): void {
  const hash = createHash('sha256')
  let bytes = 0
  request.on('data', (chunk: Buffer) => {
    bytes += chunk.length
    hash.update(chunk)
  })
  request.on('end', () => response.end(JSON.stringify({ method: request.method, url: request.url, raw: request.rawHeaders, bytes, sha256: hash.digest('hex') })))
}
type Echo = { method: string; url: string; raw: string[]; bytes: number; sha256: string }

function pairs(raw: readonly string[]): [string, string][] {
  return Array.from({ length: raw.length / 2 }, (_none, i) => [(raw[2 * i] as string).toLowerCase(), raw[2 * i + 1] as string])
}

t.test('paths and queries arrive byte for byte in every mode', async (t) => {
  await using upstream = await startHttp(echo)
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto', baseDomain: 'gw.test' })
  const { port } = upstream
  for (const rest of ['/', '//', '//x//y', '/../a/./b', '/%2F..%2f', '/a;b=c;d?e;f', '/p?', '/?', '/?x=%zz&&=', '/%20%00', '/a/b/', "/!*'()$&+,:@=", '/x2qxvk/103fd732a/p']) {
    for (const [mode, text] of [
      ['uri', get(`/a/${port}${rest}`)],
      ['header', get(rest, `OpenSandbox-Ingress-To: a-${port}`)],
      ['deprecated header', get(rest, `OPEN-SANDBOX-INGRESS: a-${port}`)],
      ['wildcard', get(rest).replace('Host: gateway', `Host: A-${port}.GW.test:28888`)],
      ['absolute', get(`http://a-${port}.gw.test${rest}`)],
    ] as const) {
      const answer = await ask(gateway.port, text)
      t.equal(statusOf(answer), 200, `${mode} ${rest}`)
      const seen = JSON.parse(bodyOf(answer)) as Echo
      t.equal(seen.url, rest, `${mode} ${rest}`)
      t.notOk(pairs(seen.raw).some(([name]) => name.startsWith('open')), 'no routing header reaches the sandbox')
    }
  }
})

t.test('forwarded headers: made for strangers, continued for our proxies', async (t) => {
  await using upstream = await startHttp(echo)
  const claims = ['X-Forwarded-For: 6.6.6.6', 'X-Forwarded-Proto: https', 'X-Forwarded-Host: evil', 'X-Real-IP: 6.6.6.6', 'Forwarded: for=6.6.6.6', 'X-Forwarded-Prefix: /outer', 'X-Forwarded-Port: 8443']
  await using open = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const stranger = new Map(pairs((JSON.parse(bodyOf(await ask(open.port, get(`/a/${upstream.port}/x`, ...claims)))) as Echo).raw))
  t.equal(stranger.get('x-forwarded-for'), '127.0.0.1')
  t.equal(stranger.get('x-forwarded-proto'), 'http')
  t.equal(stranger.get('x-forwarded-host'), 'gateway')
  t.equal(stranger.get('x-forwarded-port'), String(open.port))
  t.equal(stranger.get('x-forwarded-prefix'), `/a/${upstream.port}`)
  t.equal(stranger.get('host'), `127.0.0.1:${upstream.port}`)
  t.notOk(stranger.has('x-real-ip'))
  t.notOk(stranger.has('forwarded'))

  await using behind = await startGateway([{ id: 'a' }], { mode: 'uri', trustedProxies: ['127.0.0.0/8'], preserveHost: true })
  const proxied = new Map(pairs((JSON.parse(bodyOf(await ask(behind.port, get(`/a/${upstream.port}/x`, ...claims)))) as Echo).raw))
  t.equal(proxied.get('x-forwarded-for'), '6.6.6.6, 127.0.0.1')
  t.equal(proxied.get('x-forwarded-proto'), 'https')
  t.equal(proxied.get('x-forwarded-host'), 'evil')
  t.equal(proxied.get('x-forwarded-port'), '8443')
  for (const [said, port] of [['X-Forwarded-Proto: https', undefined], ['X-Forwarded-Host: outer', String(behind.port)]] as const) {
    const without = new Map(pairs((JSON.parse(bodyOf(await ask(behind.port, get(`/a/${upstream.port}/x`, said)))) as Echo).raw))
    t.equal(without.get('x-forwarded-port'), port, `${said} and no port`)
  }
  t.equal(proxied.get('x-forwarded-prefix'), `/outer/a/${upstream.port}`)
  t.equal(proxied.get('x-real-ip'), '6.6.6.6')
  t.equal(proxied.get('host'), 'gateway', 'preserveHost')
  t.match(behind.lines[0], /"client":"6\.6\.6\.6"/)
  // RFC 9110 §5.3: lines of one name are one list, in their order.
  const lines = ['X-Forwarded-For: 6.6.6.6, 127.0.0.9', 'X-Other: 1', 'X-Forwarded-For: 7.7.7.7', 'X-Forwarded-For: 127.0.0.8']
  const chain = pairs((JSON.parse(bodyOf(await ask(behind.port, get(`/a/${upstream.port}/x`, ...lines)))) as Echo).raw).filter(([name]) => name === 'x-forwarded-for')
  t.same(chain, [['x-forwarded-for', '6.6.6.6, 127.0.0.9, 7.7.7.7, 127.0.0.8, 127.0.0.1']], 'repeated lines are joined')
  await eventually(() => behind.lines.length === 4, 'the access line')
  t.match(behind.lines[3], /"client":"7\.7\.7\.7"/, 'and the client is the last that is no proxy of ours')
})

t.test('a listener for IPv4 and IPv6 names an IPv4 client as everybody else does', async (t) => {
  await using upstream = await startHttp(echo)
  for (const [trusted, seen, client] of [[[], '127.0.0.1', '127.0.0.1'], [['127.0.0.0/8'], '6.6.6.6, 127.0.0.1', '6.6.6.6'], [['10.0.0.0/8', '::1'], '127.0.0.1', '127.0.0.1']] as const) {
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', host: '', trustedProxies: [...trusted] })
    const name = `trusted: ${trusted.join(', ')}`
    const told = new Map(pairs((JSON.parse(bodyOf(await ask(gateway.port, get(`/a/${upstream.port}/`, 'X-Forwarded-For: 6.6.6.6')))) as Echo).raw))
    t.equal(told.get('x-forwarded-for'), seen, name)
    await eventually(() => gateway.lines.length === 1, 'the access line')
    t.match(gateway.lines[0], `"client":"${client}"`, name)
  }
})

t.test('bodies around the size that goes out with the head arrive whole, also pipelined', async (t) => {
  await using upstream = await startHttp((request, response) => {
    const body = Buffer.alloc(Number((request.url as string).slice(1)), 0xe9)
    response.writeHead(200, { 'content-length': body.length }).end(body)
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const sizes = [0, 1, 16_383, 16_384, 16_385, 70_000]
  const client = new RawClient(gateway.port)
  client.send(sizes.map((size, n) => `GET /a/${upstream.port}/${size} HTTP/1.1\r\nHost: x\r\n${n === sizes.length - 1 ? 'Connection: close\r\n' : ''}\r\n`).join(''))
  const answers = (await client.untilClosed()).split(/(?=HTTP\/1\.1 200)/)
  t.same(answers.map((answer) => bodyOf(answer).length), sizes)
  t.ok(answers.every((answer) => /^\xe9*$/.test(bodyOf(answer))), 'every byte as it was')
})

t.test('repeated headers stay apart, in both directions', async (t) => {
  await using upstream = await startHttp((request, response) => {
    response.writeHead(200, ['Set-Cookie', 'a=1', 'Set-Cookie', 'b=2; Path=/', 'Via', '1.1 x', 'Via', '1.1 y', 'X-Seen', pairs(request.rawHeaders).filter(([name]) => name === 'x-r' || name === 'cookie').join('|')])
    response.end()
  })
  await using gateway = await startGateway([{ id: 'a' }])
  const answer = await ask(gateway.port, get('/', `OpenSandbox-Ingress-To: a-${upstream.port}`, 'X-R: 1', 'X-R: 2', 'Cookie: c=1', 'Cookie: d=2'))
  t.match(answer, /set-cookie: a=1\r\n/i)
  t.match(answer, /set-cookie: b=2; Path=\/\r\n/i)
  t.match(answer, /via: 1\.1 x\r\nvia: 1\.1 y\r\n/i)
  t.match(answer, /x-seen: x-r,1\|x-r,2\|cookie,c=1\|cookie,d=2/i)
})

t.test('hop-by-hop fields end at the gateway, in both directions', async (t) => {
  await using upstream = await startRaw((socket) => {
    let text = ''
    socket.on('data', (chunk: Buffer) => {
      text += chunk.toString('latin1')
      if (!text.includes('\r\n\r\n')) return
      socket.end(`HTTP/1.1 200 OK\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=1\r\nProxy-Authenticate: x\r\nUpgrade: h2c\r\nX-Kept: 1\r\nContent-Length: ${text.length}\r\n\r\n${text}`)
    })
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const answer = await ask(gateway.port, `GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nConnection: close, X-Named, Te, Referer\r\nX-Named: 1\r\nTE: trailers, deflate\r\nKeep-Alive: 1\r\nProxy-Authorization: p\r\nProxy-Connection: x\r\nOpen-Sandbox-Api-Key: k\r\nOPEN-SANDBOX-INGRESS: a-1\r\nOpenSandbox-Ingress-To: a-1\r\nReferer: http://x/named\r\nOpenSandbox-Secure-Access: s\r\nOpensandbox-Egress-Auth: kept\r\nX-Kept: 1\r\n\r\n`)
  const head = answer.slice(0, answer.indexOf('\r\n\r\n')).toLowerCase()
  const sent = bodyOf(answer).toLowerCase()
  for (const name of ['x-hop', 'keep-alive: timeout=1', 'proxy-authenticate', 'upgrade']) t.notOk(head.includes(name), `response: ${name}`)
  t.match(head, 'x-kept: 1')
  for (const name of ['x-named', 'proxy-', 'deflate', 'api-key', 'secure-access', 'keep-alive: 1', 'open-sandbox', 'opensandbox-ingress', 'referer']) t.notOk(sent.includes(name), `request: ${name}`)
  for (const name of ['x-kept: 1', 'opensandbox-egress-auth: kept', 'te: trailers']) t.ok(sent.includes(name), `request keeps ${name}`)
})

t.test('64 MiB up and down arrive whole', async (t) => {
  const block = Buffer.alloc(1 << 20, 'sallyport ')
  const blocks = 64
  const wanted = createHash('sha256')
  for (let i = 0; i < blocks; i++) wanted.update(block)
  const sum = wanted.digest('hex')
  await using upstream = await startHttp((request, response) => {
    if (request.method === 'POST') return echo(request, response)
    let sent = 0
    const more = (): void => {
      while (sent < blocks) {
        sent++
        if (!response.write(block)) return void response.once('drain', more)
      }
      response.end()
    }
    if (request.url === '/length') response.setHeader('content-length', block.length * blocks)
    more()
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  for (const headers of [{ 'content-length': block.length * blocks }, {}]) {
    const outgoing = httpRequest({ port: gateway.port, host: '127.0.0.1', method: 'POST', path: `/a/${upstream.port}/up`, headers })
    const source = new PassThrough()
    source.pipe(outgoing)
    const answered = new Promise<IncomingMessage>((resolve, reject) => outgoing.once('response', resolve).once('error', reject))
    for (let i = 0; i < blocks; i++) if (!source.write(block)) await new Promise((resolve) => source.once('drain', resolve))
    source.end()
    const seen = JSON.parse(Buffer.concat(await (await answered).toArray()).toString()) as Echo
    t.equal(seen.bytes, block.length * blocks)
    t.equal(seen.sha256, sum, `up, ${'content-length' in headers ? 'with length' : 'chunked'}`)
  }
  for (const path of ['/length', '/chunked']) {
    const response = await new Promise<IncomingMessage>((resolve, reject) => httpRequest({ port: gateway.port, host: '127.0.0.1', path: `/a/${upstream.port}${path}` }, resolve).once('error', reject).end())
    const hash = createHash('sha256')
    for await (const chunk of response) hash.update(chunk as Buffer)
    t.equal(hash.digest('hex'), sum, `down ${path}`)
  }
})

t.test('a reader that stops stops the sandbox, too', async (t) => {
  let written = 0
  await using upstream = await startHttp((_request, response) => {
    const block = Buffer.alloc(256 * 1024)
    const more = (): void => {
      while (!response.destroyed && written < 512 * 1024 * 1024) {
        written += block.length
        if (!response.write(block)) return void response.once('drain', more)
      }
    }
    more()
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(get(`/a/${upstream.port}/`))
  await client.until((c) => c.received.length > 0)
  client.socket.pause()
  let [before, still] = [-1, 0]
  // Kernel buffers fill up; after that nothing may move, in a hundred looks 5 ms apart: a busy machine may pause once, but not that often.
  await eventually(() => {
    still = written === before ? still + 1 : 0
    before = written
    return still >= 100
  }, 'upstream stopped', 30_000)
  t.ok(written < 64 * 1024 * 1024, `${written >> 20} MiB were taken before the stop`)
  client.close()
})

t.test('events of a stream arrive when they are written, head first', async (t) => {
  let write: (text: string) => void = () => undefined
  let finish: () => void = () => undefined
  await using upstream = await startHttp((_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    write = (text) => void response.write(text)
    finish = () => void response.end()
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  client.send(get(`/a/${upstream.port}/`))
  await client.until((c) => c.received.includes('\r\n\r\n'))
  t.match(client.received, /content-type: text\/event-stream/i, 'the head arrives before any event')
  for (const n of [1, 2, 3]) {
    write(`data: ${n}\n\n`)
    await client.until((c) => c.received.includes(`data: ${n}\n\n`))
    t.notOk(client.received.includes(`data: ${n + 1}`), `event ${n} arrived alone`)
  }
  finish()
  await client.untilClosed()
  t.ok(client.received.endsWith('0\r\n\r\n'), 'and a regular end')
})

t.test('1xx and trailers pass, 100 is ours', async (t) => {
  await using upstream = await startHttp((request, response) => {
    response.writeEarlyHints({ link: '</a.css>; rel=preload', 'x-more': '1' })
    request.resume()
    request.on('end', () => {
      response.writeHead(200, { trailer: 'X-Sum' })
      response.write('hello')
      response.addTrailers({ 'X-Sum': '42' })
      response.end()
    })
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const answer = await ask(gateway.port, get(`/a/${upstream.port}/`))
  t.match(answer, /^HTTP\/1\.1 103 [^\r]*\r\nlink: <\/a\.css>; rel=preload\r\nx-more: 1\r\n\r\nHTTP\/1\.1 200/i)
  t.match(answer, /trailer: X-Sum\r\n/i)
  t.match(answer, /0\r\nx-sum: 42\r\n\r\n$/i)

  const old = await ask(gateway.port, `GET /a/${upstream.port}/ HTTP/1.0\r\n\r\n`)
  t.match(old, /^HTTP\/1\.1 200/, 'HTTP/1.0 gets neither 1xx nor trailers')
  t.notMatch(old, /transfer-encoding|trailer/i)
  t.ok(old.endsWith('\r\n\r\nhello'))

  const client = new RawClient(gateway.port)
  client.send(`POST /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n`)
  await client.until((c) => c.received.startsWith('HTTP/1.1 100 Continue\r\n\r\n'))
  client.send('hello')
  t.match(await client.untilClosed(), /HTTP\/1\.1 200/, 'the body was asked for and taken')

  const refused = await ask(gateway.port, `POST /nobody/1/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n`)
  t.match(refused, /^HTTP\/1\.1 404/, 'no 100 for a request that goes nowhere')
  t.match(refused, /connection: close/i)
})

t.test('fields behind a chunked request body pass, those that mean something to the gateway do not', async (t) => {
  const seen: { body: string; trailers: string[]; port: number; announced: string | undefined }[] = []
  await using upstream = await startHttp((request, response) => {
    let body = ''
    request.on('data', (chunk: Buffer) => (body += chunk.toString()))
    request.on('end', () => {
      seen.push({ body, trailers: request.rawTrailers, port: request.socket.remotePort as number, announced: request.headers['trailer'] as string | undefined })
      response.end('ok')
    })
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const client = new RawClient(gateway.port)
  const post = async (fields: string, behind: string, body = '3\r\none\r\n'): Promise<string> => {
    client.received = ''
    client.send(`POST /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n${fields}\r\n${body}0\r\n${behind}\r\n`)
    return client.until((c) => c.received.endsWith('ok'))
  }
  const cases: [why: string, fields: string, behind: string, passes: string[]][] = [
    ['as they came, repeated ones too', 'Trailer: X-Sum, x-b\r\n', 'X-Sum: 42\r\nx-b: 1\r\nx-b: \xe9\r\n', ['X-Sum', '42', 'x-b', '1', 'x-b', '\xe9']],
    ['nothing of the one before', '', '', []],
    ['hops, forwarding, routing, secrets: none of them', '', 'Host: h\r\nTE: trailers\r\nTrailer: x\r\nX-Forwarded-For: 9.9.9.9\r\nX-Real-IP: 9.9.9.9\r\nX-Request-Id: r\r\nOpenSandbox-Ingress-To: b-1\r\nOpenSandbox-Secure-Access: s\r\nSallyport-Access: s\r\nOpen-Sandbox-Api-Key: k\r\nCookie: c=1\r\nX-Kept: y\r\n', ['X-Kept', 'y']],
    ['those that Connection names end here', 'Connection: X-Hop\r\n', 'X-Hop: 1\r\nX-Kept: 2\r\n', ['X-Kept', '2']],
  ]
  for (const [why, fields, behind, passes] of cases) {
    await post(fields, behind)
    const { body, trailers } = seen.at(-1)!
    t.same({ body, trailers }, { body: 'one', trailers: passes }, why)
  }
  t.equal(seen[0]?.announced, 'X-Sum, x-b', 'they are announced as the client did')
  // undici sends a body without a byte as Content-Length: 0, which no fields can follow. None of them may wait for the next request.
  await post('', 'X-Lost: 1\r\n', '')
  await post('', '')
  t.same(seen.slice(-2).map(({ body, trailers }) => ({ body, trailers })), [{ body: '', trailers: [] }, { body: 'one', trailers: [] }], 'an empty body')
  t.equal(new Set(seen.map(({ port }) => port)).size, 1, 'all over one connection')
  client.close()
})

t.test('HEAD, 204, 304 and HTTP/1.0 keep their framing', async (t) => {
  await using upstream = await startHttp((request, response) => {
    if (request.url === '/204') response.writeHead(204).end()
    else if (request.url === '/304') response.writeHead(304, { etag: '"x"' }).end()
    else response.writeHead(200, { 'content-length': 5 }).end(request.method === 'HEAD' ? undefined : 'hello')
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const p = `/a/${upstream.port}`
  const client = new RawClient(gateway.port)
  client.send(`HEAD ${p}/ HTTP/1.1\r\nHost: x\r\n\r\nGET ${p}/204 HTTP/1.1\r\nHost: x\r\n\r\nGET ${p}/304 HTTP/1.1\r\nHost: x\r\n\r\n${get(`${p}/`)}`)
  const all = await client.untilClosed()
  t.same(all.match(/HTTP\/1\.1 \d+/g), ['HTTP/1.1 200', 'HTTP/1.1 204', 'HTTP/1.1 304', 'HTTP/1.1 200'], 'four answers on one connection, in order')
  t.ok(all.endsWith('hello'))
  const kept = new RawClient(gateway.port)
  kept.send(`GET ${p}/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n`)
  t.match(await kept.until((c) => c.received.endsWith('hello')), /connection: keep-alive/i, 'HTTP/1.0 may keep its connection when there is a length')
  kept.close()
})

t.test('IPv6 sandboxes', async (t) => {
  await using upstream = await startHttp(echo, undefined, '::1')
  await using gateway = await startGateway([{ id: 'six', host: '::1' }], { mode: 'uri' })
  const seen = JSON.parse(bodyOf(await ask(gateway.port, get(`/six/${upstream.port}/x`)))) as Echo
  t.equal(new Map(pairs(seen.raw)).get('host'), `[::1]:${upstream.port}`)
})

t.test('a body in a coding that is not undone here is refused, and never passes undeclared', async (t) => {
  let coding = ''
  await using upstream = await startRaw((socket) => void socket.on('data', () => socket.end(`HTTP/1.1 200 OK\r\n${coding}\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n`)))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const rows: [coding: string, status: number][] = [
    ['Transfer-Encoding: chunked', 200],
    ['Transfer-Encoding: CHUNKED', 200],
    ['Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked', 200],
    ['Transfer-Encoding: gzip, chunked', 502],
    ['Transfer-Encoding: gzip', 502],
    ['Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked', 502],
  ]
  for (const [line, status] of rows) {
    coding = line
    const answer = await ask(gateway.port, get(`/a/${upstream.port}/`, 'Accept: application/json'))
    t.equal(statusOf(answer), status, line)
    if (status === 502) t.match(bodyOf(answer), /"code":"EDGE_UPSTREAM_BROKEN".*"the sandbox sent a body in a transfer coding other than chunked"/, line)
    t.equal(answer.includes('hello'), status === 200, line)
  }
})
