/** Who is one client where upgrades are counted: the same as where guesses are. */
import t from 'tap'
import { eventually, RawClient, startGateway, startRaw, statusOf } from './support.ts'

const handshake = (target: string, from: string): string =>
  `GET ${target} HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: ${from}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`

t.test('an IPv6 client has one allowance for all its addresses, and gets back what it had', async (t) => {
  await using tunnels = await startRaw((socket) => {
    socket.once('data', () => socket.resume().write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))
    socket.once('end', () => socket.end())
  })
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', trustedProxies: ['127.0.0.0/8'], maxUpgradesPerClient: 2 })
  const open = async (from: string): Promise<RawClient> => {
    const client = new RawClient(gateway.port).send(handshake(`/a/${tunnels.port}/`, from))
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
