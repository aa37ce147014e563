/** The cookie that a browser gets for the token it came in with, and whose requests it counts for. */
import t from 'tap'
import { wholeSandbox } from '#policies/access-token.ts'
import { mintAccessToken, readSecret } from '#policies/access.ts'
import { asksFromElsewhere, entryCookie } from '../../gateway/entry.ts'

t.test('a browser keeps its entry for an hour at most, and never longer than the token lasts', async (t) => {
  const secret = readSecret('c2VjcmV0LWE=') as Uint8Array
  const now = 1_800_000_000
  const rows: [left: bigint, age: number, why: string][] = [
    [600n, 600, 'as long as the token'], [1n, 1, ''], [3_599n, 3_599, ''], [3_600n, 3_600, 'an hour'], [3_601n, 3_600, 'no more than that'],
    [10n * 31_536_000n, 3_600, 'ten years'], [2n ** 64n - 1n - BigInt(now), 3_600, 'for ever'], [0n, 0, 'its last second'], [-1n, 0, 'over'],
  ]
  for (const [left, age, why] of rows) {
    const token = mintAccessToken({ id: 'sec', port: 9100, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: BigInt(now) + left })
    for (const prefix of ['', '/sec/9100']) t.equal(/; Max-Age=(-?\d+)$/.exec(entryCookie(token, prefix, true, now + 0.9))?.[1], String(age), `${left} s left ${prefix} ${why}`)
  }
})

t.test('which requests a browser makes for a page of another origin', async (t) => {
  const hosts = ['a-80.gw.test', 'a-80.outer.test:8443']
  const site = (value: string, mode: string) => ({ 'sec-fetch-site': value, 'sec-fetch-mode': mode })
  const rows: [headers: Record<string, string>, method: string, elsewhere: boolean, why: string][] = [
    [{}, 'GET', false, 'no browser, or an old one that loads an image'],
    [{ origin: 'https://a-80.gw.test' }, 'POST', false, 'its own'],
    [{ origin: 'http://a-80.gw.test' }, 'POST', false, 'TLS may end before us'],
    [{ origin: 'HTTPS://A-80.GW.TEST:443' }, 'POST', false, 'however it is spelled'],
    [{ origin: 'https://a-80.outer.test:8443' }, 'POST', false, 'its name outside'],
    [{ origin: 'https://a-80.outer.test' }, 'POST', true, 'another port there'],
    [{ origin: 'https://a-80.gw.test:8443' }, 'POST', true, 'another port'],
    [{ origin: 'https://b-80.gw.test' }, 'GET', true, 'a neighbour'],
    [{ origin: 'https://a-81.gw.test' }, 'GET', true, 'another port, where the host does not name the sandbox'],
    [{ origin: 'https://a-80.gw.test.evil.test' }, 'GET', true, 'a name that begins alike'],
    [{ origin: 'https://x.a-80.gw.test' }, 'GET', true, 'a name that ends alike'],
    [{ origin: 'null' }, 'POST', true, 'nobody says who'],
    [{ origin: '' }, 'POST', true, 'nobody says who'],
    [{ origin: 'https://a-80.gw.test, https://b-80.gw.test' }, 'POST', true, 'two of them'],
    [{ origin: 'https://a-80.gw.test https://b-80.gw.test' }, 'POST', true, 'a list, as RFC 6454 allows'],
    [site('same-origin', 'cors'), 'POST', false, 'the browser knows'],
    [{ origin: 'null', ...site('same-origin', 'navigate') }, 'POST', false, 'a form of a page without referrers'],
    [site('none', 'navigate'), 'GET', false, 'typed'],
    [site('same-site', 'navigate'), 'GET', false, 'a link on a page of a neighbour'],
    [site('cross-site', 'navigate'), 'HEAD', false, 'a link'],
    [site('same-site', 'navigate'), 'POST', true, 'a form'],
    [{ origin: 'https://a-80.gw.test', ...site('cross-site', 'cors') }, 'GET', false, 'its own page, whatever came in between'],
    ...['cors', 'no-cors', 'websocket', 'same-origin'].map((mode): [Record<string, string>, string, boolean, string] => [site('same-site', mode), 'GET', true, mode]),
    [{ 'sec-fetch-site': 'cross-site' }, 'GET', true, 'no mode'],
    [site('same-origin, cross-site', 'cors'), 'GET', true, 'two of them'],
  ]
  for (const [headers, method, elsewhere, why] of rows) t.equal(asksFromElsewhere(headers, method, hosts, false), elsewhere, `${method} ${JSON.stringify(headers)}: ${why}`)
  const begun = performance.now()
  t.equal(asksFromElsewhere({ origin: `http://${'-1'.repeat(32_000)}` }, 'POST', hosts, true), true, 'a long origin')
  t.ok(performance.now() - begun < 100, 'is looked at once')
  t.equal(asksFromElsewhere({ origin: 'https://a-80.gw.test' }, 'GET', ['a-80.gw.test:443'], false), false, 'a proxy may say the port that browsers leave out')
  for (const [origin, elsewhere] of [['a-80', false], ['a-3000', false], ['b-80', true], ['a', true], ['a-80-81', true], ['aa-80', true], ['x.a-80', true]] as const) t.equal(asksFromElsewhere({ origin: `https://${origin}.gw.test`, ...site('same-site', 'cors') }, 'POST', hosts, true), elsewhere, `${origin}, where the host names sandbox and port`)
  t.equal(asksFromElsewhere({ origin: 'https://a-80.gw.test' }, 'GET', [], false), true, 'nobody knows the own name')
})
