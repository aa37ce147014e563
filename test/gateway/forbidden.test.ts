/**
 * A route that leads to the gateway's own host, or to the metadata of a cloud, is not dialled. Judged by the code in the answer and by a
 * listener at that very address, which no connection may reach. With loopback allowed the same routes arrive, where anything may.
 */
import dns, { type LookupAddress } from 'node:dns'
import { syncBuiltinESMExports } from 'node:module'
import { isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import t from 'tap'
import { ask, bodyOf, eventually, get, startGateway, startRaw, type TestServer } from './support.ts'

const arrives = 'arrives'
const forbidden = 'EDGE_UPSTREAM_FORBIDDEN'

const kinds = {
  http: (target: string) => get(target, 'Accept: application/json'),
  upgrade: (target: string) => get(target, 'Accept: application/json', 'Upgrade: websocket', 'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==').replace('Connection: close', 'Connection: Upgrade'),
}

/** The code of a refusal. The 200 and the 101 are a listener's. */
function outcomeOf(answer: string): string {
  return /^HTTP\/1\.1 (200|101) /.test(answer) ? arrives : (/"code":"(\w+)"/.exec(bodyOf(answer))?.[1] ?? answer)
}

/** Lets everybody in, and counts them. */
async function startCounted(host: string): Promise<TestServer & { readonly count: () => number }> {
  let connections = 0
  const server = await startRaw((socket) => {
    connections++
    socket.once('data', (head: Buffer) => socket.end(head.includes('websocket') ? 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n' : 'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'))
  }, host)
  return { ...server, count: () => connections }
}

const interfaces = Object.values(networkInterfaces()).flatMap((list) => list ?? [])
const hasSix = interfaces.some(({ address }) => address === '::1')
/** What others reach this host by: one address of each family, where it has them. */
const own = (['IPv4', 'IPv6'] as const).flatMap((family) => interfaces.find((one) => one.family === family && !one.internal && !one.address.startsWith('fe80:'))?.address ?? [])

/** Names that lead where the test wants. */
const names: Record<string, string[]> = {
  'loopback.test': ['127.0.0.1'],
  'mapped.test': ['::ffff:127.0.0.1'],
  'metadata.test': ['169.254.169.254'],
  'first.test': ['127.0.0.1', '198.51.100.1'],
  'last.test': ['198.51.100.1', '127.0.0.1'],
}
/** Those somebody asked the resolver for. */
const asked: string[] = []
const { lookup } = dns
dns.lookup = ((name: string, options: { all: true }, answer: (error: Error | null, found: LookupAddress[]) => void): void => {
  // Listeners ask for their own addresses.
  if (isIP(name) === 0) asked.push(name)
  const found = names[name]
  if (found === undefined) lookup(name, options, answer)
  else process.nextTick(answer, null, found.map((address) => ({ address, family: address.includes(':') ? 6 : 4 })))
}) as typeof lookup
syncBuiltinESMExports()
t.teardown(() => {
  dns.lookup = lookup
  syncBuiltinESMExports()
})

/** `listens`: where somebody does, null: where nobody can. `allowed`: the outcome with loopback allowed; null: not asked, it would leave this host. */
type Row = [host: string, listens: string | null, allowed: string | null, why: string]

const addresses: Row[] = [
  ['127.0.0.1', '127.0.0.1', arrives, 'loopback'],
  ['127.8.8.8', '127.8.8.8', arrives, 'all of 127/8 is'],
  ['::1', '::1', arrives, 'loopback'],
  ['0:0:0:0:0:0:0:1', '::1', arrives, 'spelled out'],
  ['::ffff:127.0.0.1', '127.0.0.1', arrives, 'IPv4 within IPv6 is dialled as IPv4'],
  ['::ffff:7f00:1', '127.0.0.1', arrives, 'also in hexadecimal'],
  ...own.map((address): Row => [address, address, arrives, "this host's own"]),
  ['0.0.0.0', '127.0.0.1', forbidden, 'the kernel takes it for loopback'],
  ['::', '::1', forbidden, 'the same'],
  ['::ffff:0.0.0.0', '127.0.0.1', forbidden, 'the same within IPv6'],
  ['::1%lo', '::1', forbidden, 'no address with a zone is dialled'],
  ['169.254.169.254', null, forbidden, 'link-local: cloud metadata'],
  ['::ffff:a9fe:a9fe', null, forbidden, 'the same within IPv6'],
  ['fe80::1', null, forbidden, 'link-local'],
  ['224.0.0.1', null, forbidden, 'multicast'],
  ['255.255.255.255', null, forbidden, 'broadcast'],
  ['0x7f000001', '127.0.0.1', forbidden, 'resolvers read this as 127.0.0.1'],
  ['2130706433', '127.0.0.1', forbidden, 'and this'],
  ['127.1', '127.0.0.1', forbidden, 'and this'],
  ['a b', null, forbidden, 'no host name'],
  ['x/y', null, forbidden, 'no host name'],
  ['localhost', '127.0.0.1', arrives, 'known without asking the resolver'],
]
const byName: Row[] = [
  ['LOCALHOST', '127.0.0.1', arrives, 'as /etc/hosts has it'],
  ['loopback.test', '127.0.0.1', arrives, 'another name of loopback'],
  ['mapped.test', '127.0.0.1', arrives, 'within IPv6'],
  ['first.test', '127.0.0.1', arrives, 'in front of a good address'],
  ['last.test', '127.0.0.1', null, 'behind a good address'],
  ['metadata.test', null, forbidden, 'cloud metadata'],
]

for (const [title, rows, resolved] of [['addresses the gateway does not dial', addresses, false], ['names it finds to have such an address when it dials', byName, true]] as const) {
  t.test(title, async (t) => {
    for (const allowLoopbackUpstreams of [false, true]) {
      await using gateway = await startGateway(rows.map(([host], nth) => ({ id: `s${nth}`, host })), { mode: 'uri', allowLoopbackUpstreams })
      for (const [nth, [host, listens, allowed, why]] of rows.entries()) {
        const wanted = allowLoopbackUpstreams ? allowed : forbidden
        if (wanted === null) continue
        const row = `"${host}", ${why}${allowLoopbackUpstreams ? ', loopback allowed' : ''}`
        if (listens === '::1' && !hasSix) {
          t.pass(row, { skip: 'this host has no IPv6' })
          continue
        }
        await using listener = listens === null ? null : await startCounted(listens)
        const logged = gateway.lines.length
        for (const [kind, text] of Object.entries(kinds)) {
          const answer = await ask(gateway.port, text(`/s${nth}/${listener?.port ?? 80}/`))
          t.equal(outcomeOf(answer), wanted, `${row}: ${kind}`)
          t.notOk(bodyOf(answer).includes(host), `${row}: ${kind}, the answer does not name the address`)
        }
        await eventually(() => gateway.lines.length === logged + 2, `${row}: both are over`)
        if (listener !== null) t.equal(listener.count(), wanted === arrives ? 2 : 0, `${row}: connections the listener saw`)
        t.same(asked.splice(0), resolved || (host === 'localhost' && wanted === arrives) ? [host, host] : [], `${row}: asked of the resolver`)
      }
    }
  })
}
