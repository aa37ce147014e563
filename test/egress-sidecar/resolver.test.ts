/** Upstreams that lie, are slow or dead: failover or nothing, never a wrong answer, never a hang. */
import { createSocket, type RemoteInfo, type Socket } from 'node:dgram'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { askOnce } from '../../egress-sidecar/question.ts'
import { createResolver, type UdpResolver } from '../../egress-sidecar/resolver.ts'
import type { Upstream } from '../../egress-sidecar/ruleset.ts'
import { startProbes } from '../../egress-sidecar/upstream-probes.ts'
import { message, rcodeOf, replyFlags, toQuestion, types } from './message.ts'

type Reply = (query: Buffer, send: (reply: Buffer) => void, peer: RemoteInfo) => void

async function upstream(t: Test, reply: Reply): Promise<Upstream & { asked: number }> {
  const socket: Socket = createSocket('udp4')
  socket.bind(0, '127.0.0.1')
  await once(socket, 'listening')
  const state = { address: '127.0.0.1', port: socket.address().port, asked: 0 }
  socket.on('message', (query, peer) => {
    state.asked++
    reply(query, (bytes) => socket.send(bytes, peer.port, peer.address), peer)
  })
  t.teardown(() => socket.close())
  return state
}

async function resolverOf(t: Test, upstreams: Upstream[], timeoutMs = 3000, tcp = true): Promise<UdpResolver> {
  const resolver = await createResolver({ upstreams, timeoutMs, tcp: () => tcp }, () => performance.now())
  t.teardown(() => resolver.close())
  return resolver
}

const query = (): Buffer => message({ name: 'a.example' })
const end = query().length
const answer = (asked: Buffer, address = '198.51.100.1', flags = replyFlags): Buffer => message({ id: asked.readUInt16BE(0), flags, name: 'a.example', answers: [{ name: toQuestion, type: types.A, data: address }] })
const good: Reply = (asked, send) => send(answer(asked))

t.test('the question goes out unchanged but for its id', async (t) => {
  let got: Buffer = Buffer.alloc(0)
  const peer = await upstream(t, (asked, send) => {
    got = asked
    send(answer(asked))
  })
  const resolver = await resolverOf(t, [peer])
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)))
  t.same(got.subarray(2), query().subarray(2))
})

t.test('ids and ports are not the same again and again', async (t) => {
  const ids = new Set<number>()
  const ports = new Set<number>()
  const peer = await upstream(t, (asked, send, { port }) => {
    ids.add(asked.readUInt16BE(0))
    ports.add(port)
    send(answer(asked))
  })
  const resolver = await resolverOf(t, [peer])
  // In parts with a pause between: questions that come together share a port.
  for (let part = 0; part < 60; part++) {
    await Promise.all(Array.from({ length: 5 }, () => askOnce(resolver, query(), end, 'udp')))
    await delay(2)
  }
  t.ok(ids.size > 280, `${ids.size} ids for 300 questions`)
  t.ok(ports.size > 10, `${ports.size} ports`)
  t.same(new Set(resolver.ports).size, resolver.ports.length)
})

t.test('replies that are not ours are not believed', async (t) => {
  const liar: Reply = (asked, send) => {
    const wrongId = answer(asked, '198.18.0.66')
    wrongId.writeUInt16BE(asked.readUInt16BE(0) ^ 1, 0)
    send(wrongId)
    send(message({ id: asked.readUInt16BE(0), flags: replyFlags, name: 'b.example', answers: [{ name: toQuestion, type: types.A, data: '198.18.0.66' }] }))
    send(Buffer.from('garbage'))
    send(asked)
    send(answer(asked, '198.51.100.1'))
  }
  const resolver = await resolverOf(t, [await upstream(t, liar)])
  const reply = await askOnce(resolver, query(), end, 'udp')
  t.ok(reply?.includes(Buffer.of(198, 51, 100, 1)))
  t.notOk(reply?.includes(Buffer.of(198, 18, 0, 66)))
})

t.test('a stranger cannot answer', async (t) => {
  const stranger = createSocket('udp4')
  t.teardown(() => stranger.close())
  const peer = await upstream(t, (asked, send, { port }) => {
    stranger.send(answer(asked, '198.18.0.66'), port, '127.0.0.1', () => setTimeout(() => send(answer(asked)), 50))
  })
  const reply = await askOnce(await resolverOf(t, [peer]), query(), end, 'udp')
  t.ok(reply?.includes(Buffer.of(198, 51, 100, 1)))
})

t.test('failover', async (t) => {
  const dead: Upstream = { address: '127.0.0.1', port: 1 }
  const rcode = (code: number): Reply => (asked, send) => send(message({ id: asked.readUInt16BE(0), flags: replyFlags | code, name: 'a.example' }))
  const silent: Reply = () => undefined
  for (const [why, first] of [['closed port', dead], ['SERVFAIL', await upstream(t, rcode(2))], ['REFUSED', await upstream(t, rcode(5))], ['silence', await upstream(t, silent)]] as const) {
    const second = await upstream(t, good)
    const reply = await askOnce(await resolverOf(t, [first, second]), query(), end, 'udp')
    t.equal(reply?.readUInt16BE(6), 1, why)
    t.equal(second.asked, 1, why)
  }
  const nobody = await upstream(t, good)
  const nxdomain = await askOnce(await resolverOf(t, [await upstream(t, rcode(3)), nobody]), query(), end, 'udp')
  t.equal(rcodeOf(nxdomain as Buffer), 3, 'NXDOMAIN is an answer')
  t.equal(nobody.asked, 0)
  const both = await askOnce(await resolverOf(t, [await upstream(t, rcode(2)), await upstream(t, rcode(5))]), query(), end, 'udp')
  t.equal(rcodeOf(both as Buffer), 2, 'all fail: the first one\'s refusal')
})

t.test('nobody answers: null in time, and a silent upstream is asked last from then on', async (t) => {
  const silent = await upstream(t, () => undefined)
  const resolver = await resolverOf(t, [silent], 300)
  const started = performance.now()
  t.same(await Promise.all([1, 2, 3].map(() => askOnce(resolver, query(), end, 'udp'))), [null, null, null])
  t.ok(performance.now() - started < 2000)

  const second = await upstream(t, good)
  const pair = await resolverOf(t, [silent, second], 5000)
  await Promise.all([1, 2, 3].map(() => askOnce(pair, query(), end, 'udp')))
  const before = silent.asked
  await askOnce(pair, query(), end, 'udp')
  t.equal(silent.asked, before)
})

t.test('a truncated answer is asked for over TCP, for clients that can take it', async (t) => {
  const peer = await upstream(t, (asked, send) => send(answer(asked, '198.51.100.1', replyFlags | 0x0200)))
  let whole: (asked: Buffer) => Buffer = (asked) => answer(asked, '198.51.100.2')
  const server = createServer((socket) => {
    socket.on('error', () => socket.destroy())
    socket.on('data', (data) => {
      const reply = whole(data.subarray(2))
      const framed = Buffer.concat([Buffer.of(reply.length >> 8, reply.length & 255), reply])
      // In two parts: the length alone may come first.
      socket.write(framed.subarray(0, 1), () => socket.write(framed.subarray(1)))
    })
  }).listen(peer.port, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const resolver = await resolverOf(t, [peer], 1000)
  t.ok((await askOnce(resolver, query(), end, 'tcp'))?.includes(Buffer.of(198, 51, 100, 2)))
  t.equal(((await askOnce(resolver, query(), end, 'udp')) as Buffer)[2]! & 2, 2, 'a UDP client gets the truncation')
  whole = (asked) => message({ id: asked.readUInt16BE(0), flags: replyFlags, name: 'other.example' })
  t.equal(await askOnce(resolver, query(), end, 'tcp'), null, 'another question\'s answer')
  const udpOnly = await resolverOf(t, [peer], 1000, false)
  t.equal(((await askOnce(udpOnly, query(), end, 'tcp')) as Buffer)[2]! & 2, 2, 'where TCP is not let out')
})

t.test('closing answers everybody', async (t) => {
  const resolver = await createResolver({ upstreams: [await upstream(t, () => undefined)], timeoutMs: 60_000, tcp: () => true }, () => performance.now())
  const asked = askOnce(resolver, query(), end, 'udp')
  resolver.close()
  t.equal(await asked, null)
})

t.test('a probe leaves out who is silent, until it is not', async (t) => {
  let alive = false
  const sleeper = await upstream(t, (asked, send) => void (alive && send(answer(asked, '198.51.100.2'))))
  const refuser = await upstream(t, (asked, send) => send(message({ id: asked.readUInt16BE(0), flags: replyFlags | 5, name: 'a.example' })))
  const well = await upstream(t, good)
  const resolver = await resolverOf(t, [sleeper, refuser, well], 300)
  t.same((await resolver.probe(query())).map(({ port }) => port), [sleeper.port], 'a refusal is an answer')
  const asked = sleeper.asked
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)))
  t.equal(sleeper.asked, asked, 'not asked')
  alive = true
  t.same(await resolver.probe(query()), [])
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 2)), 'first in order again')
})

t.test('nobody answers a probe: all are asked', async (t) => {
  let alive = false
  const peers = [await upstream(t, () => undefined), await upstream(t, (asked, send) => void (alive && send(answer(asked))))]
  const resolver = await resolverOf(t, peers, 300)
  const warnings: string[] = []
  const warned = new Promise<void>((resolve) => {
    const probes = startProbes({ resolver, name: 'a.example', intervalSeconds: 3600, warn: (text) => void (warnings.push(text) === 3 && resolve()) })
    t.teardown(() => probes.close())
  })
  await warned
  t.match(warnings, [`[dns] upstream probe: no answer from 127.0.0.1:${peers[0]?.port}`, `[dns] upstream probe: no answer from 127.0.0.1:${peers[1]?.port}`, /no upstream answers, all of them are asked/])
  alive = true
  await resolver.probe(query())
  t.ok(await askOnce(resolver, query(), end, 'udp'))
})

t.test('an upstream that no route leads to is left out; without any other there is no start', async (t) => {
  const well = await upstream(t, good)
  // The kernel refuses to connect to a broadcast address, as it does where there is no route.
  const nowhere = { address: '255.255.255.255', port: 53 }
  const resolver = await resolverOf(t, [nowhere, well])
  t.match(resolver.unroutable, [/^255\.255\.255\.255: /])
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)))
  t.same([resolver.upstreams, await resolver.probe(query())], [1, []])
  await t.rejects(createResolver({ upstreams: [nowhere], timeoutMs: 300, tcp: () => true }, () => performance.now()), /no upstream can be reached: 255\.255\.255\.255: connect EACCES/)
})
