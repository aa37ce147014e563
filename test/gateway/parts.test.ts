/** Parts on their own: configuration, frame boundaries, cookies, routing by mode, the routes file and the route stream. */
import { mkdtempSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { NetworkTable, readNetwork } from '#policies/address.ts'
import { ConfigError } from '#policies/config.ts'
import { readGatewayConfig } from '../../gateway/config.ts'
import { FrameBoundary } from '../../gateway/frame-boundary.ts'
import { readRequestHead, RequestHead } from '../../gateway/headers.ts'
import { cleanReferer } from '../../gateway/entry.ts'
import { KeyRing } from '../../gateway/key-ring.ts'
import { Locator } from '../../gateway/locate.ts'
import { clientOf, type Peer } from '../../gateway/peer.ts'
import { narrowCookie } from '../../gateway/response-headers.ts'
import { StaticProvider } from '../../gateway/providers/static.ts'
import { RouteTable } from '../../gateway/routes.ts'
import { Standing } from '../../gateway/standing.ts'
import { FailureThrottle } from '../../gateway/throttle.ts'
import { Upstream, type Handler, type RelayOptions } from '../../gateway/upstream.ts'
import { UpstreamGuard } from '../../gateway/upstream-guard.ts'
import { VerifiedMemory } from '../../gateway/verified.ts'
import { entry, eventually, startHttp } from './support.ts'

const problemsOf = (argv: string[], env: Record<string, string> = {}): string[] => {
  try {
    readGatewayConfig(argv, env)
    return []
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    return error.problems.map(({ path, reason }) => `${path} ${reason}`)
  }
}
const server = ['--provider', 'server', '--server-url', 'http://s:1', '--server-token', 't']

t.test('a name that CGI would take for one of ours is ours, too', async (t) => {
  for (const name of ['X_Forwarded_For', 'x_forwarded-proto', 'OpenSandbox_Secure_Access', 'Content_Length', 'Transfer_Encoding']) t.same(readRequestHead([name, '1', 'X_Own', '2'], true).out, ['X_Own', '2'], name)
})

t.test('configuration: flags in Go syntax, environment, file, every problem at once', async (t) => {
  const read = readGatewayConfig(['-port=1234', '--mode', 'wildcard', '--allow-loopback-upstreams', '--preserve-host=false', '--trusted-proxies', '10.0.0.0/8, ::1', '--namespace=x', ...server, '--log-level=debug', '--provider-type', 'batchsandbox', '--renew-intent-enabled', '--renew-intent-min-interval=60'], { SALLYPORT_GATEWAY_PORT: '9', SALLYPORT_GATEWAY_BASE_DOMAIN: 'gw.test' })
  t.match(read.config, { port: 1234, mode: 'wildcard', allowLoopbackUpstreams: true, preserveHost: false, trustedProxies: ['10.0.0.0/8', '::1'], baseDomain: 'gw.test', serverToken: 't' })
  t.ok(Object.isFrozen(read.config))
  t.ok(read.warnings.some((warning) => warning.includes('--server-token-file')), 'a secret on the command line')
  t.ok(read.warnings.some((warning) => warning.includes('--namespace')), 'a flag without effect')

  // The original's own flags, as its chart and its guide write them.
  const flags = ['--namespace=opensandbox', '--port=28888', '--provider-type=batchsandbox', '--mode=header', '--log-level=warning', '--secure-access-keys=a=c2VjcmV0LWE=,b=c2VjcmV0LWI=', '--secure-access-enabled=true', '--kubeconfig', '/k', '--renew-intent-enabled=true', '--renew-intent-redis-dsn', 'redis://127.0.0.1:6379/0', '--renew-intent-queue-key=opensandbox:renew:intent', '--renew-intent-queue-max-len=0', '-renew-intent-min-interval=60']
  t.match(readGatewayConfig([...server, ...flags], {}).config, { port: 28888, mode: 'header', logLevel: 'warning', secureAccessKeys: 'a=c2VjcmV0LWE=,b=c2VjcmV0LWI=' })

  const all = problemsOf(['--port', '70000', '--mode', 'nonsense', '--unknown', 'x', 'stray', '--workers', 'two', '--server-token-file', '/nowhere'])
  for (const part of ['--port', '--mode must be one of', '--unknown is not a known flag', 'stray is not a flag', '--workers', '--provider', '--server-token-file cannot be read: ENOENT']) t.ok(all.some((problem) => problem.includes(part)), `${part} in ${all.join(' | ')}`)
  const both = problemsOf(['--port', '70000', '--provider', 'static', '--workers', '0', '--trusted-proxies', 'x', '--secure-access-keys', 'a', '--base-domain', '***', '--admin-host', 'a:1'])
  for (const part of ['--port must', '--routes is required', '--workers must', '--trusted-proxies', '--secure-access-keys', '--base-domain', '--admin-host']) t.ok(both.some((problem) => problem.startsWith(part)), `one problem hides no other: ${part} in ${both.join(' | ')}`)
  t.same(problemsOf([...server, '--bogus']), ['--bogus is not a known flag'], 'said once')
  for (const name of ['constructor', 'to-string', 'has-own-property']) t.same(problemsOf([...server, `--${name}=1`]), [`--${name} is not a known flag`], 'a name that every object has')
  t.same(problemsOf([...server, '--bogus', 'x', '--bogus2', '--port=1']), ['--bogus is not a known flag', '--bogus2 is not a known flag'])
  for (const host of ['localhost', '::1', '0.0.0.0', 'a.example']) t.same(problemsOf([...server, '--host', host]), [], host)
  for (const [argv, part] of [
    [[], '--provider is required: one of "static", "server"'],
    [['--provider', 'static'], '--routes is required'],
    [['--provider', 'server', '--server-url', 'ftp://x'], '--server-url must be'],
    [['--provider', 'server', '--server-url', 'http://x'], '--server-token is required'],
    [[...server, '--secure-access-keys', 'a=!!'], '--secure-access-keys'],
    [[...server, '--secure-access-keys', 'a=YQ==', '--secure-access-keys-file', '/x'], 'excludes'],
    [[...server, '--trusted-proxies', '10.0.0.0/99'], 'is not an address'],
    [[...server, '--workers', '2', '--port', '0'], 'more than one worker'],
    [[...server, '--port'], '--port needs a value'],
    [[...server, '--connect-timeout', '0'], '--connect-timeout must'],
    [[...server, '--header-timeout', '0'], '--header-timeout must'],
    [[...server, '--config', '/nowhere.toml'], '/nowhere.toml cannot be read'],
  ] as const) t.ok(problemsOf([...argv]).some((problem) => problem.includes(part)), part)

  const folder = mkdtempSync(join(tmpdir(), 'gateway-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  writeFileSync(join(folder, 'token'), ' from-file \n')
  writeFileSync(join(folder, 'c.toml'), 'port = 5\nbase_domain = "file.test"\nnonsense = 1\n')
  t.equal(readGatewayConfig(['--provider=server', '--server-url=http://s', '--server-token-file', join(folder, 'token')], {}).config.serverToken, 'from-file')
  t.ok(problemsOf([...server, '--config', join(folder, 'c.toml')]).some((problem) => problem.includes('nonsense is not a known option')))
  writeFileSync(join(folder, 'c.toml'), 'port = 5\nbase_domain = "file.test"\n')
  t.match(readGatewayConfig([...server, '--config', join(folder, 'c.toml')], { SALLYPORT_GATEWAY_PORT: 'tcp://10.96.0.7:28888' }).config, { port: 5, baseDomain: 'file.test' }, 'what Kubernetes says of a Service with our name is not for us')
  t.match(readGatewayConfig([...server, '--config', join(folder, 'c.toml')], { SALLYPORT_GATEWAY_PORT: '6' }).config, { port: 6, baseDomain: 'file.test' }, 'the environment wins over the file')
})

t.test('which mode looks at what', async (t) => {
  const table = new RouteTable(() => false)
  for (const id of ['a', 'b', 'sec-1']) table.put(entry({ id }))
  const locate = (mode: 'header' | 'wildcard' | 'uri' | 'auto', baseDomain: string, fields: Partial<RequestHead>, path: string): string => {
    const found = new Locator({ mode, baseDomain }, table).locate(Object.assign(new RequestHead(), fields), path)
    return found.ok ? `${found.route.id}:${found.route.port} ${found.target} ${found.prefix}`.trim() : `${found.fault} ${found.detail}`
  }
  const rows: [string, string, string][] = [
    ['header wins over Host', locate('header', '', { ingressTo: 'a-1', host: 'b-2.x' }, '/p'), 'a:1 /p'],
    ['the deprecated one is second', locate('header', '', { ingressTo: ' ', deprecatedIngressTo: 'a-1', host: 'b-2.x' }, '/p'), 'a:1 /p'],
    ['a bad header never falls through', locate('auto', '', { ingressTo: 'nonsense', host: 'b-2.x' }, '/a/1/'), 'EDGE_BAD_ROUTE invalid ingress route: invalid host: nonsense'],
    ['Host', locate('wildcard', '', { host: 'B-2.Example.COM' }, '/'), 'b:2 /'],
    ['Host below the base domain', locate('wildcard', 'gw.test', { host: 'b-2.gw.test:28888' }, '/'), 'b:2 /'],
    ['Host elsewhere', locate('wildcard', 'gw.test', { host: 'b-2.evil.test' }, '/'), 'EDGE_BAD_ROUTE invalid ingress route: invalid host: b-2.evil.test'],
    ['a deeper Host', locate('wildcard', 'gw.test', { host: 'b-2.x.gw.test' }, '/'), 'EDGE_BAD_ROUTE invalid ingress route: invalid host: b-2.x.gw.test'],
    ['the base domain itself, auto', locate('auto', 'gw.test', { host: 'gw.test' }, '/a/1/x'), 'a:1 /x /a/1'],
    ['URI ignores headers', locate('uri', '', { ingressTo: 'b-2', host: 'b-2.x' }, '/a/1?q'), 'a:1 /?q /a/1'],
    ['auto without a base domain', locate('auto', '', { host: 'localhost:28888' }, '/a/1/x'), 'a:1 /x /a/1'],
    ['no source at all', locate('header', '', {}, '/'), "EDGE_BAD_ROUTE missing header 'Opensandbox-Ingress-To' or 'Host'"],
    ['empty Host', locate('header', '', { host: '' }, '/'), "EDGE_BAD_ROUTE missing header 'Opensandbox-Ingress-To' or 'Host'"],
    ['unknown', locate('header', '', { ingressTo: 'c-1' }, '/'), 'EDGE_NO_ROUTE sandbox not found: c'],
    ['ids are not hosts', locate('header', '', { ingressTo: '127.0.0.1-80' }, '/'), 'EDGE_BAD_ROUTE invalid ingress route: invalid host: 127.0.0.1-80'],
  ]
  for (const [name, got, wanted] of rows) t.equal(got, wanted, name)
})

t.test('request heads', async (t) => {
  const read = (...raw: string[]): RequestHead => readRequestHead(raw, false)
  t.equal(read('HOST', 'a', 'host', 'b').problem, 'more than one Host header')
  t.equal(read('OpenSandbox-Secure-Access', '').secureAccess, '', 'present, though empty')
  t.equal(read().secureAccess, undefined)
  t.same(read('X-A', '1', 'Connection', 'X-A, close', 'X-B', '2').out, ['X-B', '2'])
  t.same(read('Connection', 'close', 'Connection', 'x-b', 'X-A', '1', 'X-B', '2').out, ['X-A', '1'], 'options of every Connection header')
  t.equal(read('Content-Length', '1', 'Transfer-Encoding', 'chunked').problem, 'both Content-Length and Transfer-Encoding')
  t.equal(readRequestHead(Array.from({ length: 600 }, () => 'x'), false).problem, 'too many header fields')
})

t.test('cookies reach no further than their host', async (t) => {
  for (const [cookie, host, wanted] of [
    ['a=1', 'h', 'a=1'],
    ['a=1; Domain=gw.test', 'a-1.gw.test', 'a=1'],
    ['a=1; Path=/; domain=.gw.test; Secure', 'a-1.gw.test', 'a=1; Path=/; Secure'],
    ['a=1; Domain=A-1.gw.test', 'a-1.gw.test', 'a=1; Domain=A-1.gw.test'],
    ['domain=gw.test; Path=/', 'h', 'domain=gw.test; Path=/'],
    ['a=1;DOMAIN = x ;HttpOnly', 'h', 'a=1;HttpOnly'],
    ['a=1; Domain', 'h', 'a=1'],
    ['a=1; Domain=h; Path=/; Domain=', '', 'a=1; Path=/'],
  ] as const) t.equal(narrowCookie(cookie, host), wanted, cookie)
})

t.test('frame boundaries, however the bytes are cut', async (t) => {
  const frames = [Buffer.from([0x81, 2, 1, 2]), Buffer.from([0x82, 0]), Buffer.concat([Buffer.from([0x82, 126, 1, 0]), Buffer.alloc(256)]), Buffer.from([0x81, 0x82, 9, 9, 9, 9, 1, 2]), Buffer.concat([Buffer.from([0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]), Buffer.alloc(65_536)])]
  const bytes = Buffer.concat(frames)
  const ends = new Set(frames.map((_frame, n) => frames.slice(0, n + 1).reduce((sum, frame) => sum + frame.length, 0)))
  for (const step of [1, 2, 3, 7, 1000, bytes.length]) {
    const boundary = new FrameBoundary()
    let wrong = 0
    for (let at = 0; at < bytes.length; at += step) {
      boundary.feed(bytes.subarray(at, at + step))
      const end = Math.min(at + step, bytes.length)
      if (boundary.clear !== ends.has(end)) wrong++
    }
    t.equal(wrong, 0, `in steps of ${step}`)
  }
  const boundary = new FrameBoundary()
  boundary.feed(bytes.subarray(0, 3))
  t.equal(boundary.feed(bytes.subarray(3), true), 1, 'stops at the first boundary')
})

t.test('failed attempts are counted per client and minute', async (t) => {
  const throttle = new FailureThrottle(2)
  throttle.failed('a', 0)
  t.notOk(throttle.blocked('a', 1))
  throttle.failed('a', 1)
  t.ok(throttle.blocked('a', 2))
  t.notOk(throttle.blocked('b', 2))
  t.notOk(throttle.blocked('a', 60_001), 'a minute later')
  const open = new FailureThrottle(0)
  for (let i = 0; i < 100; i++) open.failed('a', i)
  t.notOk(open.blocked('a', 100))
})

t.test('a client of many IPv6 addresses is one client', async (t) => {
  const throttle = new FailureThrottle(1)
  throttle.failed('2001:db8:0:7::1', 0)
  for (const [client, blocked] of [['2001:db8:0:7:ffff::2', true], ['2001:db8::7:0:0:0:1', true], ['2001:db8:0:8::1', false], ['2001:DB8:0:0007:1::', true], ['2001:db8::', false], ['::1', false], ['10.0.0.1', false], ['fe80::1%eth0', false]] as const) t.equal(throttle.blocked(client, 1), blocked, client)
  throttle.failed('::ffff:10.0.0.7', 0)
  for (const [client, blocked] of [['10.0.0.7', true], ['::ffff:a00:7', true], ['::ffff:10.0.0.8', false], ['10.0.0.8', false], ['::1', false]] as const) t.equal(throttle.blocked(client, 1), blocked, `IPv4 the IPv6 way is one client each: ${client}`)
  throttle.failed('fe80::1%eth0', 0)
  t.ok(throttle.blocked('fe80::2%eth0', 1), 'a neighbour on the link')
})

t.test('whom a chain of proxies speaks for', async (t) => {
  const trusted = new NetworkTable()
  for (const text of ['10.0.0.0/8', '::1']) trusted.add(readNetwork(text) as NonNullable<ReturnType<typeof readNetwork>>, 0)
  const peer = (address: string): Peer => ({ address, trusted: trusted.find(address) !== undefined, localPort: '1', closing: false, ignored: 0, open: [], unread: null })
  for (const [address, forwardedFor, client, why] of [
    ['192.0.2.1', '6.6.6.6', '192.0.2.1', 'a stranger speaks for himself'],
    ['10.0.0.1', '', '10.0.0.1', 'a proxy that says nothing'],
    ['10.0.0.1', '6.6.6.6', '6.6.6.6', 'one hop'],
    ['10.0.0.1', '6.6.6.6, 10.0.0.2', '6.6.6.6', 'two proxies of ours'],
    ['10.0.0.1', '1.1.1.1, 6.6.6.6, 10.0.0.2', '6.6.6.6', 'what the client wrote before is a claim'],
    ['10.0.0.1', '10.0.0.3, 10.0.0.2', '10.0.0.3', 'nobody but proxies: the farthest'],
    ['::1', '2001:db8::6', '2001:db8::6', 'IPv6'],
    ['10.0.0.1', '6.6.6.6:4711', '6.6.6.6', 'a port is no part of who it is'],
    ['10.0.0.1', '6.6.6.6:4711, 10.0.0.2:80', '6.6.6.6', 'nor of a proxy'],
    ['10.0.0.1', '[2001:DB8:0::6]:4711', '2001:db8::6', 'IPv6 with a port, in its one spelling'],
    ['10.0.0.1', '[2001:db8::6]', '2001:db8::6', 'in brackets'],
    ['10.0.0.1', '::ffff:6.6.6.6, [::ffff:10.0.0.2]:80', '6.6.6.6', 'IPv4 the IPv6 way'],
    ['10.0.0.1', '::ffff:606:606', '6.6.6.6', 'also in hexadecimal'],
    ['10.0.0.1', 'unknown', '10.0.0.1', 'no address: the peer'],
    ['10.0.0.1', '6.6.6.6, unknown, 10.0.0.2', '10.0.0.2', 'no address: the last that is one, and nothing before it'],
    ['10.0.0.1', '6.6.6.6, , 10.0.0.2', '10.0.0.2', 'an empty one'],
    ['10.0.0.1', '[::12', '10.0.0.1', 'half an address'],
    ['10.0.0.1', '6.6.6.6:4711x', '10.0.0.1', 'something behind it'],
    ['10.0.0.1', '[2001:db8::6]x', '10.0.0.1', 'something behind it'],
    ['10.0.0.1', '[6.6.6.6, 06.6.6.6, 6.6.6, 2001:db8::6:x, :4711, []', '10.0.0.1', 'whatever somebody makes up'],
  ] as const) t.equal(clientOf(peer(address), forwardedFor, trusted), client, why)
})

t.test('a keys file: read again when it changes, kept when it cannot be read', { timeout: 60_000 }, async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'keys-'))
  const path = join(folder, 'keys')
  const problems: string[] = []
  const ring = new KeyRing('', path, (problem) => void problems.push(problem))
  t.teardown(() => {
    ring.close()
    rmSync(folder, { recursive: true })
  })
  t.throws(() => ring.start(), ConfigError, 'a gateway does not start without its keys')
  writeFileSync(path, 'a=c2VjcmV0LWE=\n')
  ring.start()
  writeFileSync(path, 'a=c2VjcmV0LWE=\nb=no!\n')
  await eventually(() => problems.length === 1, 'a mistake is told', 20_000)
  t.same([...ring.keys.keys()], ['a'], 'and withdraws nothing')
  t.ok(problems[0]?.startsWith(path) === true && !problems[0].includes('no!'), problems[0] ?? '')
  writeFileSync(path, 'b=c2VjcmV0LWI=\n')
  await eventually(() => ring.keys.has('b'), 'the new keys', 20_000)
  t.notOk(ring.keys.has('a'), 'a key that is gone proves nothing any more')
})

t.test('what one key ring proved is forgotten with it', async (t) => {
  const memory = new VerifiedMemory()
  const ring = new Map([['a', new Uint8Array([1])]])
  memory.under(ring).set('x', true)
  t.equal(memory.under(ring).get('x'), true)
  t.equal(memory.under(new Map(ring)).get('x'), undefined, 'the same keys, read again')
  t.equal(memory.under(ring).get('x'), undefined, 'and it does not come back')
})

t.test('the guard keeps its verdicts until it looks at the host again', async (t) => {
  let own: string[] = []
  const guard = new UpstreamGuard(false, () => own)
  for (const [host, wanted] of [['10.9.9.9', true], ['127.0.0.1', false], ['::ffff:127.0.0.1', false], ['169.254.169.254', false], ['web', true], ['localhost', false], ['127.1', false], ['web:80', false], ['', false]] as const) for (const turn of [1, 2]) t.equal(guard.allows(host), wanted, `${host}, asked ${turn} times`)
  own = ['10.9.9.9']
  guard.refresh()
  t.equal(guard.allows('10.9.9.9'), false, 'it became an address of this host')
})

t.test('the routes file: refused whole at start, ignored whole later, taken when it changes', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'routes-'))
  const path = join(folder, 'routes.json')
  const problems: string[] = []
  const table = new RouteTable(() => false)
  const write = (text: string): void => {
    writeFileSync(`${path}.new`, text)
    renameSync(`${path}.new`, path)
  }
  const provider = new StaticProvider({ path, every: 10, onProblem: (problem) => void problems.push(problem) }, table)
  t.teardown(async () => {
    await provider.close()
    rmSync(folder, { recursive: true })
  })
  await t.rejects(provider.start(), ConfigError, 'no file')
  write('{"sandboxes":[{"id":"a"}]}')
  await t.rejects(provider.start(), /host/, 'a missing host')
  write('{"sandboxes":[{"id":"a","host":"10.0.0.1"},{"id":"b","host":"10.0.0.2"}]}')
  await provider.start()
  t.equal(table.size, 2)
  const kept = table.get('b')
  write('{"sandboxes":[{"id":"b","host":"10.0.0.2","state":"Paused"}')
  await eventually(() => problems.length === 1, 'the broken file is told')
  t.equal(table.size, 2, 'and changes nothing')
  write('{"sandboxes":[{"id":"b","host":"10.0.0.2","state":"Paused"},{"id":"c","host":"10.0.0.3"}]}')
  await eventually(() => table.get('c') !== undefined, 'the new file')
  t.equal(table.get('a'), undefined)
  t.equal(table.get('b'), kept, 'who stays keeps its connections')
  t.equal(table.get('b')?.entry.state, 'Paused')
})

t.test('a connection is free again after a request that undici refuses, and after every other end', async (t) => {
  await using sandbox = await startHttp((request, response) => (request.url === '/breaks' ? request.socket.destroy() : response.end('ok')))
  const connections = new Set<unknown>()
  sandbox.server.on('request', (request) => connections.add(request.socket))
  const options: RelayOptions = { connectTimeout: 5_000, firstByteTimeout: 0, idleTimeout: 0, bootGrace: 0, maxRequests: 8, preserveHost: false, lookup: new UpstreamGuard(true).lookup, standing: new Standing(() => 8) }
  const upstream = new Upstream('127.0.0.1', sandbox.port, options, 0)
  t.teardown(() => upstream.destroy(new Error('over')))
  const ask = (path: string, headers: string[] = []): Promise<string> =>
    new Promise((resolve) => {
      const handler: Handler = { wire: null, reset: false, onRequestStart: () => undefined, onResponseStart: () => undefined, onResponseData: () => undefined, onResponseEnd: () => resolve('answered'), onResponseError: (_controller, { message }) => resolve(message) }
      upstream.dispatch({ path, method: 'GET', headers }, handler, 0)
    })
  const rows: [string, string[], string, number, string][] = [
    ['/', [], 'answered', 1, 'the first'],
    ['/', ['not a name', ''], 'invalid header key', 1, 'refused'],
    ['/', [], 'answered', 1, 'on the connection that the refused one gave back'],
    ['/breaks', [], 'other side closed', 1, 'broken off'],
    ['/', [], 'answered', 2, 'on a new connection'],
    ['/', [], 'answered', 2, 'on the same'],
  ]
  for (const [path, headers, wanted, count, why] of rows) {
    // undici gives a connection back a turn of the loop after its answer.
    for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve))
    t.equal(await ask(path, headers), wanted, why)
    t.equal(connections.size, count, why)
  }
})

t.test('what a Referer says of tokens and signatures', async (t) => {
  const rows: [why: string, uriMode: boolean, referer: string, wanted: string | null][] = [
    ['nothing', true, 'https://gw.test/sec/9100/page?x=/80/x2qxvk/6a47d98fa', 'https://gw.test/sec/9100/page?x=/80/x2qxvk/6a47d98fa'],
    ['a signature', true, 'https://gw.test/sec/9100/x2qxvk/6a47d98fa/page?x#y', 'https://gw.test/sec/9100/page?x#y'],
    ['a signature at the end', true, 'https://gw.test/sec/9100/x2qxvk/6a47d98fa', 'https://gw.test/sec/9100'],
    ['a signature below the prefix of a proxy', true, 'https://gw.test/outer/sec/9100/x2qxvk/6a47d98fa/page', 'https://gw.test/outer/sec/9100/page'],
    ['a path of the application, on its own host', false, 'https://a.gw.test/x/80/x2qxvk/6a47d98fa', 'https://a.gw.test/x/80/x2qxvk/6a47d98fa'],
    ['a token as a segment', true, 'https://gw.test/sec/9100/sp1.a.x2qxvk.3.R0VU.abc/page', null],
    ['a token as a parameter', false, 'https://a.gw.test/?a=1&sallyport_access=sp1.x', null],
  ]
  for (const [why, uriMode, referer, wanted] of rows) t.equal(cleanReferer(referer, uriMode), wanted, why)
})
