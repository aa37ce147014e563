/** The route grammar of the original's gateway, vector by vector, and what must hold for any input. */
import { isDeepStrictEqual } from 'node:util'
import t from 'tap'
import { formatEndpoint, formatToken, gatewayAddressProblem, isSignature, parseExpiry, parseHostToken, parsePort, parseUriPath, type Route } from '#policies/route.ts'
import { randomOf } from '../support/random.ts'

const bad = 'bad'
const uuid = '550e8400-e29b-41d4-a716-446655440000'
const signedRoute = { id: 'my-sandbox', port: 8080, expires: 'x2qxvk', signature: 'aabbccddk' }

t.test('host and header tokens', async (t) => {
  const rows: [input: string, wanted: Route | typeof bad, why?: string][] = [
    ['sandbox-1234.example.com', { id: 'sandbox', port: 1234 }],
    ['https://alpha-beta-8080.sandbox.test', { id: 'alpha-beta', port: 8080 }],
    ['https://http://a-80', { id: 'a', port: 80 }, 'both prefixes go, in that order'],
    ['http://https://a-80', { id: 'https://a', port: 80 }, 'only in that order'],
    ['HTTPS://a-80', { id: 'HTTPS://a', port: 80 }, 'prefixes are case-sensitive'],
    ['a-b-c-80', { id: 'a-b-c', port: 80 }],
    [`${uuid}-8080.gw`, { id: uuid, port: 8080 }],
    ['a--80', { id: 'a-', port: 80 }],
    ['a---80', { id: 'a--', port: 80 }],
    ['A-80.Example.COM', { id: 'A', port: 80 }, 'header values keep their case'],
    ['a_b-80', { id: 'a_b', port: 80 }],
    ['a%2Db-80', { id: 'a%2Db', port: 80 }, 'no percent-decoding'],
    ['a-80.ex.com:28888', { id: 'a', port: 80 }],
    ['a-80:28888', bad, 'a single label with a port'],
    ['a-08080', bad, 'leading zero: stricter than the original'],
    ['a-080', bad, 'not port 80 either'],
    ['a-+80', bad, 'sign: stricter than the original'],
    ['a-65536', bad, 'the original dialled it and answered 502'],
    ['a-99999', bad], ['a-99999999999999999999', bad], ['a-0', bad],
    ['a-', bad], ['a-b', bad], ['a-80/x', bad], ['a-80 ', bad], ['a-0x50', bad], ['a-1_000', bad], ['a-٨٠', bad],
    ['invalidhost', bad], ['localhost:28888', bad], ['127.0.0.1:28888', bad], ['[::1]:28888', bad], ['', bad], ['.', bad],
    ['-80', bad], ['--80', bad], ['-1234.example.com', bad], ['-8080-x2qxvk-aabbccddk', bad], ['[fd00::1-80]', bad],
    ['my.sandbox-8080', bad, 'an id with a dot cannot be routed by host'],
    ['my-sandbox-8080-x2qxvk-aabbccddk', signedRoute],
    ['my-sandbox-8080-x2qxvk-aabbccddk.gw:443', signedRoute],
    ['my-sandbox-8080-0-aabbccddk', { ...signedRoute, expires: '0' }],
    ['my-sandbox-8080-3w5e11264sgsf-aabbccddk', { ...signedRoute, expires: '3w5e11264sgsf' }, '2^64-1'],
    ['my-sandbox-8080-3w5e11264sgsg-aabbccddk', bad, '2^64'],
    ['my-sandbox-8080-x2qxvk-AABBCCDDK', bad], ['my-sandbox-8080-X2QXVK-aabbccddk', bad], ['my-sandbox-8080-00-aabbccddk', bad],
    [`my-sandbox-8080-${'z'.repeat(13)}-aabbccddk`, bad], [`my-sandbox-8080-${'z'.repeat(14)}-aabbccddk`, bad],
    ['my-sandbox-08080-x2qxvk-aabbccddk', bad], ['my-sandbox-0-x2qxvk-aabbccddk', bad], ['my-sandbox-70000-x2qxvk-aabbccddk', bad],
    ['my-sandbox-8080-x2qxvk-aabbccdd', bad], ['my-sandbox-8080-x2qxvk-aabbccddkk', bad],
    ['8080-x2qxvk-aabbccddk', bad, 'three parts'],
    ['a-80-1-000008080', { id: 'a', port: 80, expires: '1', signature: '000008080' }, 'signed is tried first'],
  ]
  for (const [input, wanted, why] of rows) {
    const read = parseHostToken(input)
    t.same(read.ok ? read.route : bad, wanted, `${input} ${why ?? ''}`)
    if (!read.ok) t.match(read, { fault: 'EDGE_BAD_ROUTE', detail: /^invalid ingress route: / })
  }
})

t.test('paths', async (t) => {
  const a80 = { id: 'a', port: 80 }
  const a80signed = { ...a80, expires: 'x2qxvk', signature: 'aabbccddk' }
  const rows: [path: string, wanted: Route | typeof bad, rest?: string, legacyRest?: string][] = [
    ['/a/80', a80, '/'], ['/a/80/', a80, '/'], ['/a/80/x/', a80, '/x/'],
    ['/a/80/x2qxvk/aabbccddk', a80signed, '/', '/x2qxvk/aabbccddk'],
    ['/a/80/x2qxvk/aabbccddk/', a80signed, '/', '/x2qxvk/aabbccddk/'],
    ['/a/80/x2qxvk/aabbccddk/p/q', a80signed, '/p/q', '/x2qxvk/aabbccddk/p/q'],
    ['/a/80/x2qxvk', a80, '/x2qxvk'], ['/a/80/00/aabbccddk', a80, '/00/aabbccddk'], ['/a/80/X2/aabbccddk', a80, '/X2/aabbccddk'],
    ['/a/80/x2qxvk/AABBCCDDK', a80, '/x2qxvk/AABBCCDDK'], ['/a/80/3w5e11264sgsg/aabbccddk/p', a80, '/3w5e11264sgsg/aabbccddk/p'],
    ['/a/80/x2qxvk/aabbccdd', a80, '/x2qxvk/aabbccdd'],
    ['/a/+80/x', bad], ['/a/080', bad], ['/a/080/x', bad], ['/a/0', bad], ['/a/65536', bad], ['/a/-80', bad], ['/a/80x', bad], ['/a/ ', bad], ['/a/', bad],
    ['/', bad], ['/a', bad], ['', bad], ['//80', bad], ['a/80', bad], ['/a/%', bad], ['/a%zz/80', bad],
    ['/A/80', { id: 'A', port: 80 }, '/'], ['/%C3%A9/80', { id: 'é', port: 80 }, '/'], ['/a-b/80/x', { id: 'a-b', port: 80 }, '/x'],
    ['/s%62/91%300/x', { id: 'sb', port: 9100 }, '/x'],
    ['/sb%2F9100%2Fx', bad], ['/sb%2F9100/x', bad], ['/sb%2F9100/80', bad],
    ['/a/80//x/../%2F%2e;y', a80, '//x/../%2F%2e;y'],
  ]
  for (const [path, wanted, rest, legacyRest] of rows) {
    const read = parseUriPath(path)
    t.same(read.ok ? read.route : bad, wanted, path)
    if (read.ok) t.same([read.rest, read.legacyRest], [rest, legacyRest ?? rest], `${path}: what the sandbox gets`)
  }
  t.match(parseUriPath(`/a/${'9'.repeat(500)}`), { ok: false, detail: /…"$/ }, 'a long segment is not repeated in full')
})

t.test('ports, expiries, signatures', async (t) => {
  for (const [text, port] of [['1', 1], ['65535', 65535], ['65536', 0], ['0', 0], ['01', 0], ['+1', 0], ['', 0], ['1e3', 0], ['999999', 0]] as const) t.equal(parsePort(text), port, `port ${text}`)
  const expiries: [string, bigint | null][] = [
    ['0', 0n], ['1', 1n], ['z', 35n], ['10', 36n], ['x2qxvk', 2_000_000_000n], ['3w5e11264sgsf', 2n ** 64n - 1n],
    ['', null], ['00', null], ['01', null], ['Z', null], ['x2QXVK', null], ['-1', null], [' 1', null], ['3w5e11264sgsg', null], ['z'.repeat(13), null], ['1'.repeat(14), null],
  ]
  for (const [text, value] of expiries) t.equal(parseExpiry(text), value, `expiry ${text}`)
  t.equal(isSignature('aabbccdd0'), true)
  t.equal(isSignature('aabbccdg0'), false)
})

t.test('why a route is bad, in the words of the original', async (t) => {
  const byHost: [text: string, detail: string][] = [
    ['invalidhost', 'invalid host: invalidhost'], ['-80.gw', 'invalid host: -80.gw'], ['a-b', 'invalid port format: invalid port "b"'], ['a-0', 'invalid port format: invalid port "0"'],
  ]
  const byPath: [text: string, detail: string][] = [
    ['/', "invalid URI path format: expected '/<sandbox-id>/<sandbox-port>/<path-to-request>', got: /"], ['/a/', 'missing sandbox-id or sandbox-port in URI path'],
    ['//80/', 'missing sandbox-id or sandbox-port in URI path'], ['/a/080', 'invalid port format: port must not have leading zeros'], ['/a/00', 'invalid port format: port must not have leading zeros'],
    ['/a/0', 'invalid port format: invalid port "0"'], ['/a/80x', 'invalid port format: invalid port "80x"'], ['/a/65536', 'invalid port format: invalid port "65536"'],
  ]
  for (const [text, detail] of byHost) t.match(parseHostToken(text), { ok: false, detail: `invalid ingress route: ${detail}` }, text)
  for (const [text, detail] of byPath) t.match(parseUriPath(text), { ok: false, detail: `invalid ingress route: ${detail}` }, text)
})

t.test('endpoints', async (t) => {
  const route = { id: 'sb', port: 80 }
  const signed = { ...route, expires: 'x2qxvk', signature: 'aabbccddk' }
  t.same(formatEndpoint('wildcard', '*.sandbox.localhost:28888', route), { endpoint: 'sb-80.sandbox.localhost:28888' })
  t.same(formatEndpoint('wildcard', '*.b.c', signed), { endpoint: 'sb-80-x2qxvk-aabbccddk.b.c' })
  t.same(formatEndpoint('uri', 'gw.example.com/base', route), { endpoint: 'gw.example.com/base/sb/80' })
  t.same(formatEndpoint('uri', 'gw', signed), { endpoint: 'gw/sb/80/x2qxvk/aabbccddk' })
  t.same(formatEndpoint('header', 'gw:1', route), { endpoint: 'gw:1', headers: { 'OpenSandbox-Ingress-To': 'sb-80' } })
  t.same(formatEndpoint('header', 'gw:1', signed), { endpoint: 'gw:1', headers: { 'OpenSandbox-Ingress-To': 'sb-80-x2qxvk-aabbccddk' } })
})

t.test('gateway addresses', async (t) => {
  const rows: [mode: 'wildcard' | 'uri' | 'header', address: string, fine: boolean][] = [
    ['wildcard', '*.example.com', true], ['wildcard', '*.sandbox.localhost:28888', true], ['wildcard', '*.example', false], ['wildcard', 'example.com', false],
    ['wildcard', '*.example.com:0', false], ['wildcard', '*.example.com:99999', false], ['wildcard', '*.-a.com', false], ['wildcard', 'http://*.a.com', false],
    ['header', 'gw.example.com', true], ['header', 'localhost:28888', true], ['header', '10.0.0.1:80', true], ['header', 'gw/base', false], ['header', '*.a.com', false], ['header', '', false],
    ['uri', 'gw.example.com', true], ['uri', 'gw.example.com:1/base', true], ['uri', 'gw/', false], ['uri', 'gw/a b', false], ['uri', '*.a.com', false], ['uri', 'gw/*', false],
  ]
  for (const [mode, address, fine] of rows) t.equal(gatewayAddressProblem(mode, address) === null, fine, `${mode} ${address}`)
})

t.test('any route survives format and parse; garbage never throws', async (t) => {
  const random = randomOf(t)
  const wrong: unknown[] = []
  for (let round = 0; round < 3_000; round++) {
    const id = random.text('abcdefghijklmnopqrstuvwxyz0123456789-_', 1, 40).replace(/^-/, 'x')
    const route: Route = { id, port: random.between(1, 65_535) }
    if (random.between(0, 1) === 1) Object.assign(route, { expires: BigInt(random.between(0, 2 ** 40)).toString(36), signature: random.text('0123456789abcdef', 8, 8) + random.text('0123456789abcdefghijklmnopqrstuvwxyz', 1, 1) })
    const host = parseHostToken(`${formatToken(route)}.example.com`)
    const ambiguous = route.expires === undefined && host.ok && host.route.expires !== undefined
    if (!ambiguous && !isDeepStrictEqual(host, { ok: true, route })) wrong.push({ route, host })
    const path = parseUriPath(formatEndpoint('uri', '', route).endpoint)
    if (!path.ok || !isDeepStrictEqual(path.route, route) || path.rest !== '/') wrong.push({ route, path })
    const noise = random.text('/-.%2Fa80:*\u0000é ', 0, 60)
    parseHostToken(noise)
    parseUriPath(noise)
  }
  t.same(wrong, [])
})
