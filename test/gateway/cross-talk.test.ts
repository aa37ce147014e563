/**
 * The address of a sandbox that ended is given to another one within milliseconds, under load. Nobody who asked for the old one may
 * ever be answered by the new one: not through a pooled socket, not through a retry, not through a dial that was under way.
 */
import { Agent, createServer, request as httpRequest, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import type { Sandbox } from '../../gateway/routes.ts'
import { entry, eventually, startGateway, startHttp } from './support.ts'

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
    table.delete(owner)
    server.close()
    server.closeAllConnections()
    const next = `owner-${life}`
    server = await own(next)
    table.put(entry({ id: next, lifecycle: `life-${life}` }))
    owner = next
  }
  running = false
  await Promise.all(clients)
  agent.destroy()
  server.closeAllConnections()
  server.close()
  t.same(wrong, [] as string[], 'no request crossed owners')
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
