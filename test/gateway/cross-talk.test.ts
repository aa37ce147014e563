/**
 * The address of a sandbox that ended is given to another one within milliseconds, under load. Nobody who asked for the old one may
 * ever be answered by the new one: not through a pooled socket, not through a retry, not through a dial that was under way.
 */
import { Agent, createServer, request as httpRequest, type Server } from 'node:http'
import { connect, type AddressInfo } from 'node:net'
import { performance } from 'node:perf_hooks'
import { setTimeout as delay } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import t from 'tap'
import type { RouteEntry } from '#policies/wire.ts'
import type { Sandbox } from '../../gateway/routes.ts'
import { entry, eventually, get, RawClient, startGateway, startHttp, startRaw, statusOf } from './support.ts'

t.test('an address reused within 10 ms under load never crosses owners', async (t) => {
  const wrong: string[] = []
  let answered = 0
  let port = 0
  /** Each owner is a server of its own on the same address: what was sent to the old one dies with it, as it does with a namespace. */
  const own = async (name: string): Promise<Server> => {
    const server = createServer((request, response) => {
      const wanted = (request.url as string).slice(1)
      if (wanted !== name) wrong.push(`${wanted} reached ${name}`)
      setTimeout(() => response.end(name), Math.random() * 4)
    })
    await new Promise<void>((resolve, reject) => server.once('error', reject).listen(port, '127.0.0.1', resolve))
    port = (server.address() as AddressInfo).port
    return server
  }
  let owner = 'owner-0'
  let server = await own(owner)
  await using gateway = await startGateway([], { mode: 'uri', bootGrace: 1_000 })
  const { table } = gateway.gateway
  let running = true
  const agent = new Agent({ keepAlive: true })
  const statuses = new Map<number, number>()
  /** ms between the end of an owner and the route of the next one, per life. */
  const gaps: number[] = []
  const one = (id: string): Promise<void> =>
    new Promise((resolve) => {
      const asked = httpRequest({ port: gateway.port, host: '127.0.0.1', path: `/${id}/${port}/${id}`, agent }, (response) => {
        let text = ''
        response.on('data', (chunk: Buffer) => (text += chunk.toString()))
        response.on('close', () => {
          statuses.set(response.statusCode as number, (statuses.get(response.statusCode as number) ?? 0) + 1)
          if (response.statusCode === 200) {
            answered++
            if (response.complete && text !== id) wrong.push(`${id} was answered by ${text}`)
          }
          resolve()
        })
      })
      asked.on('error', () => resolve())
      asked.end()
    })
  table.put(entry({ id: 'owner-0', lifecycle: 'life-0' }))
  const clients = Array.from({ length: 24 }, async () => {
    while (running) await one(owner)
  })
  for (let life = 1; life <= 60; life++) {
    const before = answered
    await eventually(() => answered >= before + 6, 'answers in this life')
    // The old owner ends: the gateway hears of it, then the engine takes the address away and gives it to the next.
    const ended = performance.now()
    table.delete(owner)
    server.close()
    server.closeAllConnections()
    const next = `owner-${life}`
    server = await own(next)
    table.put(entry({ id: next, lifecycle: `life-${life}` }))
    gaps.push(performance.now() - ended)
    owner = next
  }
  running = false
  await Promise.all(clients)
  agent.destroy()
  server.closeAllConnections()
  server.close()
  t.same(wrong, [] as string[], 'no request crossed owners')
  gaps.sort((one, other) => one - other)
  const median = gaps[gaps.length >> 1] as number
  t.ok(median < 10, `the address had its next owner after ${median.toFixed(2)} ms (median of ${gaps.length}; at most ${gaps.at(-1)?.toFixed(2)} ms)`)
  t.ok(answered > 200, `${answered} requests were answered (${[...statuses].map(([status, n]) => `${status}: ${n}`).join(', ')})`)
})

t.test('the same id with a new life gets new connections', async (t) => {
  let connections = 0
  await using upstream = await startHttp((_request, response) => response.end('ok'), (server) => server.on('connection', () => connections++))
  await using gateway = await startGateway([{ id: 'a', lifecycle: '1' }], { mode: 'uri' })
  const ask = async (): Promise<number> => (await fetch(`http://127.0.0.1:${gateway.port}/a/${upstream.port}/`)).status
  for (let i = 0; i < 5; i++) t.equal(await ask(), 200)
  t.equal(connections, 1, 'one life, one pooled connection')
  gateway.gateway.table.put(entry({ id: 'a', lifecycle: '1', state: 'Running', secureAccessToken: '' }))
  await ask()
  t.equal(connections, 1, 'a change of anything but life and address keeps it')
  gateway.gateway.table.put(entry({ id: 'a', lifecycle: '2' }))
  await eventually(() => upstream.sockets.size === 0, 'the old connection is closed')
  await ask()
  t.equal(connections, 2)
})

t.test('a request under way ends with its sandbox, and says so', async (t) => {
  let hold: () => void = () => undefined
  const held = new Promise<void>((resolve) => (hold = resolve))
  await using upstream = await startHttp(() => hold())
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
  const asked = fetch(`http://127.0.0.1:${gateway.port}/a/${upstream.port}/`)
  await held
  gateway.gateway.table.delete('a')
  const response = await asked
  t.equal(response.status, 502)
  t.match(await response.text(), 'the sandbox ended')
})

t.test('a new owner of an exclusive address ends the old one, even without a delete', async (t) => {
  const { RouteTable } = await import('../../gateway/routes.ts')
  const table = new RouteTable(() => true)
  const ended: string[] = []
  const tie = (id: string): void => void table.tiesOf(table.get(id) as Sandbox).others.add({ destroy: () => ended.push(id) })
  table.put(entry({ id: 'old', host: '10.0.0.1' }))
  tie('old')
  table.put(entry({ id: 'new', host: '10.0.0.1' }))
  t.equal(table.get('old'), undefined)
  t.same(ended, ['old'])
  table.delete('old')
  t.ok(table.get('new'), 'a late delete of the old one does not touch the new')
  table.put(entry({ id: 'dead', host: '10.0.0.1', state: 'Terminated' }))
  t.ok(table.get('new'), 'who is over claims no address')
  tie('new')
  table.put(entry({ id: 'new', host: '10.0.0.1', state: 'Terminated' }))
  t.same(ended, ['old', 'new'], 'and keeps no connection')
  table.put(entry({ id: 'left', host: '10.0.0.2' }))
  table.put(entry({ id: 'stays', host: '10.0.0.3' }))
  for (const id of ['left', 'stays']) tie(id)
  const list = [entry({ id: 'stays', host: '10.0.0.3', state: 'Paused' }), entry({ id: 'first', host: '10.0.0.2' }), entry({ id: 'second', host: '10.0.0.2' })]
  t.equal(table.replace(new Map(list.map((one) => [one.id, one]))), null)
  t.same([ended, table.size, table.get('first'), table.get('stays')?.entry.state], [['old', 'new', 'left'], 2, undefined, 'Paused'], 'a whole list: who is not in it ends, and the last one has the address')
  table.put(entry({ id: 'third', host: '10.0.0.2' }))
  t.equal(table.get('second'), undefined, 'also against what comes after the list')
  const shared = new RouteTable(() => false)
  shared.put(entry({ id: 'one' }))
  shared.put(entry({ id: 'two' }))
  t.equal(shared.size, 2, 'loopback may be shared')
})

t.test('a sandbox that comes back from being over has its address again, and gives it up to the next', async (t) => {
  const { RouteTable } = await import('../../gateway/routes.ts')
  for (const state of ['Failed', 'Terminated'] as const) {
    const table = new RouteTable(() => true)
    const put = (id: string, now: RouteEntry['state'] = 'Running'): void => table.put(entry({ id, host: '10.0.0.1', state: now }))
    put('a', state)
    const a = table.get('a')
    put('a')
    t.equal(table.get('a'), a, `${state}: it goes on with its life`)
    put('b')
    t.same([table.get('a'), table.get('b')?.entry.state], [undefined, 'Running'], `${state}: nobody is led to b by the name of a`)
    put('a', state)
    t.equal(table.size, 2, `${state}: who is over disturbs nobody`)
    let ended = 0
    table.tiesOf(table.get('b') as Sandbox).others.add({ destroy: () => void ended++ })
    put('a')
    t.same([table.get('a')?.entry.state, table.get('b'), ended], ['Running', undefined, 1], `${state}: the last word on an address counts`)
  }
})

t.test('which addresses have one owner: with routes from a server, all but the own ones of this host', async (t) => {
  const rows: [provider: 'server' | 'static', host: string, shared: boolean, why: string][] = [
    ['server', '192.0.2.10', false, 'an engine gives an address to one sandbox at a time'],
    ['server', '2001:db8::10', false, 'also an IPv6 one'],
    ['server', 'sandbox.test', false, 'and a name'],
    ['server', '127.0.0.1', true, 'published ports of many sandboxes are on loopback'],
    ['server', '::1', true, 'also on this one'],
    ['server', 'localhost', true, 'by whatever name'],
    ['static', '192.0.2.10', true, 'who writes a routes file may name one host twice'],
  ]
  for (const [provider, host, shared, why] of rows) {
    await using gateway = await startGateway([{ id: 'old', host }], { provider })
    const { table } = gateway.gateway
    let ended = 0
    table.tiesOf(table.get('old') as Sandbox).others.add({ destroy: () => void ended++ })
    table.put(entry({ id: 'new', host }))
    t.same([table.get('old') !== undefined, table.get('new') !== undefined, ended], [shared, true, shared ? 0 : 1], `${provider}, ${host}: ${why}`)
  }
})

/** Each request names in its path whom it is for. */
const asks = {
  GET: (id: string, port: number) => get(`/${id}/${port}/${id}`, 'Accept: application/json'),
  POST: (id: string, port: number) => get(`/${id}/${port}/${id}`, 'Accept: application/json', 'Content-Length: 4').replace('GET', 'POST') + 'body',
  upgrade: (id: string, port: number) => get(`/${id}/${port}/${id}`, 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==').replace('Connection: close', 'Connection: Upgrade'),
}

/** Whoever has the address now: answers each request, and keeps what reached it. A connection counts even when it brought nothing. */
async function ownerOf(host: string, port: number): Promise<AsyncDisposable & { readonly heard: string[] }> {
  const heard: string[] = []
  const server = createServer((_request, response) => response.end('the owner'))
  server.on('connection', (socket) => {
    const nth = heard.push('') - 1
    socket.on('data', (chunk: Buffer) => (heard[nth] += chunk.toString('latin1')))
  })
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(port, host, resolve))
  return {
    heard,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** A port on which a request gets no answer, until its owner lets go of it. `waits` resolves when the request has come to where it waits. */
type Silent = { readonly port: number; waits(): Promise<void>; letGo(): Promise<void> }

/** Nothing listens, so the gateway tries again. */
async function closedPort(host: string): Promise<Silent> {
  const gone = await startRaw(() => undefined, host)
  await gone[Symbol.asyncDispose]()
  // Tries come 0, 50, 150 and 350 ms after the request.
  return { port: gone.port, waits: () => delay(220), letGo: () => delay(0) }
}

/** Somebody listens who never accepts, and the queue is full: the kernel sends the dial's SYN again a second later, whoever listens by then. */
async function deafPort(host: string): Promise<Silent> {
  const bell = new Int32Array(new SharedArrayBuffer(4))
  // Only a thread that stands still does not accept.
  const code = `
    const { parentPort, workerData } = require('node:worker_threads')
    const server = require('node:net').createServer().listen({ port: 0, host: '${host}', backlog: 1 }, () => {
      parentPort.postMessage(server.address().port)
      Atomics.wait(workerData, 0, 0, 20_000)
      process.exit()
    })`
  const worker = new Worker(code, { eval: true, workerData: bell })
  const port = await new Promise<number>((resolve, reject) => worker.once('message', resolve).once('error', reject))
  // The kernel takes one more than the backlog says.
  const fillers = [1, 2].map(() => connect(port, host).on('error', () => undefined))
  await Promise.all(fillers.map((filler) => new Promise((resolve) => filler.once('connect', resolve))))
  const letGo = async (): Promise<void> => {
    const exited = new Promise((resolve) => worker.once('exit', resolve))
    Atomics.store(bell, 0, 1)
    Atomics.notify(bell, 0)
    await exited
    for (const filler of fillers) filler.destroy()
  }
  return { port, waits: () => delay(50), letGo }
}

/** The sandbox takes the request and says nothing. */
async function mutePort(host: string): Promise<Silent> {
  let taken = false
  const server = await startRaw((socket) => void socket.on('data', () => (taken = true)), host)
  return { port: server.port, waits: () => eventually(() => taken, 'the request is at the sandbox'), letGo: async () => server[Symbol.asyncDispose]() }
}

t.test('a request under way when its sandbox ends never reaches who has the address next', async (t) => {
  const goesOn = 'its sandbox goes on'
  const taken = 'its sandbox ends, and a new one gets the address'
  const reborn = 'its sandbox gets a new life'
  const arrives = /^HTTP\/1\.1 200 .*the owner$/s
  const broken = /^HTTP\/1\.1 502 .*"the sandbox ended"/s
  const unavailable = /^HTTP\/1\.1 503 .*Service Unavailable\n$/s
  const rows: [ask: keyof typeof asks, where: string, open: (host: string) => Promise<Silent>, fate: string, answer: RegExp][] = [
    // These arrive: without them the others would pass, too, if nothing were ever tried again.
    ['GET', 'waits for its next try', closedPort, goesOn, arrives],
    ['POST', 'waits for its next try', closedPort, goesOn, arrives],
    ['GET', 'is dialling', deafPort, goesOn, arrives],
    ['upgrade', 'is dialling', deafPort, goesOn, arrives],
  ]
  for (const fate of [taken, reborn]) {
    rows.push(
      ['GET', 'waits for its next try', closedPort, fate, broken],
      ['POST', 'waits for its next try', closedPort, fate, broken],
      ['GET', 'is dialling', deafPort, fate, broken],
      ['GET', 'waits for its answer', mutePort, fate, broken],
      ['upgrade', 'is dialling', deafPort, fate, unavailable],
      ['upgrade', 'waits for its 101', mutePort, fate, unavailable],
    )
  }
  // All at once, because most of the time is waiting; each with an address of its own, so that nobody else takes the port that is free for a while.
  const row = async ([ask, where, open, fate, answer]: (typeof rows)[number], nth: number): Promise<void> => {
    const name = `${ask} ${where}, ${fate}`
    const host = `127.1.0.${nth + 1}`
    await using gateway = await startGateway([{ id: 'old', host }], { mode: 'uri', bootGrace: 3_000 })
    const { table } = gateway.gateway
    const { port, waits, letGo } = await open(host)
    const client = new RawClient(gateway.port).send(asks[ask]('old', port))
    await eventually(() => [...table.inUse()].length === 1, `${name}: under way`)
    await waits()
    t.same([client.received, client.ended], ['', false], `${name}: it waits`)
    if (fate === taken) table.delete('old')
    if (fate === reborn) table.put(entry({ id: 'old', host, lifecycle: 'second' }))
    await letGo()
    await using owner = await ownerOf(host, port)
    if (fate === taken) table.put(entry({ id: 'new', host }))
    t.match(await client.untilClosed(), answer, name)
    t.notOk(client.reset, `${name}: closed in order`)
    // Beyond the next try, and the next SYN, of what should be gone.
    if (fate !== goesOn) await delay(1_300)
    t.equal(owner.heard.length, fate === goesOn ? 1 : 0, `${name}: the owner heard ${JSON.stringify(owner.heard)}`)
    const fresh = new RawClient(gateway.port).send(asks.GET(fate === taken ? 'new' : 'old', port))
    t.match(await fresh.untilClosed(), arrives, `${name}: who asks for the owner reaches it`)
    for (const each of [client, fresh]) each.close()
  }
  await Promise.all(rows.map(row))
})

t.test('the connection of a refused upgrade ends with it, and serves nobody after that', async (t) => {
  const heard: string[] = []
  const ended: number[] = []
  await using upstream = await startRaw((socket) => {
    const nth = heard.push('') - 1
    socket.on('data', (chunk: Buffer) => {
      heard[nth] += `${/^GET (\S+)/.exec(chunk.toString('latin1'))?.[1]} `
      socket.write('HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno')
    })
    socket.on('end', () => {
      ended.push(nth)
      socket.end()
    })
  })
  await using gateway = await startGateway([{ id: 'old', lifecycle: '1' }, { id: 'other' }], { mode: 'uri' })
  const { table } = gateway.gateway
  const rows: [name: string, change: () => void, id: string][] = [
    ['the first', () => undefined, 'old'],
    ['the second of the same life', () => undefined, 'old'],
    ['another sandbox with the same address', () => undefined, 'other'],
    ['a new life', () => table.put(entry({ id: 'old', lifecycle: '2' })), 'old'],
    ['a new owner of the address', () => (table.delete('old'), table.put(entry({ id: 'new' }))), 'new'],
  ]
  for (const [nth, [name, change, id]] of rows.entries()) {
    change()
    const client = new RawClient(gateway.port).send(asks.upgrade(id, upstream.port))
    t.equal(statusOf(await client.untilClosed()), 403, name)
    await eventually(() => ended.length > nth, `${name}: ${ended} closed`)
    t.same([heard, ended], [rows.slice(0, nth + 1).map(([, , one]) => `/${one} `), [...rows.keys()].slice(0, nth + 1)], name)
    client.close()
  }
})
