/**
 * What a hostile client can do by sheer number, against a gateway in a process of its own. While each flood lasts another client is
 * served, afterwards the gateway holds what it held before: no connection, no request, no memory.
 */
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { sized } from '../support/size.ts'
import type { Held } from './flooded.ts'
import { ask, get, startHttp, startRaw, statusOf } from './support.ts'

const MiB = 1024 * 1024
/** Heap after a flood: caches are full before the first one, so nothing of it may stay. */
const mayStay = 12 * MiB
/** Resident memory beside the heap: what the allocator keeps in pieces, which the same flood fills again. Each big flood ran once before the first measure. */
const mayStayResident = sized(60, 90) * MiB

const upgrade = (target: string): string => `GET ${target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`

/** Many clients at once that send what they are told, count first lines of answers, and do not mind how they end. */
class Crowd implements AsyncDisposable {
  readonly sockets: Socket[] = []
  readonly statuses = new Map<number, number>()
  ended = 0

  /** @param reads false: answers are left where they are */
  constructor(port: number, count: number, onConnect: (socket: Socket) => void, reads = true) {
    for (let i = 0; i < count; i++) {
      const socket = connect(port, '127.0.0.1', () => onConnect(socket)).on('error', () => undefined)
      socket.once('close', () => this.ended++)
      if (reads) socket.once('data', (chunk: Buffer) => this.#count(statusOf(chunk.toString('latin1', 0, 20)))).on('data', () => undefined)
      this.sockets.push(socket)
    }
  }

  get answered(): number {
    return this.statuses.values().reduce((sum, count) => sum + count, 0)
  }

  #count(status: number): void {
    this.statuses.set(status, (this.statuses.get(status) ?? 0) + 1)
  }

  drip(): void {
    for (const socket of this.sockets) if (socket.readyState === 'open') socket.write('x')
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.sockets) socket.destroy()
    while (this.ended < this.sockets.length) await delay(5)
  }
}

/** @param ms generous: nobody measures time here */
async function until(condition: () => boolean, what: string, ms = 60_000): Promise<void> {
  for (const end = Date.now() + ms; !condition(); await delay(10)) if (Date.now() > end) throw new Error(`never: ${what}`)
}

t.setTimeout(300_000)

t.test('floods', { timeout: 300_000 }, async (t) => {
  await using upstream = await startHttp((request, response) => {
    request.resume()
    response.end('ok')
  })
  await using mute = await startRaw((socket) => void socket.resume().on('end', () => socket.end()))
  await using tunnel = await startRaw((socket) => {
    socket.once('data', () => socket.write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))
    socket.on('end', () => socket.end())
  })
  const options = { mode: 'auto', baseDomain: 'gw.test', headerTimeout: 4_000, idleTimeout: 4_000, firstByteTimeout: 4_000, keepAliveTimeout: 60_000, maxConnections: 15_000, maxUpgradesPerClient: 200 }
  const program = fork(new URL('./flooded.ts', import.meta.url), [JSON.stringify({ routes: [{ id: 'a' }, { id: 'sec', secureAccessToken: 'tok' }], options })], { execArgv: ['--expose-gc'] })
  t.teardown(() => program.kill('SIGKILL'))
  const [port] = (await once(program, 'message')) as [number]
  const ask1 = async (): Promise<Held> => {
    program.send('held')
    return ((await once(program, 'message')) as [Held])[0]
  }
  const page = `/a/${upstream.port}/`

  let served = 0
  const unserved: string[] = []
  let steady = true
  const client = (async () => {
    for (; steady; await delay(20)) {
      const answer = await ask(port, get(page), 20_000).catch((error: Error) => error.message)
      if (statusOf(answer) === 200) served++
      else unserved.push(answer.slice(0, 100))
    }
  })()

  /** 24,000 names, by Host and by routing header: more than a gateway remembers of either. */
  const ids = async (name: string): Promise<void> => {
    for (let round = 0; round < 20; round++) {
      const row = (client: number): string => Array.from({ length: 60 }, (_none, n) => {
        const token = `${name}-${round}-${client}-${n}-80`
        return `GET / HTTP/1.1\r\nHost: ${token}.gw.test\r\n${n % 2 === 0 ? `OpenSandbox-Ingress-To: ${token}\r\n` : ''}${n === 59 ? 'Connection: close\r\n' : ''}\r\n`
      }).join('')
      let client = 0
      await using crowd = new Crowd(port, 20, (socket) => socket.write(row(client++)))
      await until(() => crowd.ended === 20, 'answered')
    }
  }
  const many = sized(3_000, 10_000)
  const idle = async (meanwhile: (crowd: Crowd) => Promise<void>): Promise<void> => {
    await using crowd = new Crowd(port, many, (socket) => socket.write('GET /status.ok HTTP/1.1\r\nHost: x\r\n\r\n'))
    await until(() => crowd.statuses.get(200) === many, 'answered once', 120_000)
    await meanwhile(crowd)
  }
  const ahead = async (): Promise<void> => {
    const row = get(`/a/${mute.port}/`).replace('Connection: close', 'X: y').repeat(1_000)
    await using crowd = new Crowd(port, 12, (socket) => void socket.pause().write(row), false)
    await until(() => crowd.sockets.every((socket) => socket.bytesWritten > 0), 'sent')
    const refusals = get('/nobody/80/').replace('Connection: close', 'X: y').repeat(5_000)
    await using deaf = new Crowd(port, 12, (socket) => void socket.pause().write(refusals), false)
    await until(() => deaf.sockets.every((socket) => socket.bytesWritten > 0), 'sent')
    const before = served
    await until(() => served >= before + 5, 'others are served meanwhile')
  }
  // Full caches, compiled code and what the allocator keeps are no leak: each big flood runs once before its measure is taken.
  // It may have given pages back by then or not: what it held at any moment of this counts.
  let highest = 0
  const look = async (): Promise<void> => void (highest = Math.max(highest, (await ask1()).resident))
  await ids('warm')
  await look()
  for (const warm of [page, '/nobody/80/', `/sec/${upstream.port}/`]) for (let i = 0; i < 50; i++) await ask(port, get(warm))
  await idle(look)
  await ahead()
  await look()
  {
    await using crowd = new Crowd(port, 300, (socket) => socket.write(upgrade(`/a/${tunnel.port}/`)))
    await until(() => crowd.answered === 300, 'upgrades')
    await look()
  }
  await delay(200)
  await look()
  const level = { ...(await ask1()), resident: highest }

  const flood = (name: string, run: (t: Test) => Promise<void>): Promise<unknown> =>
    t.test(name, async (t) => {
      const before = served
      await run(t)
      let after = await ask1()
      const settled = (): boolean => after.connections <= 1 && after.active <= 1 && after.tunnels === 0 && after.heap - level.heap < mayStay && after.resident - level.resident < mayStayResident
      for (const end = Date.now() + 20_000; !settled() && Date.now() < end; await delay(100)) after = await ask1()
      t.ok(settled(), `from ${JSON.stringify(level)} to ${JSON.stringify(after)}`)
      t.comment(`heap ${((after.heap - level.heap) / MiB).toFixed(1)} MiB, resident ${((after.resident - level.resident) / MiB).toFixed(1)} MiB more than before`)
      await until(() => served > before, 'others are served')
      t.same(unserved, [], 'all the time')
      t.equal(program.exitCode, null, 'nothing crashed')
    })

  await flood('slow heads and slow bodies', async (t) => {
    const body = `POST /a/${mute.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n`
    await using heads = new Crowd(port, 800, (socket) => socket.write('GET / HTTP/1.1\r\nHost: x\r\nX-Slow: '))
    await using stalled = new Crowd(port, 300, (socket) => socket.write(`${body}begun`))
    await using dripping = new Crowd(port, 100, (socket) => socket.write(body))
    const drip = setInterval(() => [heads, dripping].forEach((crowd) => crowd.drip()), 100)
    t.teardown(() => clearInterval(drip))
    await until(() => heads.ended === 800, 'heads that take too long are sent away, however busily they drip')
    // Who writes on may lose the answer to the reset that his bytes cause.
    t.same([...heads.statuses.keys()], [408])
    await until(() => stalled.answered === 300, 'so are bodies that fell silent')
    t.equal(stalled.statuses.get(504), 300)
    t.equal(dripping.ended, 0, 'those that go on may take their time')
    t.ok(mute.sockets.size >= 100)
  })

  await flood(`${many} idle connections`, (t) => idle(async (crowd) => {
    const before = served
    await until(() => served >= before + 3, 'others are served meanwhile')
    t.equal(crowd.ended, 0, 'all stay')
    t.ok((await ask1()).connections >= many)
  }))

  await flood('heads and lines without end', async (t) => {
    const field = `X-Y: ${'y'.repeat(90)}\r\n`
    const rows: [name: string, begin: string, more: string, statuses: number[]][] = [
      ['fields', 'GET / HTTP/1.1\r\nHost: x\r\n', field, [431]],
      ['short fields', 'GET / HTTP/1.1\r\nHost: x\r\n', 'a:b\r\n', [431]],
      ['one field', 'GET / HTTP/1.1\r\nHost: x\r\nX-Y: ', 'y'.repeat(100), [431]],
      ['a name', 'GET / HTTP/1.1\r\nHost: x\r\n', 'y'.repeat(100), [431, 400]],
      ['a target', 'GET /', 'y'.repeat(100), [431]],
      ['a method', '', 'G'.repeat(100), [400]],
      ['empty lines', '', '\r\n'.repeat(50), [408, 400]],
      ['chunk extensions', `POST ${page} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;`, 'y'.repeat(100), []],
      ['trailers', `POST ${page} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n`, field, []],
    ]
    for (const [name, begin, more, statuses] of rows) {
      const block = more.repeat(Math.ceil(4096 / more.length))
      const pour = (socket: Socket): void => {
        while (socket.writable && socket.bytesWritten < 64 * MiB && socket.write(block));
      }
      // Empty lines before a request are free to skip: only their time is limited.
      const free = name === 'empty lines'
      const count = free ? 4 : 40
      await using crowd = new Crowd(port, count, (socket) => {
        socket.write(begin)
        socket.on('drain', () => pour(socket))
        pour(socket)
      })
      await until(() => crowd.ended === count, `${name}: ended`)
      t.ok([...crowd.statuses.keys()].every((status) => statuses.includes(status) || statuses.length === 0), `${name}: ${JSON.stringify([...crowd.statuses])}`)
      t.ok(free || crowd.sockets.every((socket) => socket.bytesWritten < 32 * MiB), `${name}: sent away long before the end`)
    }
  })

  await flood('requests sent ahead, whose answers nobody reads', async (t) => {
    await ahead()
    await until(() => mute.sockets.size === 0, 'nothing is left at the sandbox')
    await using one = new Crowd(port, 1, (socket) => void socket.pause().write(get(`/a/${mute.port}/`).replace('Connection: close', 'X: y').repeat(2_000)), false)
    await until(() => one.sockets[0]?.bytesWritten as number > 0, 'sent')
    const answers = await Promise.all(Array.from({ length: 5 }, () => ask(port, get(page))))
    t.same(answers.map(statusOf), [200, 200, 200, 200, 200])
    t.ok(mute.sockets.size <= 64, 'one connection fills no port')
  })

  await flood('upgrades', async (t) => {
    const gone = await startRaw(() => undefined)
    await gone[Symbol.asyncDispose]()
    await using crowd = new Crowd(port, 500, (socket) => socket.write(upgrade(`/a/${tunnel.port}/`)))
    await until(() => crowd.answered === 500, 'answered')
    t.same([...crowd.statuses].sort(), [[101, 200], [503, 300]], 'as many as one client may have')
    await crowd[Symbol.asyncDispose]()
    await using refused = new Crowd(port, 500, (socket) => socket.write(upgrade(`/a/${gone.port}/`)))
    await until(() => refused.ended === 500, 'refused')
    t.ok(refused.statuses.get(503) as number >= 490, JSON.stringify([...refused.statuses]))
    // Gone before the sandbox answered.
    await using leaving = new Crowd(port, 200, (socket) => socket.write(upgrade(`/a/${mute.port}/`), () => setTimeout(() => socket.resetAndDestroy(), 50)))
    await until(() => leaving.ended === 200, 'left')
    await until(() => mute.sockets.size === 0, 'nothing is left at the sandbox')
  })

  await flood('24,000 names of sandboxes that are none', () => ids('other'))

  steady = false
  await client
  t.ok(served > 50, `${served} requests of somebody else were served`)
})
