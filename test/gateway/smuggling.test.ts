/**
 * Every request of the corpus is sent as raw bytes. Behind the gateway listens a server that keeps the bytes it gets and reads them
 * with a parser of its own, stricter than any real one: it must find exactly the requests that the corpus announces, or none.
 */
import { readFileSync } from 'node:fs'
import t from 'tap'
import { eventually, RawClient, startGateway, startRaw, statusOf } from './support.ts'
import { readRequests } from './strict-parser.ts'

type Case = {
  name: string
  why: string
  raw: string
  /** refused: nothing reaches the sandbox; incomplete: at most a broken-off request does; forwarded: exactly these do. */
  expect: 'refused' | 'incomplete' | 'forwarded'
  /** Status of a refusal; 0: the connection may also end without an answer. */
  status?: number
  method?: string
  target?: string
  body?: string
  /** Fields behind the body, lower case; none when absent. */
  trailers?: [string, string][]
  requests?: number
}

const corpus = JSON.parse(readFileSync(new URL('./smuggling/corpus.json', import.meta.url), 'utf8')) as Case[]

t.test('the corpus is large enough and its names are unique', async (t) => {
  t.ok(corpus.length >= 150, `${corpus.length} requests`)
  t.equal(new Set(corpus.map(({ name }) => name)).size, corpus.length)
})

t.test('every request of the corpus has the outcome it announces', async (t) => {
  let arrived = ''
  await using upstream = await startRaw((socket) => {
    socket.on('data', (chunk: Buffer) => {
      arrived += chunk.toString('latin1')
      // Answers when a whole request is there, closing, so that each case has its own connection.
      const { complete } = readRequests(arrived)
      if (complete.length > answered) {
        answered = complete.length
        const head = complete.at(-1)?.method === 'HEAD'
        socket.end(`HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n${head ? '' : 'ok'}`)
      }
    })
    socket.on('end', () => socket.end())
  })
  let answered = 0
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'header', authFailuresPerMinute: 0 })

  for (const { name, why, raw, expect, status, method, target, body, trailers = [], requests = 1 } of corpus) {
    arrived = ''
    answered = 0
    const client = new RawClient(gateway.port)
    client.send(raw.replaceAll('{port}', String(upstream.port)))
    const answers = (): number => client.received.split(/HTTP\/1\.1 [2-5]/).length - 1
    // A half-closed client is a gone one to node:http, so the end comes only when no answer does.
    await client.until(() => client.ended || client.closed || answers() >= (expect === 'forwarded' ? requests : 1), 400).catch(() => client.socket.end())
    await client.until(() => client.ended || client.closed || answers() > 0)
    client.close()
    await eventually(() => upstream.sockets.size === 0, 'upstream idle')
    const seen = readRequests(arrived)
    const about = `${name}: ${why}`
    t.same(seen.problems, [] as string[], `${about} (what reached the sandbox is well-formed)`)
    if (expect === 'refused') {
      t.equal(arrived, '', `${about} (nothing reached the sandbox)`)
      if (status === 0) t.ok(client.received === '' || statusOf(client.received) >= 400, `${about} (no success)`)
      else t.equal(statusOf(client.received), status ?? 400, about)
    } else if (expect === 'incomplete') {
      t.equal(seen.complete.length, 0, `${about} (no whole request)`)
      t.ok(client.received === '' || statusOf(client.received) >= 400, `${about} (no success): ${client.received.slice(0, 40)}`)
    } else {
      t.equal(seen.complete.length, requests, `${about} (number of requests)`)
      const [first] = seen.complete
      t.same([first?.method, first?.target, first?.body] as unknown[], [method, target, body] as unknown[], about)
      t.same(first?.trailers, trailers, `${about} (fields behind it)`)
      t.equal(seen.rest, '', `${about} (nothing behind it)`)
      t.notMatch(first?.headers.map(([field]) => field).join(), /opensandbox-ingress-to|expect|upgrade|proxy-|keep-alive|http2-settings|x-secret/, `${about} (clean fields)`)
    }
  }
})
