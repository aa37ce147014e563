/** How many upgraded connections a client and a sandbox may have, and who is one client: the same as where guesses are counted. */
import t from 'tap'
import { eventually, RawClient, startGateway, startRaw, statusOf, type TestServer } from './support.ts'

const handshake = (target: string, ...more: string[]): string =>
  `GET ${target} HTTP/1.1\r\n${['Host: x', 'Connection: Upgrade', 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==', ...more].join('\r\n')}\r\n\r\n`

/** Upgrades everybody, and says nothing more. */
function startTunnels(): Promise<TestServer> {
  return startRaw((socket) => {
    socket.once('data', () => socket.resume().write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))
    socket.once('end', () => socket.end())
  })
}

t.test('caps per client and per sandbox', async (t) => {
  await using upstream = await startTunnels()
  for (const option of ['maxUpgradesPerClient', 'maxUpgradesPerSandbox'] as const) {
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', [option]: 2 })
    const clients = [1, 2, 3].map(() => new RawClient(gateway.port))
    for (const client of clients) {
      client.send(handshake(`/a/${upstream.port}/`))
      await client.until((c) => c.received.includes('\r\n\r\n'))
    }
    t.same(clients.map((client) => statusOf(client.received)), [101, 101, 503], option)
    clients[0]?.close()
    await eventually(() => gateway.lines.length === 2, 'a place is free again')
    const again = new RawClient(gateway.port)
    await again.send(handshake(`/a/${upstream.port}/`)).until((c) => c.received.includes('\r\n\r\n'))
    t.equal(statusOf(again.received), 101, `${option}: freed`)
    for (const client of [...clients, again]) client.close()
  }
})

t.test('what one sandbox or client fills up is open to the next', async (t) => {
  await using upstream = await startTunnels()
  for (const [option, id, from] of [['maxUpgradesPerSandbox', 'b', '6.6.6.1'], ['maxUpgradesPerClient', 'a', '6.6.6.2']] as const) {
    await using gateway = await startGateway([{ id: 'a' }, { id: 'b' }], { mode: 'uri', trustedProxies: ['127.0.0.0/8'], [option]: 1 })
    const open = async (id: string, from: string): Promise<RawClient> => {
      const client = new RawClient(gateway.port)
      await client.send(handshake(`/${id}/${upstream.port}/`, `X-Forwarded-For: ${from}`)).until((c) => c.received.includes('\r\n\r\n'))
      return client
    }
    const clients = [await open('a', '6.6.6.1'), await open('a', '6.6.6.1'), await open(id, from)]
    t.same(clients.map((client) => statusOf(client.received)), [101, 503, 101], option)
    t.match(clients[1]?.received, /\r\nretry-after: \d+\r\n/i)
    for (const client of clients) client.close()
  }
})

t.test('an IPv6 client has one allowance for all its addresses, and gets back what it had', async (t) => {
  await using tunnels = await startTunnels()
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', trustedProxies: ['127.0.0.0/8'], maxUpgradesPerClient: 2 })
  const open = async (from: string): Promise<RawClient> => {
    const client = new RawClient(gateway.port).send(handshake(`/a/${tunnels.port}/`, `X-Forwarded-For: ${from}`))
    await client.until(({ received }) => received.includes('\r\n\r\n'))
    return client
  }
  const rows: [from: string, status: number, why: string][] = [
    ['2001:db8:0:7::1', 101, 'the first'],
    ['2001:db8:0:7:ffff::2', 101, 'the second'],
    ['2001:db8:0:7:1::3', 503, 'a third, from one more address of the same /64'],
    ['2001:db8:0:8::1', 101, 'a neighbour'],
    ['192.0.2.1', 101, 'an IPv4 client'],
    ['192.0.2.2', 101, 'and the address beside it'],
  ]
  const clients: RawClient[] = []
  for (const [from, status, why] of rows) {
    const client = await open(from)
    clients.push(client)
    t.equal(statusOf(client.received), status, why)
  }
  clients[0]?.close()
  await eventually(() => gateway.lines.length === 2, 'one refused, one ended')
  clients.push(await open('2001:db8:0:7:2::4'))
  t.equal(statusOf(clients.at(-1)?.received ?? ''), 101, 'a place is free again, for any of its addresses')
  for (const client of clients) client.close()
})
