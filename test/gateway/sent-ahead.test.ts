/** Requests that a client sends before it has the answers to those ahead of them (RFC 9112 §9.3.2). */
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { ask, entry, eventually, RawClient, startGateway, startRaw, statusOf, type TestServer } from './support.ts'

/** Notes when each request comes, and when it has answered it 60 ms later. */
function startSandbox(events: string[]): Promise<TestServer> {
  return startRaw((socket) => {
    socket.on('end', () => socket.end())
    socket.on('data', (chunk: Buffer) => {
      const name = /^\S+ \/(\S*)/.exec(chunk.toString('latin1'))?.[1] ?? ''
      events.push(`${name} comes`)
      setTimeout(() => {
        events.push(`${name} goes`)
        socket.write(`HTTP/1.1 200 OK\r\ncontent-length: ${name.length}\r\n\r\n${name}`)
      }, 60)
    })
  })
}

t.test('in order, as soon as one of them asks for a change', async (t) => {
  const rows: [requests: string[], together: number][] = [
    [['GET a', 'GET b', 'HEAD c'], 3],
    [['POST a', 'POST b', 'POST c'], 1],
    [['GET a', 'DELETE b', 'GET c'], 1],
    [['POST a', 'GET b', 'GET c'], 1],
    [['GET a', 'GET b', 'PUT c'], 2],
  ]
  for (const [requests, together] of rows) {
    const events: string[] = []
    await using sandbox = await startSandbox(events)
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri' })
    const client = new RawClient(gateway.port)
    client.send(requests.map((text) => text.replace(' ', ` /a/${sandbox.port}/`)).map((line) => `${line} HTTP/1.1\r\nHost: x\r\n${/^P/.test(line) ? 'Content-Length: 4\r\n' : ''}\r\n${/^P/.test(line) ? 'body' : ''}`).join(''))
    await client.until((c) => c.received.split('HTTP/1.1 200').length === 4)
    await eventually(() => gateway.lines.length === 3, 'three lines')
    let most = 0
    for (let [index, open] = [0, 0]; index < events.length; index++) {
      open += events[index]?.endsWith('comes') === true ? 1 : -1
      most = Math.max(most, open)
    }
    t.equal(most, together, `${requests.join(', ')}: ${events.join(', ')}`)
    if (together === 1) t.same(events, ['a comes', 'a goes', 'b comes', 'b goes', 'c comes', 'c goes'])
    client.close()
  }
})

t.test('one that waits for its turn costs no time of its own, and is never begun for a client that has gone', async (t) => {
  for (const ending of ['the client leaves', 'the client half-closes', 'the stream ends'] as const) {
    const paths: string[] = []
    let accepted = 0
    let endStream: () => void = () => undefined
    await using sandbox = await startRaw((socket) => {
      accepted++
      socket.on('end', () => socket.end())
      socket.on('data', (chunk: Buffer) => {
        const text = chunk.toString('latin1')
        paths.push(text.slice(0, text.indexOf(' HTTP')))
        if (text.includes('/slow')) {
          socket.write('HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n')
          endStream = () => void socket.end('0\r\n\r\n')
        } else socket.write('HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone')
      })
    })
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', firstByteTimeout: 300, idleTimeout: 300 })
    const client = new RawClient(gateway.port).send(`GET /a/${sandbox.port}/slow HTTP/1.1\r\nHost: x\r\n\r\nDELETE /a/${sandbox.port}/x HTTP/1.1\r\nHost: x\r\n\r\n`)
    await client.until((c) => c.received.includes('event-stream'))
    // Longer than any limit, which is looked at once a second.
    await delay(1_600)
    t.notOk(client.ended || client.closed, 'the stream goes on')
    t.equal(gateway.lines.length, 0, 'and what waits behind it waits')
    if (ending === 'the stream ends') {
      endStream()
      await client.until((c) => c.received.endsWith('done'))
      t.match(client.received, /event-stream[^]*\r\n0\r\n\r\nHTTP\/1\.1 200/, 'its turn has come')
    } else {
      if (ending === 'the client leaves') client.close()
      else client.socket.end()
      await eventually(() => gateway.lines.length === 2, 'two lines')
      await delay(50)
      t.same(paths, ['GET /slow'], ending)
      t.equal(accepted, 1, `${ending}: no connection either`)
    }
    client.close()
  }
})

t.test('one that waits has no right to come in yet, and takes nobody a place', async (t) => {
  const paths: string[] = []
  let endStream: () => void = () => undefined
  await using sandbox = await startRaw((socket) => {
    socket.on('end', () => socket.end())
    socket.on('data', (chunk: Buffer) => {
      const text = chunk.toString('latin1')
      paths.push(text.slice(0, text.indexOf(' HTTP')))
      if (!text.includes('/slow')) return void socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok')
      socket.write('HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n')
      endStream = () => void socket.end('0\r\n\r\n')
    })
  })
  await using gateway = await startGateway([{ id: 'a', secureAccessToken: 'old' }], { mode: 'uri', maxRequestsPerPort: 2 })
  const request = (line: string, token: string): string => `${line.replace(' ', ` /a/${sandbox.port}`)} HTTP/1.1\r\nHost: x\r\nOpenSandbox-Secure-Access: ${token}\r\n\r\n`
  const client = new RawClient(gateway.port).send(request('GET /slow', 'old') + request('DELETE /1', 'old') + request('DELETE /2', 'old'))
  await client.until((c) => c.received.includes('event-stream'))
  t.equal(statusOf(await ask(gateway.port, request('GET /other', 'old').replace('\r\n\r\n', '\r\nConnection: close\r\n\r\n'))), 200, 'the port has room for somebody else')
  gateway.gateway.table.put(entry({ id: 'a', secureAccessToken: 'new' }))
  endStream()
  await client.until((c) => c.received.split('HTTP/1.1 401').length === 3)
  t.same(paths, ['GET /slow', 'GET /other'], 'who lost his right meanwhile reaches nothing')
  client.close()
})
