/** What a gateway that was told to stop still does, in which order, and how long. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import type { Renewals as Report } from '#policies/wire.ts'
import { freePort, startProgram, type Program } from '#test/support/program.ts'
import { bodyOf, eventually, RawClient, startGateway, startHttp, startRaw, statusOf } from './support.ts'

/** On a connection that the client would like to keep. */
const kept = (target: string): string => `GET ${target} HTTP/1.1\r\nHost: x\r\n\r\n`
const upgrade = (target: string): string =>
  `GET ${target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`

const since = (begin: number): number => performance.now() - begin
const settledBy = async (promise: Promise<unknown>): Promise<boolean> => Promise.race([promise.then(() => true), new Promise<boolean>((resolve) => setImmediate(resolve, false))])

/** A sandbox whose answers the test gives. */
async function startHeld() {
  const held: ServerResponse[] = []
  const server = await startHttp((_request, response) => void held.push(response))
  /** Sends a request and waits for it to arrive. @returns the client, and the answer to be given */
  const ask = async (port: number, request = kept(`/a/${server.port}/`)): Promise<[RawClient, ServerResponse]> => {
    const before = held.length
    const client = new RawClient(port).send(request)
    await eventually(() => held.length > before, 'the request arrives')
    return [client, held[before] as ServerResponse]
  }
  return { ...server, ask }
}

/** A sandbox that agrees to every upgrade, and ends a tunnel only when the other side does. */
function startTunnels() {
  return startRaw((socket: Socket) => {
    socket.once('data', () => socket.resume().write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))
    socket.once('end', () => socket.end())
  })
}

t.test('who asks nothing is let go at once, who waits for an answer gets it, and learns that it was the last', async (t) => {
  await using upstream = await startHeld()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 5_000 })
  const idle = new RawClient(gateway.port).send(kept('/status.ok'))
  await idle.until(({ received }) => received.endsWith('OK'))
  const [waiting, answer] = await upstream.ask(gateway.port)
  const begin = performance.now()
  const closing = gateway.close()
  await idle.untilClosed(4_000)
  t.equal(idle.reset, false, 'let go, not thrown out')
  t.equal(await settledBy(closing), false, 'while the other one still runs')
  answer.end('done')
  const received = await waiting.untilClosed()
  t.equal(statusOf(received), 200)
  t.match(received, /\r\nconnection: close\r\n/i, 'no next request on this connection')
  t.equal(bodyOf(received), 'done')
  await closing
  t.ok(since(begin) < 4_000, `the drain ends with the last answer, not at its deadline: ${since(begin)} ms`)
  for (const client of [idle, waiting]) client.close()
})

t.test('/readyz answers 503 to who still gets through', async (t) => {
  await using upstream = await startHeld()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  // Its head goes out before anybody knows that it is the last: the connection is kept, and busy.
  const [busy, answer] = await upstream.ask(gateway.port)
  answer.write('begun ')
  await busy.until(({ received }) => received.includes('begun '))
  t.equal(gateway.gateway.unready(), '')
  const closing = gateway.close()
  t.equal(gateway.gateway.unready(), 'draining')
  busy.send(kept('/readyz'))
  // Read by now, so that the connection is never idle between the two.
  await new Promise((resolve) => setTimeout(resolve, 50))
  answer.end('done')
  const received = await busy.untilClosed()
  const [first, second = ''] = received.split(/(?=HTTP\/1\.1 503)/)
  t.ok(first?.endsWith('4\r\ndone\r\n0\r\n\r\n'), 'what ran before is whole')
  t.equal(statusOf(second), 503)
  t.match(second, /\r\nconnection: close\r\n/i)
  t.equal(bodyOf(second), 'OpenSandbox Ingress: the gateway is shutting down\n')
  await closing
  busy.close()
})

t.test('what is not over at the deadline is broken off then, and not before', async (t) => {
  const drainTimeout = 600
  await using upstream = await startHeld()
  await using tunnels = await startTunnels()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout })
  const [silent] = await upstream.ask(gateway.port)
  const [halfway, answer] = await upstream.ask(gateway.port)
  answer.write('begun ')
  await halfway.until(({ received }) => received.includes('begun '))
  const tunnel = new RawClient(gateway.port).send(upgrade(`/a/${tunnels.port}/`))
  await tunnel.until(({ received }) => received.endsWith('\r\n\r\n'))
  const clients = { silent, halfway, tunnel }
  const begin = performance.now()
  const closing = gateway.close()
  await Promise.all(
    Object.entries(clients).map(async ([name, client]) => {
      await client.untilClosed()
      const at = since(begin)
      t.ok(at > drainTimeout - 5, `${name}: not before, after ${at} ms`)
      t.ok(at < drainTimeout + 1_000, `${name}: then, after ${at} ms`)
    }),
  )
  for (const client of Object.values(clients)) client.close()
  await closing
  t.notMatch(silent.received, / 200 /)
  t.notOk(halfway.received.endsWith('0\r\n\r\n'), 'half an answer does not end like a whole one')
  await eventually(() => upstream.sockets.size + tunnels.sockets.size === 0, 'and the sandbox is let go, too')
})

t.test('a WebSocket is told 1001 at once, and may close', async (t) => {
  await using tunnels = await startTunnels()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 3_000 })
  const client = new RawClient(gateway.port).send(upgrade(`/a/${tunnels.port}/`))
  await client.until(({ received }) => received.endsWith('\r\n\r\n'))
  client.received = ''
  const begin = performance.now()
  const closing = gateway.close()
  await client.until(({ received }) => received.length > 0)
  t.equal(Buffer.from(client.received, 'latin1').toString('hex'), '880203e9', 'one Close frame, unmasked, of two bytes: 1001')
  t.ok(since(begin) < 1_000, 'now, not at the deadline')
  t.equal(client.ended, false, 'its connection stays, so that it can answer')
  client.send('\x88\x82\x00\x00\x00\x00\x03\xe9')
  client.socket.end()
  await closing
  t.ok(since(begin) < 2_500, `and nobody waits for who has closed: ${since(begin)} ms`)
  client.close()
})

t.test('uses that were not reported yet are reported before the end', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('ok'))
  const routes = ['first', 'second', 'silent'].map((id) => ({ id, renewOnAccess: id !== 'silent' }))
  const rows: [why: string, outcome: 'taken' | 'refused', last: string[]][] = [
    ['the one under way is waited for', 'taken', ['second']],
    ['one that failed is made again, and the pause after it is not waited for', 'refused', ['first', 'second']],
  ]
  for (const [why, outcome, last] of rows) {
    const reports: Report[] = []
    let settle: (() => void) | null = null
    await using gateway = await startGateway(routes, { mode: 'uri' }, (report) => {
      reports.push(report)
      if (reports.length > 1) return Promise.resolve()
      return new Promise((resolve, reject) => (settle = () => (outcome === 'taken' ? resolve() : reject(new Error('away')))))
    })
    const use = async (id: string): Promise<void> => {
      const client = new RawClient(gateway.port).send(kept(`/${id}/${upstream.port}/`))
      await client.until(({ received }) => received.endsWith('ok'))
      client.close()
    }
    await use('first')
    await eventually(() => settle !== null, 'the first report is under way')
    // Nothing of this can be reported now: one report at a time.
    await use('second')
    await use('silent')
    t.equal(reports.length, 1, why)
    const closing = gateway.close()
    ;(settle as unknown as () => void)()
    await closing
    t.same(reports.slice(1).map(({ sandboxes }) => sandboxes.map(({ id }) => id)), [last], why)
  }
})

/** The program with an admin listener, and one sandbox `a` on this host. */
async function startMain(folder: string, drainTimeout: number): Promise<{ program: Program; port: number; ready: () => Promise<[number, string]>; write: (sandboxes: unknown[]) => void }> {
  const routes = join(folder, 'routes.json')
  const write = (sandboxes: unknown[]): void => writeFileSync(routes, JSON.stringify({ sandboxes }))
  write([{ id: 'a', host: '127.0.0.1' }])
  const [port, adminPort] = [await freePort(), await freePort()]
  const ready = async (): Promise<[number, string]> => {
    const answer = await fetch(`http://127.0.0.1:${adminPort}/readyz`, { signal: AbortSignal.timeout(2_000) })
    return [answer.status, await answer.text()]
  }
  const args = ['gateway/main.ts', '--host=127.0.0.1', `--port=${port}`, `--admin-port=${adminPort}`, '--mode=uri', '--provider=static', `--routes=${routes}`, '--allow-loopback-upstreams', `--drain-timeout=${drainTimeout}`]
  const program = await startProgram({ args, ready: async () => (await ready())[0] === 200 })
  return { program, port, ready, write }
}

t.test('a connection that falls idle while draining is let go then', async (t) => {
  await using upstream = await startHeld()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 5_000 })
  const [client, answer] = await upstream.ask(gateway.port)
  answer.write('begun ')
  await client.until(({ received }) => received.includes('begun '))
  const unused = new RawClient(gateway.port)
  let connections = ''
  for (const until = Date.now() + 5_000; connections !== '2' && Date.now() < until; await new Promise((resolve) => setTimeout(resolve, 5))) connections = /client_connections (\d+)/.exec(await gateway.gateway.metrics.registry.metrics())?.[1] ?? ''
  t.equal(connections, '2', 'one that asks, one that never did')
  const begin = performance.now()
  const closing = gateway.close()
  answer.end('done')
  await client.until(({ received }) => received.endsWith('0\r\n\r\n'))
  await closing
  t.ok(since(begin) < 4_000, `nothing runs, so nothing is waited for: ${since(begin)} ms`)
  for (const one of [client, unused]) one.close()
})

t.test('half an answer whose only end is the end of the connection is reset at the deadline', async (t) => {
  await using upstream = await startHeld()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', drainTimeout: 200 })
  const [client, answer] = await upstream.ask(gateway.port, `GET /a/${upstream.port}/ HTTP/1.0\r\n\r\n`)
  answer.write('begun ')
  await client.until(({ received }) => received.includes('begun '))
  await gateway.close()
  await client.until(({ closed, ended }) => closed || ended)
  t.equal(client.reset, true)
  client.close()
})

t.test('the deadline counts from the signal, however long a report takes', async (t) => {
  const drainTimeout = 400
  await using upstream = await startHeld()
  let answered: () => void = () => undefined
  const gateway = await startGateway([{ id: 'a', renewOnAccess: true }], { mode: 'uri', drainTimeout }, () => new Promise((resolve) => (answered = resolve)))
  const [client] = await upstream.ask(gateway.port)
  const begin = performance.now()
  const closing = gateway.close()
  const inTime = await client.untilClosed(drainTimeout + 1_000).then(() => true, () => false)
  t.ok(inTime, `broken off after ${since(begin)} ms`)
  answered()
  await closing
  client.close()
})

t.test('the program: its admin listener says 503 while it drains, and it ends with 0', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'gateway-drain-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  await using upstream = await startHeld()
  const { program, port, ready } = await startMain(folder, 5_000)
  await using _ = program
  t.same(await ready(), [200, 'OK'])
  const [client, answer] = await upstream.ask(port)
  process.kill(program.pid, 'SIGTERM')
  await eventually(() => program.log().includes('"draining"'), 'the signal arrives')
  t.same(await ready(), [503, 'draining\n'])
  t.equal(program.running, true)
  answer.end('done')
  t.equal(bodyOf(await client.untilClosed()), 'done')
  client.close()
  t.equal(await program.ended, 0)
})

t.test('the program: a sandbox that ends during the drain takes its connections with it', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'gateway-drain-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  await using upstream = await startHeld()
  const { program, port, write } = await startMain(folder, 8_000)
  await using _ = program
  const [client, answer] = await upstream.ask(port)
  answer.write('begun ')
  await client.until(({ received }) => received.includes('begun '))
  process.kill(program.pid, 'SIGTERM')
  await eventually(() => program.log().includes('"draining"'), 'the signal arrives')
  // Its address may have a new owner from now on.
  write([])
  await t.resolves(client.untilClosed(4_000), 'long before the deadline')
  client.close()
})

t.test('the program: what is broken off at the deadline has its access line', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'gateway-drain-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  await using upstream = await startHeld()
  await using tunnels = await startTunnels()
  const { program, port } = await startMain(folder, 300)
  await using _ = program
  const [silent] = await upstream.ask(port)
  const [halfway, answer] = await upstream.ask(port)
  answer.write('begun ')
  await halfway.until(({ received }) => received.includes('begun '))
  const tunnel = new RawClient(port).send(upgrade(`/a/${tunnels.port}/`))
  await tunnel.until(({ received }) => received.endsWith('\r\n\r\n'))
  process.kill(program.pid, 'SIGTERM')
  t.equal(await program.ended, 0)
  const lines = program.log().split('\n').filter((line) => line.includes('"sandbox_id":"a"')).map((line) => JSON.parse(line) as { msg: string; code: string })
  t.same(lines.map(({ msg }) => msg).sort(), ['request', 'request', 'upgrade'], 'the silent one, the half answer, the tunnel')
  t.notOk(lines.some(({ code }) => code === 'EDGE_UPSTREAM_BROKEN'), 'and the sandbox is not blamed')
  for (const client of [silent, halfway, tunnel]) client.close()
})
