/** WebSockets into secured sandboxes: every proof that lets a request in lets an upgrade in, and the sandbox sees none of it. */
import { once } from 'node:events'
import t from 'tap'
import { WebSocket, WebSocketServer } from 'ws'
import { mintAccessToken, parseAccessKeys, signShort } from '#policies/access.ts'
import { wholeSandbox } from '#policies/access-token.ts'
import type { Renewals } from '#policies/wire.ts'
import { entry, eventually, keysText, startGateway, startHttp } from './support.ts'

const parsed = parseAccessKeys(keysText)
const secret = parsed.ok ? (parsed.keys.get('a') as Uint8Array) : new Uint8Array()

/** @returns the status, or what the sandbox saw of the handshake */
async function open(url: string, headers: Record<string, string>): Promise<number | string> {
  const socket = new WebSocket(url, { headers })
  try {
    return await new Promise<number | string>((resolve, reject) => {
      socket.once('unexpected-response', (_request, response) => resolve(response.statusCode as number))
      socket.once('message', (data) => resolve(String(data)))
      socket.once('error', reject)
    })
  } finally {
    socket.once('error', () => undefined).terminate()
  }
}

t.test('upgrades are asked for the same proofs', async (t) => {
  await using upstream = await startHttp(() => undefined)
  new WebSocketServer({ server: upstream.server }).on('connection', (socket, request) => socket.send(`${request.url} ${request.rawHeaders.join(' ')}`))
  const { port } = upstream
  await using gateway = await startGateway([{ id: 'sec', secureAccessToken: 'tok', epoch: 3 }], { mode: 'auto', baseDomain: 'gw.test', secureAccessKeys: keysText })
  const short = signShort('a', secret, 'sec', port, 'x2qxvk')
  const mint = (epoch = 3, methods: string[] | null = null): string => mintAccessToken({ id: 'sec', port, epoch, scope: { ...wholeSandbox, methods }, keyId: 'a', secret, expires: BigInt(Math.floor(Date.now() / 1000) + 600) })
  const token = mint()
  const path = (rest: string): string => `ws://127.0.0.1:${gateway.port}/sec/${port}${rest}`
  const host = `ws://127.0.0.1:${gateway.port}`
  const own = { host: `sec-${port}.gw.test` }
  const rows: [name: string, url: string, headers: Record<string, string>, wanted: number | string][] = [
    ['nothing', path('/ws'), {}, 401],
    ['the access header', path('/ws'), { 'OpenSandbox-Secure-Access': 'tok' }, '/ws'],
    ['a wrong one', path('/ws'), { 'OpenSandbox-Secure-Access': 'no' }, 401],
    ['a signed path', path(`/x2qxvk/${short}/ws?a=1`), {}, '/ws?a=1'],
    ['a signed host', `${host}/ws`, { host: `sec-${port}-x2qxvk-${short}.gw.test` }, '/ws'],
    ['a bad signature', path('/x2qxvk/00000000a/ws'), {}, 401],
    ['a token in the path', path(`/${token}/ws`), {}, '/ws'],
    ['in the query, as browsers must', path(`/ws?a=1&sallyport_access=${token}`), {}, '/ws?a=1'],
    ['in the query of its own host', `${host}/ws?sallyport_access=${token}`, own, '/ws'],
    ['in a header', path('/ws'), { 'Sallyport-Access': token }, '/ws'],
    ['the cookie a page was given', `${host}/ws`, { ...own, cookie: `a=1; __Host-sallyport-access=${token}` }, '/ws'],
    ['that cookie in URI mode', path('/ws'), { cookie: `__Host-sallyport-access=${token}` }, 401],
    ['a revoked token', path(`/${mint(2)}/ws`), {}, 401],
    ['a token for other methods', path(`/${mint(3, ['POST'])}/ws`), {}, 401],
  ]
  for (const [name, url, headers, wanted] of rows) {
    const seen = await open(url, headers)
    t.equal(typeof seen === 'string' ? seen.split(' ')[0] : seen, wanted, name)
    // The host a client used is an application's own address: with a signature in it, its links keep it.
    t.notMatch(String(seen).replace(/x-forwarded-host \S+/, ''), /sp1\.|sallyport|secure-access|x2qxvk/i, `${name}: nothing of it reaches the sandbox`)
  }
  t.notMatch(gateway.lines.join(''), new RegExp(`sp1\\.a|${short}`), 'nor the log')

  const socket = new WebSocket(path(`/${token}/ws`))
  await once(socket, 'open')
  gateway.gateway.table.put(entry({ id: 'sec', secureAccessToken: 'tok', epoch: 4 }))
  t.equal(await open(path(`/${token}/ws`), {}), 401, 'raising the epoch keeps new ones out')
  const pong = once(socket, 'pong')
  socket.ping()
  await pong
  socket.terminate()
})

t.test('a sandbox on IPv6, reported as used while its WebSocket is open', async (t) => {
  await using upstream = await startHttp(() => undefined, undefined, '::1')
  new WebSocketServer({ server: upstream.server }).on('connection', (socket, request) => socket.send(String(request.headers.host)))
  const reports: Renewals[] = []
  await using gateway = await startGateway([{ id: 'six', host: '::1', renewOnAccess: true }], { mode: 'uri', renewInterval: 1 }, async (report) => void reports.push(report))
  const socket = new WebSocket(`ws://127.0.0.1:${gateway.port}/six/${upstream.port}/`)
  t.equal(String(((await once(socket, 'message')) as [Buffer])[0]), `[::1]:${upstream.port}`)
  const uses = (): number => reports.filter((report) => report.sandboxes.some(({ id }) => id === 'six')).length
  await eventually(() => uses() >= 3, 'again and again', 15_000)
  const closed = once(socket, 'close')
  socket.terminate()
  await closed
  await eventually(() => [...gateway.gateway.table.inUse()].length === 0, 'nothing is in use')
})
