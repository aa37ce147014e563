/** At the limit of its descriptors the gateway answers or sends away whoever comes, and when they are gone it is what it was before. */
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import type { RequestListener } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { parseAccessKeys, signShort } from '#policies/access.ts'
import { connectionsThatFit } from '../../gateway/descriptors.ts'
import { UpstreamGuard } from '../../gateway/upstream-guard.ts'
import { sized } from '../support/size.ts'
import { listening, said, startWith, type Program } from './program.ts'
import { ask, eventually, get, RawClient, startHttp, startRaw, statusOf } from './support.ts'

const folder = mkdtempSync(join(tmpdir(), 'gateway-descriptors-'))
t.teardown(() => rmSync(folder, { recursive: true }))
t.setTimeout(sized(110_000, 600_000))

function routesFile(name: string, sandboxes: unknown[]): string {
  const path = join(folder, name)
  writeFileSync(path, JSON.stringify({ sandboxes }))
  return path
}

type Holding = AsyncDisposable & { readonly port: number; readonly held: () => number; readonly answer: () => void }

async function startHolding(): Promise<Holding> {
  const child = fork(new URL('./holding.ts', import.meta.url))
  let held = 0
  const [port] = (await once(child, 'message')) as [number]
  child.on('message', (message) => void ({ held } = message as { held: number }))
  return {
    port,
    held: () => held,
    answer: () => void child.send('answer'),
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await once(child, 'exit')
    },
  }
}

function startGatewayWith(descriptors: number, routes: string, ...flags: string[]): Program {
  return startWith(descriptors, '--port=0', '--mode=uri', '--provider=static', `--routes=${routes}`, '--allow-loopback-upstreams', '--access-log=off', '--max-requests-per-port=100000', ...flags)
}

/** Numbers in use. One beyond the limit, from whoever started this process, costs nothing. */
function descriptorsOf({ child }: Program, limit: number): number {
  return readdirSync(`/proc/${child.pid}/fd`).filter((number) => Number(number) < limit).length
}

/** Sends many requests without waiting for an answer: a client costs one descriptor, each of its requests another. */
function inRow(target: string, count: number): string {
  const request = get(target, 'Accept: application/json')
  return request.replace('Connection: close\r\n', '').repeat(count - 1) + request
}

const isOver = (client: RawClient): boolean => client.closed || client.ended
const served = '200'
const refused = '503 EDGE_OVERLOADED'
const closed = 'closed'

/** What became of each request of a client: a whole answer of the sandbox, a whole refusal, no answer at all, or what came instead. */
function outcomes({ received }: RawClient, sent: number): string[] {
  const list: string[] = []
  for (let at = 0; at < received.length; ) {
    const body = received.indexOf('\r\n\r\n', at) + 4
    const head = received.slice(at, body)
    const end = body + Number(/^content-length: (\d+)\r$/im.exec(head)?.[1])
    const text = received.slice(body, end)
    if (/^HTTP\/1\.1 200 OK\r\n/.test(head) && text === 'answered') list.push(served)
    else if (/^HTTP\/1\.1 503 Service Unavailable\r\n/.test(head) && /^retry-after: \d+\r$/im.test(head) && text.endsWith('}\n')) list.push(`503 ${(JSON.parse(text) as { code: string }).code}`)
    else return [...list, received.slice(at)]
    at = end
  }
  while (list.length < sent) list.push(closed)
  return list
}

function tally(crowd: readonly RawClient[], sent: number): Readonly<Record<string, number>> {
  const found: Record<string, number> = {}
  for (const outcome of crowd.flatMap((client) => outcomes(client, sent))) found[outcome] = (found[outcome] ?? 0) + 1
  return found
}

t.test('how many clients fit: each may need a second descriptor, and some more are let in to be refused', async (t) => {
  const limits = (soft: string): string => `Max processes             95977                95977                processes\nMax open files            ${soft}                20000                files\n`
  for (const [soft, wanted, why] of [
    ['unlimited', Infinity, 'no limit'],
    ['46', 16, 'a gateway for nobody is none'],
    ['300', 47, 'few'],
    ['20000', 9_428, 'many'],
  ] as const) t.equal(connectionsThatFit(limits(soft)), wanted, why)
  t.equal(connectionsThatFit(''), Infinity, 'a system that does not say')
  for (const soft of [1_024, 4_096, 20_000, 65_536, 1_048_576]) {
    const fit = connectionsThatFit(limits(String(soft)))
    t.ok(2 * fit + Math.max(16, Math.floor(fit / 10)) + 100 <= soft, `${soft}: ${fit} with as many sandboxes and those who are refused`)
    t.ok(2.2 * fit > soft - 250, `${soft}: no fewer than need be`)
  }
})

type Row = {
  readonly why: string
  readonly descriptors: number
  /** Those who come first; null: as many as the gateway says fit. */
  readonly clients: number | null
  /** Requests that each of them sends at once, to a sandbox that holds them. */
  readonly ahead: number
  /** Those who come on top: first with a request each to a sandbox that answers, then as many without a word. */
  readonly more: number
  /** What became of the first ones' requests. */
  readonly first: readonly string[]
}

/** As many as this process may have itself, if that is fewer. */
const many = Math.min(sized(300, 20_000), Number(/^Max open files\s+\d+\s+(\d+)/m.exec(readFileSync('/proc/self/limits', 'utf8'))?.[1] ?? Infinity))

t.test('more clients than fit, with requests under way', async (t) => {
  const rows: Row[] = [
    { why: 'a descriptor for each client and one for its sandbox', descriptors: many, clients: null, ahead: 1, more: sized(300, 3_000), first: [served] },
    { why: 'requests sent ahead, and no descriptor to dial with', descriptors: many, clients: Math.ceil(many / 30), ahead: 40, more: sized(100, 1_000), first: [served, refused] },
    { why: 'fewer descriptors than the fewest clients need', descriptors: 46, clients: 16, ahead: 1, more: 0, first: [served, refused] },
  ]
  const ms = sized(15_000, 60_000)
  for (const { why, descriptors, clients, ahead, more, first: wanted } of rows) {
    await t.test(why, { timeout: 2 * ms }, async (t) => {
      const begun = Date.now()
      await using holding = await startHolding()
      await using other = await startHttp((_request, response) => response.end('answered'))
      await using program = startGatewayWith(descriptors, routesFile('routes.json', [{ id: 'a', host: '127.0.0.1' }]), '--max-connections=100000')
      const port = await listening(program)
      const before = descriptorsOf(program, descriptors)
      const fits = said(program, 'the descriptor limit allows fewer connections: raise ulimit -n')[0]?.['maxConnections'] as number
      const come = async (count: number, text: string): Promise<RawClient[]> => {
        const crowd: RawClient[] = []
        while (crowd.length < count) {
          for (let i = Math.min(count - crowd.length, 1_000); i > 0; i--) crowd.push(new RawClient(port).send(text))
          await eventually(() => crowd.every(({ socket }) => !socket.connecting), 'connected', ms)
        }
        return crowd
      }

      const count = clients ?? fits
      t.ok(count <= fits, 'who comes first is let in')
      const first = await come(count, inRow(`/a/${holding.port}/`, ahead))
      // A refusal waits for the answers before it, so nobody sees that all dials are done but by nothing happening any more.
      let last = ''
      let since = Date.now()
      const quiet = (): boolean => {
        const state = `${holding.held()} ${first.filter(isOver).length}`
        if (state !== last) [last, since] = [state, Date.now()]
        return holding.held() === count * ahead || Date.now() - since > sized(500, 2_000)
      }
      await eventually(quiet, 'served as far as they can be', ms)
      const underWay = holding.held()
      t.ok(underWay > 0, `${underWay} requests are under way`)
      const late = await come(more, get(`/a/${other.port}/`, 'Accept: application/json'))
      await eventually(() => late.every(isOver), 'who comes on top is not kept waiting', ms)
      const margin = Math.max(16, Math.floor(fits / 10))
      const silent = await come(clients === null ? more : 0, '')
      await eventually(() => silent.filter(isOver).length >= silent.length - margin, 'who says nothing takes no more descriptors than who is refused', ms)
      t.ok(clients !== null || descriptorsOf(program, descriptors) < descriptors, 'some are left')
      holding.answer()
      await eventually(() => first.every(isOver), 'nobody waits for ever', ms)

      const [ends, lateEnds] = [tally(first, ahead), tally(late, 1)]
      t.same(Object.keys(ends).filter((outcome) => outcome !== closed).sort(), wanted, JSON.stringify(ends))
      t.ok(ahead > 1 || ends[closed] === undefined, 'everybody who was let in has an answer')
      t.ok((ends[served] ?? 0) >= underWay, 'what was under way has come to its end')
      t.same(Object.keys(lateEnds).filter((outcome) => ![served, refused, closed].includes(outcome)), [], JSON.stringify(lateEnds))
      t.ok(clients !== null || (lateEnds[refused] ?? 0) >= margin, 'those just above the limit are told so')

      for (const client of [...first, ...late, ...silent]) client.close()
      for (const [upstream, over] of [[holding, 'a connection of before'], [other, 'a new connection']] as const) {
        let status = 0
        for (const until = Date.now() + 2_000; status !== 200 && Date.now() < until; ) status = statusOf(await ask(port, get(`/a/${upstream.port}/`), 2_000).catch(() => ''))
        t.equal(status, 200, `back to work over ${over}`)
      }
      t.equal(program.child.exitCode, null, 'nothing crashed')
      t.equal(said(program, 'listening')[0]?.['pid'], program.child.pid, 'the same process')
      await eventually(() => descriptorsOf(program, descriptors) <= before + 2, 'all descriptors are given back', 10_000)
      t.comment(`${fits} fit into ${descriptors}; ${((Date.now() - begun) / 1000).toFixed(1)} s`)
    })
  }
})

/** Fewer than the fewest clients need: fifty can take them all. */
const limit = 60

/** Fills what is left with clients that say nothing, until nothing is left for a while: who was refused gives his descriptor back. */
async function fill(program: Program, port: number, crowd: RawClient[]): Promise<void> {
  const until = Date.now() + 10_000
  for (let full = 0; full < 15; full++, await delay(20)) {
    if (descriptorsOf(program, limit) === limit) continue
    if (Date.now() > until) throw new Error(`never full: ${descriptorsOf(program, limit)} of ${limit}`)
    crowd.push(new RawClient(port))
    full = 0
  }
}

t.test('without a descriptor: connections of before are answered, changed files are read later', { timeout: 60_000 }, async (t) => {
  const keys = join(folder, 'keys')
  writeFileSync(keys, 'a=c2VjcmV0LWE=\n')
  const before = [{ id: 'a', host: '127.0.0.1' }, { id: 'n', host: 'localhost' }, { id: 'sec', host: '127.0.0.1', secureAccessToken: 'tok' }]
  await using holding = await startHolding()
  await using other = await startHttp((_request, response) => response.end('answered'))
  await using program = startGatewayWith(limit, routesFile('changing.json', before), `--secure-access-keys-file=${keys}`)
  const port = await listening(program)
  const staying = (target: string, fields = 'X: y'): string => get(target).replace('Connection: close', fields)
  const upgrade = 'Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=='
  const rows: [why: string, request: string, wanted: RegExp][] = [
    ['a sandbox by its address', staying(`/a/${other.port}/`), /^HTTP\/1\.1 503 /],
    ['a sandbox by its name', staying(`/n/${other.port}/`), /^HTTP\/1\.1 50[23] /],
    ['the gateway itself', staying('/status.ok'), /^HTTP\/1\.1 200 /],
    ['a WebSocket', staying(`/a/${other.port}/`, upgrade), /^HTTP\/1\.1 503 /],
  ]
  const early = rows.map(() => new RawClient(port))
  for (const client of early) await client.send('GET /status.ok HTTP/1.1\r\nHost: x\r\n\r\n').until(({ received }) => received.endsWith('OK'))
  const crowd = Array.from({ length: 10 }, () => new RawClient(port).send(inRow(`/a/${holding.port}/`, 40)))
  await fill(program, port, crowd)
  for (const [i, [why, request, wanted]] of rows.entries()) {
    const client = early[i] as RawClient
    client.received = ''
    t.match(await client.send(request).until(({ received }) => received.includes('\r\n\r\n')), wanted, why)
  }
  for (const client of early) client.close()
  await eventually(() => descriptorsOf(program, limit) < limit, 'they are gone')
  await fill(program, port, crowd)

  routesFile('changing.json', [...before, { id: 'b', host: '127.0.0.1' }])
  writeFileSync(keys, 'b=c2VjcmV0LWI=\n')
  for (const msg of ['routes not reloaded', 'access keys not reloaded']) await eventually(() => said(program, msg).some(({ problem }) => String(problem).includes('EMFILE')), msg)
  for (const client of crowd) client.close()
  const parsed = parseAccessKeys('b=c2VjcmV0LWI=')
  const signature = signShort('b', parsed.ok ? (parsed.keys.get('b') as Uint8Array) : new Uint8Array(), 'sec', other.port, 'x2qxvk')
  for (const [request, why] of [
    [get(`/b/${other.port}/`), 'the routes are read when they can be'],
    [get(`/sec/${other.port}/x2qxvk/${signature}/`), 'and so are the keys'],
  ] as const) {
    let status = 0
    for (const until = Date.now() + 5_000; status !== 200 && Date.now() < until; await delay(100)) status = statusOf(await ask(port, request).catch(() => ''))
    t.equal(status, 200, why)
  }
})

t.test('connections that wait for a next request make room for those that are needed', { timeout: 60_000 }, async (t) => {
  await using ports = new AsyncDisposableStack()
  const answer: RequestListener = (_request, response) => void response.end('answered')
  const many: number[] = []
  while (many.length < 100) many.push(ports.use(await startHttp(answer, (server) => (server.keepAliveTimeout = 60_000))).port)
  await using tunnel = await startRaw((socket) => {
    socket.once('data', () => socket.resume().write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))
    socket.on('end', () => socket.end())
  })
  await using program = startGatewayWith(limit, routesFile('routes.json', [{ id: 'a', host: '127.0.0.1' }]))
  const port = await listening(program)
  const before = descriptorsOf(program, limit)
  const fits = said(program, 'the descriptor limit allows fewer connections: raise ulimit -n')[0]?.['maxConnections'] as number
  const answers = new Map<number, number>()
  let most = 0
  for (const target of many) {
    const status = statusOf(await ask(port, get(`/a/${target}/`)))
    answers.set(status, (answers.get(status) ?? 0) + 1)
    most = Math.max(most, descriptorsOf(program, limit))
  }
  t.same([...answers], [[200, many.length]], 'one client that asks port after port is always answered')
  t.ok(most <= before + fits + 2, `idle connections are no more than clients may be: ${most} of ${limit}, ${before} at first`)
  // Each needs two.
  const upgraded = Array.from({ length: fits - 1 }, () => new RawClient(port).send(get(`/a/${tunnel.port}/`, 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==').replace('Connection: close', 'Connection: Upgrade')))
  for (const client of upgraded) t.equal(statusOf(await client.until(({ received }) => received.includes('\r\n\r\n'))), 101)
  t.ok(descriptorsOf(program, limit) <= before + 2 * fits + 1, 'nor do they stay beside those of WebSockets')
  for (const client of upgraded) client.close()
})

t.test('without a descriptor the gateway cannot ask for its own addresses, and knows those of before', { timeout: 60_000 }, async (t) => {
  let own = (): string[] => ['10.9.9.9']
  const guard = new UpstreamGuard(false, () => own())
  own = () => {
    throw new Error('uv_interface_addresses returned Unknown system error 24')
  }
  guard.refresh()
  t.equal(guard.allows('10.9.9.9'), false, 'its own address stays its own')
  t.throws(() => new UpstreamGuard(false, own), 'at the start it must know them')

  await using holding = await startHolding()
  await using program = startGatewayWith(limit, routesFile('routes.json', [{ id: 'a', host: '127.0.0.1' }]))
  const port = await listening(program)
  await fill(program, port, Array.from({ length: 10 }, () => new RawClient(port).send(inRow(`/a/${holding.port}/`, 40))))
  // It looks every 10 s.
  await Promise.race([program.code, delay(11_000)])
  t.equal(program.child.exitCode, null, program.output())
})
