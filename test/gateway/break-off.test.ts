/** Resetting a connection at any moment of its end: the descriptor is given back, and half of what was to be sent never looks like all of it. */
import { once } from 'node:events'
import { createServer as createHttpServer, type ServerResponse } from 'node:http'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { breakOff, reset } from '../../gateway/break-off.ts'
import type { Peer } from '../../gateway/peer.ts'
import { eventually, RawClient } from './support.ts'

type Act = () => void
const moments: [name: string, wait: (act: Act) => void][] = [
  ['at once', (act) => act()],
  ['a tick later', (act) => process.nextTick(act)],
  ['two ticks later', (act) => process.nextTick(() => process.nextTick(act))],
  ['three ticks later', (act) => process.nextTick(() => process.nextTick(() => process.nextTick(act)))],
  ['a microtask later', (act) => queueMicrotask(act)],
  ['a turn later', (act) => void setImmediate(act)],
  ['when its end has gone out', (act) => void setTimeout(act, 30)],
]

t.test('reset', async (t) => {
  const server = createServer({ allowHalfOpen: true }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const connections = (): number => process.getActiveResourcesInfo().filter((name) => name === 'TCPSocketWrap').length
  for (const [size, what] of [[0, 'nothing'], [1, 'a byte'], [32 << 20, 'more than the kernel takes']] as const) {
    for (const ends of [false, true]) {
      for (const [name, wait] of moments) {
        const accepted = once(server, 'connection') as Promise<[Socket]>
        const own = connect({ port: (server.address() as AddressInfo).port, host: '127.0.0.1', allowHalfOpen: true })
        const [[other]] = await Promise.all([accepted, once(own, 'connect')])
        const failures: string[] = []
        own.on('error', (error) => failures.push(error.message))
        let [got, ended, broken] = [0, false, false]
        other.on('end', () => (ended = true)).on('error', () => (broken = true))
        if (size > 0) own.write(Buffer.alloc(size))
        if (ends) own.end()
        wait(() => reset(own))
        await delay(size > 1 ? 60 : 0)
        other.on('data', (chunk: Buffer) => (got += chunk.length))
        // What a sandbox does that has heard an end: it goes on until it hears that nobody listens.
        await eventually(() => (other.destroyed ? true : void (ended && other.writable && other.write('x'))) === true, 'the other side hears of it')
        const title = `${what} sent${ends ? ', and its end said' : ''}, reset ${name}`
        await eventually(() => connections() === 0, `${title}: a descriptor is kept`)
        t.same(failures, [], title)
        t.ok(ended ? got === size : broken, `${title}: ${got} bytes and ${ended ? 'an end' : 'a reset'}`)
      }
    }
  }
})

t.test('an answer that begins in the very turn in which its connection is broken off', async (t) => {
  const open: ServerResponse[] = []
  const server = createHttpServer((request, response) => {
    open.push(response)
    if (request.url === '/half') {
      response.write('half')
      return
    }
    response.end('whole')
    // node:http has put the next one on the connection by now, and says of this one a tick later that it is over.
    response.on('finish', () => breakOff(request.socket, { open } as Partial<Peer> as Peer))
  }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const client = new RawClient((server.address() as AddressInfo).port)
  client.send('GET /whole HTTP/1.1\r\nHost: x\r\n\r\nGET /half HTTP/1.0\r\n\r\n')
  await client.until(({ closed, ended }) => closed || ended)
  t.equal(open.length, 2)
  t.ok(client.reset, `a reset, behind ${JSON.stringify(client.received.slice(-10))}`)
  t.notOk(client.ended, 'no end')
})
