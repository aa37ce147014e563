/** A request whose connection died under it and that dials again: whoever ends it now ends it in order, and does not wait for the dial. */
import { connect, type Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import t from 'tap'
import { eventually, get, RawClient, startGateway, statusOf, type TestGateway } from './support.ts'

/** A sandbox that answers one request, and then stands still: whoever dials it is left waiting, the connection it has dies when it is told. */
async function startDeaf(): Promise<AsyncDisposable & { readonly port: number; readonly full: () => boolean; readonly breakFirst: () => void }> {
  const bell = new Int32Array(new SharedArrayBuffer(4))
  // Only a thread that stands still does not accept.
  const code = `
    const { parentPort, workerData: bell } = require('node:worker_threads')
    const server = require('node:net').createServer((socket) => socket.once('data', () => socket.write('HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok', () => {
      parentPort.postMessage('deaf')
      Atomics.wait(bell, 0, 0, 20_000)
      socket.destroy()
      Atomics.wait(bell, 0, 1, 20_000)
      process.exit()
    })))
    server.listen({ port: 0, host: '127.0.0.1', backlog: 1 }, () => parentPort.postMessage(server.address().port))`
  const worker = new Worker(code, { eval: true, workerData: bell })
  const fill: Socket[] = []
  const ring = (state: number): void => {
    Atomics.store(bell, 0, state)
    Atomics.notify(bell, 0)
  }
  const port = await new Promise<number>((resolve, reject) => worker.once('message', resolve).once('error', reject))
  worker.once('message', () => {
    // The kernel takes one more than the backlog says, and leaves the others unanswered.
    for (let n = 0; n < 4; n++) fill.push(connect(port, '127.0.0.1').on('error', () => undefined))
  })
  return {
    port,
    full: () => fill.filter(({ connecting }) => !connecting).length >= 2,
    breakFirst: () => ring(1),
    async [Symbol.asyncDispose]() {
      ring(2)
      for (const socket of fill) socket.destroy()
      await worker.terminate()
    },
  }
}

const rows: [what: string, options: Parameters<typeof startGateway>[1], end: (gateway: TestGateway) => void, status: number, code: string][] = [
  ['the gateway goes', { drainTimeout: 200 }, (gateway) => void gateway.close(), 503, 'EDGE_DRAINING'],
  ['it took too long', { firstByteTimeout: 1_000 }, () => undefined, 504, 'EDGE_UPSTREAM_TIMEOUT'],
]

t.test('a request that dials for the second time is ended like any other', async (t) => {
  for (const [what, options, end, status, code] of rows) {
    await using deaf = await startDeaf()
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', connectTimeout: 60_000, ...options })
    const first = new RawClient(gateway.port).send(get(`/a/${deaf.port}/`))
    t.ok((await first.untilClosed()).endsWith('ok'), `${what}: a connection that served`)
    await eventually(deaf.full, 'nobody is accepted any more')
    const client = new RawClient(gateway.port).send(get(`/a/${deaf.port}/`, 'Accept: application/json'))
    await delay(50)
    deaf.breakFirst()
    await delay(100)
    t.same([client.received, client.ended], ['', false], `${what}: tried once more`)
    end(gateway)
    const received = await client.untilClosed()
    t.equal(statusOf(received), status, what)
    t.match(received, `"code":"${code}"`, what)
    await eventually(() => gateway.lines.some((line) => line.includes(`"status":${status},"code":"${code}"`)), `${what}: its access line`)
    for (const one of [first, client]) one.close()
  }
})
