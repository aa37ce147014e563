/** Access by header and by the original's short signature; vectors computed by three implementations. */
import crypto from 'node:crypto'
import { syncBuiltinESMExports } from 'node:module'
import t from 'tap'
import { formatScope, looksLikeAccessToken, parseAccessToken, scopeCovers, wholeSandbox, type AccessScope } from '#policies/access-token.ts'
import { decideAccess, decideStrongAccess, equalSecret, mintAccessToken, parseAccessKeys, readSecret, signShort, signStrong, type AccessAnswer } from '#policies/access.ts'
import type { Route } from '#policies/route.ts'

t.test('short signatures', async (t) => {
  const rows: [secret: string, keyId: string, id: string, port: number, b36: string, signature: string][] = [
    ['c2VjcmV0LWE=', 'a', 'my-sandbox', 8080, 'x2qxvk', '103fd732a'],
    ['c2VjcmV0LWI=', 'b', 'my-sandbox', 8080, 'x2qxvk', '58a2fb82b'],
    ['c2VjcmV0LWE=', 'a', 'my-sandbox', 8081, 'x2qxvk', '031bb50ca'],
    ['c2VjcmV0LWE=', 'a', 'my-sandbox', 8080, 'x2qxvl', 'd7f6b394a'],
    ['c2VjcmV0LWE=', 'a', 'sec', 9100, 'x2qxvk', '6a47d98fa'],
    ['AQID', '0', 'sb', 42, '0', '8ccd73a10'],
    ['mpucnQ==', 'z', '550e8400-e29b-41d4-a716-446655440000', 44772, '1vuhmo0', '7bf8a45fz'],
  ]
  for (const [secret, keyId, id, port, b36, signature] of rows) t.equal(signShort(keyId, readSecret(secret) as Uint8Array, id, port, b36), signature, signature)
})

t.test('keys', async (t) => {
  const rows: [text: string, ids: string[] | RegExp][] = [
    ['a=c2VjcmV0LWE=,b=c2VjcmV0LWI=', ['a', 'b']], [' a = AQ== , ,b=AQID', ['a', 'b']], ['', []], [',,', []], ['a=c2VjcmV0LWE', ['a']], ['a=base64:AQID', ['a']],
    ['A=AQID', /key id/], ['ab=AQID', /key id/], ['é=AQID', /key id/], ['a', /base64/], ['a=', /base64/], ['a=-_-_', /base64/], ['a=A', /base64/], ['a=AQ=', /base64/], ['a=A===', /base64/], ['a=AQID,a=AQID', /twice/],
  ]
  for (const [text, wanted] of rows) {
    const read = parseAccessKeys(text)
    if (Array.isArray(wanted)) t.same(read.ok && [...read.keys.keys()], wanted, text)
    else t.match(read.ok ? '' : read.problems[0]?.reason, wanted, text)
  }
  t.notMatch(JSON.stringify(parseAccessKeys('a=topsecret!')), 'topsecret', 'a secret is not repeated in a message')
})

t.test('the decision table', async (t) => {
  const read = parseAccessKeys('a=c2VjcmV0LWE=,b=c2VjcmV0LWI=')
  if (!read.ok) throw new Error('keys')
  const plain: Route = { id: 'sec', port: 9100 }
  const signed: Route = { ...plain, expires: 'x2qxvk', signature: '6a47d98fa' }
  const now = 1_800_000_000
  const rows: [token: string, header: string | undefined, route: Route, at: number, wanted: string, why: string][] = [
    ['', undefined, plain, now, 'open', 'not secured'], ['', 'anything', signed, now, 'open', 'header ignored'],
    ['tok', 'tok', plain, now, 'header', ''], ['tok', ' tok ', plain, now, 'header', 'trimmed'], ['tok', 'tok', { ...signed, signature: '000000000' }, now, 'header', 'signature not looked at'],
    ['tok', 'no', signed, now, 'header mismatch', 'no falling through to the signature'], ['tok', '', signed, now, 'header mismatch', 'present though empty'],
    ['tok', undefined, plain, now, 'signature required', ''], ['tok', undefined, { ...plain, expires: 'x2qxvk' }, now, 'signature required', ''],
    ['tok', undefined, signed, now, 'signature', ''], ['tok', undefined, signed, 2_000_000_000, 'signature', 'the last second counts'], ['tok', undefined, signed, 2_000_000_001, 'access expired', ''],
    ['tok', undefined, { ...signed, expires: '0' }, now, 'access expired', 'expiry before digest'], ['tok', undefined, { ...signed, expires: '!' }, now, 'access expired', 'unreadable expiry'],
    ['tok', undefined, { ...signed, signature: '6a47d98fz' }, now, 'unknown signed_key_id', ''],
    ['tok', undefined, { ...signed, port: 9101 }, now, 'signature mismatch', ''], ['tok', undefined, { ...signed, id: 'sed' }, now, 'signature mismatch', ''], ['tok', undefined, { ...signed, signature: '6a47d98fb' }, now, 'signature mismatch', 'another key'],
  ]
  for (const [token, header, route, at, wanted, why] of rows) {
    const answer = decideAccess({ token, header, route, keys: read.keys, now: at })
    t.match(answer.ok ? answer.by : answer.detail, wanted, `${wanted} ${why}`)
  }
  t.match(decideAccess({ token: 'tok', header: undefined, route: signed, keys: new Map(), now }), { ok: false, fault: 'EDGE_VERIFIER_MISSING' })
  const long = 'x'.repeat(300)
  for (const [given, wanted] of [['a', 'a'], ['', ''], ['é€😀', 'é€😀'], ['€'.repeat(85), '€'.repeat(85)], [long, long]] as const) t.equal(equalSecret(given, wanted), true, `${given.length} characters`)
  for (const [given, wanted] of [['a', 'ab'], ['a', 'b'], ['a', 'a\0'], ['', '\0'], ['é', 'e'], [long, `${long}x`], [long, 'x'], ['x', long], ['€'.repeat(85), `${'€'.repeat(84)}a`]] as const) t.equal(equalSecret(given, wanted), false, JSON.stringify([given, wanted]))
})

t.test('our own tokens', async (t) => {
  const secret = readSecret('c2VjcmV0LWE=') as Uint8Array
  const keys = new Map([['a', secret]])
  const now = 1_800_000_000
  const grant = { id: 'sec', port: 9100, epoch: 3, scope: { methods: ['GET', 'HEAD'], pathPrefix: '/api' } as AccessScope, keyId: 'a', secret, expires: 2_000_000_000n }
  const token = mintAccessToken(grant)
  t.match(token, /^sp1\.a\.x2qxvk\.3\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}$/)
  // Computed once by another implementation, from the grammar in the issue and lengths of four bytes before each part.
  t.equal(token, 'sp1.a.x2qxvk.3.R0VULEhFQUQgL2FwaQ.Z-L0DSxX2CMaWNcFwNIs6U192zMJQPE502G-AlP6Onw', 'a known answer')
  t.ok(looksLikeAccessToken(token))
  t.same(parseAccessToken(token)?.scope, grant.scope)
  const ask = { token, id: 'sec', port: 9100, method: 'GET', path: '/api/x', epoch: 3, keys, now }
  const wide = mintAccessToken({ ...grant, scope: wholeSandbox })
  const [head, body] = [token.slice(0, token.lastIndexOf('.')), token.slice(token.lastIndexOf('.') + 1)]
  const rows: [change: Partial<typeof ask>, wanted: string][] = [
    [{}, 'token'], [{ method: 'HEAD', path: '/api' }, 'token'], [{ epoch: 2 }, 'token'], [{ now: 2_000_000_000.9 }, 'token'],
    [{ method: 'POST' }, 'does not cover'], [{ path: '/apix' }, 'does not cover'], [{ path: '/' }, 'does not cover'],
    [{ path: '/api/../x' }, 'does not cover'], [{ path: '/api/%2e%2E/x' }, 'does not cover'], [{ path: '/api%2f..' }, 'does not cover'], [{ path: '/api/..\\x' }, 'does not cover'], [{ path: '/api/..;a/x' }, 'does not cover'],
    [{ token: wide, method: 'DELETE', path: '/any/../thing' }, 'token'],
    [{ now: 2_000_000_001 }, 'expired'], [{ epoch: 4 }, 'revoked'], [{ id: 'sed' }, 'not valid'], [{ port: 9101 }, 'not valid'], [{ keys: new Map() }, 'not valid'],
    [{ token: token.replace('.3.', '.4.'), epoch: 4 }, 'not valid'], [{ token: token.replace('x2qxvk', 'x2qxvz') }, 'not valid'], [{ token: `${head}.${body.slice(0, -1)}${body.endsWith('A') ? 'E' : 'A'}` }, 'not valid'],
    [{ token: '' }, 'malformed'], [{ token: `${token}x` }, 'malformed'], [{ token: token.replace('.3.', '.03.') }, 'malformed'], [{ token: token.replace('x2qxvk', '0x2qxv') }, 'malformed'], [{ token: token.replace(/\.3\.[^.]+/, '.3.AAAA') }, 'malformed'],
  ]
  for (const [change, wanted] of rows) {
    const answer = decideStrongAccess({ ...ask, ...change })
    t.match(answer.ok ? answer.by : answer.detail, wanted, JSON.stringify(change))
  }
  t.ok(scopeCovers({ methods: null, pathPrefix: '/api/' }, 'GET', '/api/x'))
  t.notOk(scopeCovers({ methods: null, pathPrefix: '/api/' }, 'GET', '/api'))
  for (const scope of [{ methods: ['get'], pathPrefix: '/' }, { methods: [], pathPrefix: '/' }, { methods: null, pathPrefix: 'api' }, { methods: null, pathPrefix: '/a b' }, { methods: null, pathPrefix: '/a/../b' }]) t.throws(() => formatScope(scope), RangeError)
  const parts = { id: 'ab', port: 11, expires: '1', epoch: 1, scopeText: '1x' }
  for (const moved of [{ id: 'ab1', port: 1 }, { port: 1, expires: '11' }, { expires: '11', epoch: 1 }, { epoch: 11, scopeText: 'x' }]) {
    t.not(signStrong(secret, parts), signStrong(secret, { ...parts, ...moved }), `parts are kept apart: ${Object.keys(moved).join(', ')}`)
  }
})

t.test('a signature that was found good is not computed again; everything else is asked each time', async (t) => {
  const secret = readSecret('c2VjcmV0LWE=') as Uint8Array
  const keys = new Map([['a', secret]])
  const verified = new Map<string, true>()
  const now = 1_800_000_000
  const route: Route = { id: 'sec', port: 9100, expires: 'x2qxvk', signature: '6a47d98fa' }
  const short = (change: Partial<Route>, at = now): string => {
    const answer = decideAccess({ token: 'tok', header: undefined, route: { ...route, ...change }, keys, verified, now: at })
    return answer.ok ? answer.by : answer.detail
  }
  t.match(short({ signature: '6a47d98ea' }), 'mismatch')
  t.equal(verified.size, 0, 'what was refused is not remembered')
  t.equal(short({}), 'signature')
  t.equal(verified.size, 1)
  t.equal(short({}), 'signature')
  t.match(short({}, 2_000_000_001), 'expired')
  for (const change of [{ id: 'sed' }, { port: 9101 }, { expires: 'x2qxvl' }, { signature: '6a47d98ea' }]) t.match(short(change), 'mismatch', JSON.stringify(change))

  verified.clear()
  const strong = { token: mintAccessToken({ id: 'sec', port: 9100, epoch: 3, scope: { methods: ['GET'], pathPrefix: '/api' }, keyId: 'a', secret, expires: 2_000_000_000n }), id: 'sec', port: 9100, method: 'GET', path: '/api', epoch: 3, keys, verified, now }
  const decide = (change: Partial<typeof strong>): string => {
    const answer = decideStrongAccess({ ...strong, ...change })
    return answer.ok ? answer.by : answer.detail
  }
  t.match(decide({ port: 9101 }), 'not valid')
  t.equal(verified.size, 0)
  t.equal(decide({}), 'token')
  t.equal(verified.size, 1)
  const withoutKeys = { keys: new Map<string, Uint8Array>() }
  t.equal(decide(withoutKeys), 'token', 'the memory answers: it belongs to one key ring')
  for (const [change, wanted] of [
    [{ now: 2_000_000_001 }, 'expired'], [{ epoch: 4 }, 'revoked'], [{ method: 'POST' }, 'does not cover'], [{ path: '/apix' }, 'does not cover'],
    [{ id: 'sed' }, 'not valid'], [{ port: 9101 }, 'not valid'], [{ token: strong.token.slice(0, -2) + (strong.token.endsWith('AA') ? 'BB' : 'AA') }, 'not valid'], [{ ...withoutKeys, verified: new Map<string, true>() }, 'not valid'],
  ] as const) t.match(decide(change), wanted, JSON.stringify(Object.keys(change)))
})

t.test('whoever has to prove something is compared by timingSafeEqual, and by nothing else', async (t) => {
  const real = crypto.timingSafeEqual
  t.teardown(() => answerWith(real))
  const asked: number[] = []
  const answerWith = (answer: typeof real): void => {
    crypto.timingSafeEqual = answer
    // The policies imported it by name.
    syncBuiltinESMExports()
  }
  const always = (answer: boolean) => (left: NodeJS.ArrayBufferView, right: NodeJS.ArrayBufferView): boolean => {
    asked.push(left.byteLength - right.byteLength)
    return answer
  }
  const secret = readSecret('c2VjcmV0LWE=') as Uint8Array
  const keys = new Map([['a', secret]])
  const now = 1_800_000_000
  const route: Route = { id: 'sec', port: 9100, expires: 'x2qxvk', signature: '6a47d98fa' }
  const token = mintAccessToken({ id: 'sec', port: 9100, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: 2_000_000_000n })
  const short = { token: 'tok', header: undefined, route, keys, now }
  const strong = { token, id: 'sec', port: 9100, method: 'GET', path: '/', epoch: 0, keys, now }
  const long = 'x'.repeat(300)
  const rows: [what: string, right: () => AccessAnswer, wrong: () => AccessAnswer][] = [
    ['the header', () => decideAccess({ ...short, header: 'tok' }), () => decideAccess({ ...short, header: 'no' })],
    ['a long header', () => decideAccess({ ...short, token: long, header: long }), () => decideAccess({ ...short, token: long, header: 'no' })],
    ['a short signature', () => decideAccess(short), () => decideAccess({ ...short, route: { ...route, signature: '6a47d98ea' } })],
    ['our own token', () => decideStrongAccess(strong), () => decideStrongAccess({ ...strong, port: 9101 })],
  ]
  for (const [what, right, wrong] of rows) {
    answerWith(real)
    t.same([right().ok, wrong().ok], [true, false], what)
    // A comparison of another kind in front of it, behind it or instead of it would answer otherwise.
    asked.length = 0
    answerWith(always(true))
    t.same([right().ok, wrong().ok], [true, true], `${what}: it alone lets in`)
    answerWith(always(false))
    t.same([right().ok, wrong().ok], [false, false], `${what}: it alone refuses`)
    t.same(asked, [0, 0, 0, 0], `${what}: asked each time, for texts made equally long`)
  }
})
