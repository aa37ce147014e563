/** Where the references of an answer lead, and for whom its cookies are, as a browser sees them. */
import t from 'tap'
import { ask, get, startGateway, startHttp } from './support.ts'

t.test('URI mode moves root-relative references under the prefix', async (t) => {
  let answer: string[] = []
  await using upstream = await startHttp((_request, response) => response.writeHead(302, answer).end())
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto' })
  const prefix = `/a/${upstream.port}`
  for (const [name, value, wanted] of [
    ['location', '/login?next=/x', `${prefix}/login?next=/x`],
    ['location', '//other.example/x', '//other.example/x'],
    ['location', 'https://other.example/', 'https://other.example/'],
    ['location', 'relative', 'relative'],
    ['location', `${prefix}/already`, `${prefix}/already`],
    ['location', `http://127.0.0.1:${upstream.port}/own`, `${prefix}/own`],
    ['refresh', '0; url=/next', `0; url=${prefix}/next`],
    ['set-cookie', 's=1; Path=/; HttpOnly', `s=1; Path=${prefix}/; HttpOnly`],
    ['set-cookie', 's=1; path=/app', `s=1; path=${prefix}/app`],
    ['set-cookie', 's=1 ;Path = /', `s=1 ;Path = ${prefix}/`],
    ['set-cookie', 's=1; Path=/app; Path=/', `s=1; Path=${prefix}/app; Path=${prefix}/`],
    ['set-cookie', 's=path=/x; path=relative', 's=path=/x; path=relative'],
    ['set-cookie', 's=1; Domain=gw.test; Secure', 's=1; Secure'],
    // The Host of these requests: all sandboxes are on it, and in other modes they have hosts below it.
    ['set-cookie', 's=1; Domain=gateway; Secure', 's=1; Secure'],
    ['set-cookie', 's=1', 's=1'],
  ] as const) {
    answer = [name, value]
    const head = await ask(gateway.port, get(`${prefix}/`))
    t.ok(head.includes(`${name}: ${wanted}\r\n`), `${name}: ${value} becomes ${wanted}`)
    const untouched = await ask(gateway.port, get('/', `OpenSandbox-Ingress-To: a-${upstream.port}`))
    t.ok(untouched.includes(`${name}: ${value.replace(/ Domain=[^;]*;/, '')}\r\n`), `${name}: ${value} is left alone in header mode`)
  }
})

t.test('a sandbox may set cookies for a host of its own and whatever is below it, in any answer', async (t) => {
  await using upstream = await startHttp((request, response) => void response.writeHead(200, { 'set-cookie': `c=1; Domain=${request.url?.slice(1)}; Path=/` }).end())
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'auto', baseDomain: 'gw.test' })
  const host = `a-${upstream.port}.gw.test`
  const rows: [host: string, to: string[], domain: string, kept: boolean][] = [
    [host, [], host, true],
    [`${host.toUpperCase()}:8443`, [], host, true],
    [host, [], 'gw.test', false],
    [host, [`OpenSandbox-Ingress-To: a-${upstream.port}`], host, false],
    ['gw.test', [`OpenSandbox-Ingress-To: a-${upstream.port}`], 'gw.test', false],
  ]
  for (const [named, to, domain, kept] of rows) {
    const answer = await ask(gateway.port, get(`/${domain}`, ...to).replace('Host: gateway', `Host: ${named}`))
    t.match(answer, `set-cookie: c=1;${kept ? ` Domain=${domain};` : ''} Path=/\r\n`, `${domain} on ${named} ${to.join()}`)
  }
})

t.test('behind a proxy that took a prefix of its own, references come below that, too', async (t) => {
  let answer: string[] = []
  let told: string | undefined
  await using upstream = await startHttp((request, response) => {
    told = request.headers['x-forwarded-prefix'] as string | undefined
    response.writeHead(302, answer).end()
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', trustedProxies: ['127.0.0.0/8'] })
  const own = `/a/${upstream.port}`
  const full = `/outer/x${own}`
  const rows: [name: string, value: string, wanted: string][] = [
    ['location', '/x?y', `${full}/x?y`],
    ['location', `${full}/x`, `${full}/x`],
    ['location', full, full],
    ['location', `/outer/x/elsewhere`, `${full}/outer/x/elsewhere`],
    ['location', `http://127.0.0.1:${upstream.port}/own`, `${full}/own`],
    ['content-location', '/x', `${full}/x`],
    ['refresh', '0; url=/next', `0; url=${full}/next`],
    ['set-cookie', 's=1; Path=/', `s=1; Path=${full}/`],
    ['set-cookie', `s=1; Path=${full}/app`, `s=1; Path=${full}/app`],
  ]
  for (const [name, value, wanted] of rows) {
    answer = [name, value]
    t.match(await ask(gateway.port, get(`${own}/`, 'X-Forwarded-Prefix: /outer/x')), `\r\n${name}: ${wanted}\r\n`, `${name}: ${value}`)
    t.equal(told, full)
  }
  answer = ['location', '/x']
  const others: [prefix: string, wanted: string, why: string][] = [
    ['/outer/', '/outer', 'a slash at its end is none in the middle'],
    ['//evil.test', '', 'an authority'],
    ['/\\evil.test', '', 'what browsers take for one'],
    ['/outer//x', '', 'no plain path'],
    ['/outer; Domain=gw.test', '', 'an attribute of a cookie'],
    ['/one, /two', '', 'a list'],
    ['https://evil.test', '', 'no path'],
    ['/', '', 'nothing'],
  ]
  for (const [prefix, wanted, why] of others) {
    t.match(await ask(gateway.port, get(`${own}/`, `X-Forwarded-Prefix: ${prefix}`)), `\r\nlocation: ${wanted}${own}/x\r\n`, why)
    t.equal(told, wanted + own, why)
  }
})
