/** Upstreams that lie, are slow or dead: failover or nothing, never a wrong answer, never a hang. */
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { askOnce } from '../../egress-sidecar/question.ts'
import { createResolver } from '../../egress-sidecar/resolver.ts'
import type { Upstream } from '../../egress-sidecar/ruleset.ts'
import { startProbes } from '../../egress-sidecar/upstream-probes.ts'
import { eventually } from '../support/program.ts'
import { message, wireName, rcodeOf, record, replyFlags, toQuestion, types } from './message.ts'
import { answer, end, folded, good, query, resolverOf, upstream, type Reply } from './played-upstream.ts'

t.test('the question goes out unchanged but for its id and its case', async (t) => {
  let got: Buffer = Buffer.alloc(0)
  const peer = await upstream(t, (asked, send) => {
    got = asked
    send(answer(asked))
  })
  const resolver = await resolverOf(t, [peer])
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)))
  t.same(got.toString('latin1', 2).toLowerCase(), query().toString('latin1', 2).toLowerCase())
})

t.test('the case of the name is random, and the asker hears nothing of it (0x20)', async (t) => {
  const cases = new Set<string>()
  const peer = await upstream(t, (asked, send) => {
    cases.add(asked.toString('latin1', 12, end))
    send(answer(asked))
  })
  const resolver = await resolverOf(t, [peer])
  for (let i = 0; i < 100; i++) {
    const mine = message({ name: 'A.exAmple' })
    const reply = (await askOnce(resolver, mine, end, 'udp')) as Buffer
    if (!reply.subarray(12, end).equals(message({ name: 'A.exAmple' }).subarray(12))) t.fail(`the answer is to ${reply.toString('latin1', 12, end)}`)
    if (!mine.subarray(2).equals(message({ name: 'A.exAmple' }).subarray(2))) t.fail(`the question is ${mine.toString('latin1', 12, end)} now`)
  }
  // 8 letters, 256 ways: fewer than 60 of them in 100 draws is what nobody will see.
  t.ok(cases.size >= 60, `${cases.size} ways to write it in 100 questions`)
  const plain = await resolverOf(t, [peer], 3000, false)
  cases.clear()
  for (let i = 0; i < 20; i++) await askOnce(plain, query(), end, 'udp')
  t.same([...cases], [query().toString('latin1', 12, end)], 'where TCP is not let out it is left alone: nothing could prove what an answer in another case is')

  // Some servers do not know their own names in another case.
  const strict = await upstream(t, (asked, send) => send(asked.equals(message({ id: asked.readUInt16BE(0), name: 'a.example' })) ? answer(asked) : answer(asked, '198.51.100.1', replyFlags | 5)))
  const off = await resolverOf(t, [strict], 3000, true, { randomCase: false })
  for (let i = 0; i < 20; i++) if (rcodeOf((await askOnce(off, query(), end, 'udp')) as Buffer) !== 0) t.fail('switched off: refused')
})

t.test('an answer in another case', async (t) => {
  const [truth, lie] = ['198.51.100.2', '198.18.0.66']
  // That none of the eight letters was changed happens, and is no mistake: these are asked until it did not.
  const changed = (asked: Buffer): boolean => !asked.subarray(12, end).equals(query().subarray(12))
  const long = { name: toQuestion, type: types.TXT, data: Buffer.alloc(600, 1) }
  const rows: { why: string; tcp: ((asked: Buffer) => Buffer) | null; want: string; again: boolean }[] = [
    { why: 'from somebody who guessed id and port: TCP has the truth', tcp: (asked) => answer(asked, truth), want: truth, again: true },
    { why: 'the same, with a refusal', tcp: (asked) => answer(asked, truth, replyFlags | 5), want: 'rcode 5', again: true },
    { why: 'the same, and the truth is too long for a datagram', tcp: (asked) => Buffer.concat([patchedCount(answer(asked, truth)), record(long)]), want: 'truncated', again: true },
    { why: 'from a server that does not keep the case', tcp: (asked) => folded(asked, truth), want: truth, again: false },
    { why: 'from one without TCP', tcp: null, want: lie, again: false },
    { why: 'from one whose TCP gives nothing that fits, as where somebody sees to it', tcp: () => Buffer.alloc(20), want: 'nothing', again: true },
  ]
  for (const { why, tcp, want, again } of rows) {
    let [last, proofs] = [query(), 0]
    const peer = await upstream(t, (asked, send) => {
      last = asked
      send(folded(asked, lie))
    }, tcp === null ? undefined : (asked) => (proofs++, tcp(asked)))
    const told = new Set<string>()
    const resolver = await resolverOf(t, [peer], 1000, true, { unproven: ({ address }) => told.add(address) })
    const ask = async (): Promise<Buffer | null> => {
      for (let i = 0; i < 20; i++) {
        const got = await askOnce(resolver, query(), end, 'udp')
        if (changed(last)) return got
      }
      throw new Error('twenty questions without a change')
    }
    t.equal(shortly(await ask()), want, why)
    t.same([...told], want === 'nothing' ? ['127.0.0.1'] : [], `${why}: told where nothing can be used`)
    await askOnce(resolver, query(), end, 'udp')
    const before = proofs
    last = query()
    if (again) await ask()
    else for (let i = 0; i < 5; i++) await askOnce(resolver, query(), end, 'udp')
    t.equal(proofs > before, again, `${why}: asked over TCP again`)
    if (!again) t.notOk(changed(last), `${why}: its questions are left alone from then on`)
  }
  function shortly(reply: Buffer | null): string {
    if (reply === null) return 'nothing'
    if (rcodeOf(reply) !== 0) return `rcode ${rcodeOf(reply)}`
    if ((reply.readUInt16BE(2) & 0x0200) !== 0) return 'truncated'
    return [truth, lie].filter((address) => reply.includes(Buffer.from(address.split('.').map(Number)))).join()
  }
  function patchedCount(reply: Buffer): Buffer {
    reply.writeUInt16BE(2, 6)
    return reply
  }
})

t.test('where somebody was seen to guess, right guesses are not believed either', async (t) => {
  const [truth, lie] = ['198.51.100.2', '198.18.0.66'].map((address) => Buffer.from(address.split('.').map(Number))) as [Buffer, Buffer]
  let forge: Reply = (asked, send) => send(folded(asked, '198.18.0.66'))
  let proofs = 0
  const peer = await upstream(t, (...all) => forge(...all), (asked) => (proofs++, answer(asked, '198.51.100.2')))
  const resolver = await resolverOf(t, [peer])
  // One in 256 has its letters unchanged.
  for (let i = 0; i < 20 && proofs === 0; i++) await askOnce(resolver, query(), end, 'udp')
  t.equal(proofs, 1, 'a guess in the wrong case')
  forge = (asked, send) => send(answer(asked, '198.18.0.66'))
  const reply = await askOnce(resolver, query(), end, 'udp')
  t.same([reply?.includes(truth), reply?.includes(lie), proofs], [true, false, 2], 'one in the right case behind it: TCP has the truth')
})

t.test('a crowd of answers in another case takes one proof', async (t) => {
  let proofs = 0
  const peer = await upstream(t, (asked, send) => send(folded(asked)), (asked) => (proofs++, folded(asked)))
  const resolver = await resolverOf(t, [peer])
  // As many as fit into the peer's socket at once.
  const got = await Promise.all(Array.from({ length: 150 }, () => askOnce(resolver, query(), end, 'udp')))
  t.ok(got.every((reply) => reply?.includes(Buffer.of(198, 51, 100, 1))), 'all are answered')
  t.equal(proofs, 1)
})

t.test('closed while an answer in another case is being proven', async (t) => {
  let proving: () => void = () => undefined
  const asked = new Promise<void>((resolve) => (proving = resolve))
  const peer = await upstream(t, (question, send) => send(folded(question)), (question) => (proving(), folded(question, '198.51.100.2', replyFlags | 5)))
  const resolver = await createResolver({ upstreams: [peer, await upstream(t, good)], timeoutMs: 1000, tcp: () => true }, () => performance.now())
  const all = Array.from({ length: 8 }, () => askOnce(resolver, query(), end, 'udp'))
  await asked
  resolver.close()
  await Promise.all(all)
  t.pass('everybody got an answer, and nothing is sent from closed sockets')
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
  t.same([new Set(resolver.ports[4]).size, resolver.ports[6]], [16, []])
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
  let whole: (asked: Buffer) => Buffer = (asked) => answer(asked, '198.51.100.2')
  const peer = await upstream(t, (asked, send) => send(answer(asked, '198.51.100.1', replyFlags | 0x0200)), (asked) => whole(asked))
  const resolver = await resolverOf(t, [peer], 1000)
  t.ok((await askOnce(resolver, query(), end, 'tcp'))?.includes(Buffer.of(198, 51, 100, 2)))
  t.equal(((await askOnce(resolver, query(), end, 'udp')) as Buffer)[2]! & 2, 2, 'a UDP client gets the truncation')
  whole = (asked) => message({ id: asked.readUInt16BE(0), flags: replyFlags, name: 'other.example' })
  t.equal(await askOnce(resolver, query(), end, 'tcp'), null, 'another question\'s answer')
  const udpOnly = await resolverOf(t, [peer], 1000, false)
  t.equal(((await askOnce(udpOnly, query(), end, 'tcp')) as Buffer)[2]! & 2, 2, 'where TCP is not let out')
})

t.test('an upstream whose TCP is silent costs no more than the time for one question, and only so many wait for it', async (t) => {
  const truncated: Reply = (asked, send) => send(answer(asked, '198.51.100.1', replyFlags | 0x0200))
  const silent = (): null => null
  const peers = [await upstream(t, truncated, silent), await upstream(t, truncated, silent)]
  const resolver = await resolverOf(t, peers, 2_000)
  const begun = performance.now()
  t.equal(await askOnce(resolver, query(), end, 'tcp'), null)
  const took = performance.now() - begun
  t.ok(took > 1_900 && took < 3_800, `${took.toFixed(0)} ms for two upstreams`)

  const patient = await resolverOf(t, peers.slice(0, 1), 2_000)
  let told = 0
  for (let i = 0; i < 140; i++) patient.ask(query(), end, 'tcp', () => told++)
  await eventually('those that are too many are told at once', async () => (told === 140 - 128 ? true : undefined))
  await eventually('and the others in time', async () => (told === 140 ? true : undefined))
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

t.test('a server that writes the name out again before its records: the asker sees it as it wrote it', async (t) => {
  const owner = wireName('a.example')
  const written = (asked: Buffer): Buffer => {
    const name = asked.subarray(12, end - 4)
    const reply = message({ id: asked.readUInt16BE(0), flags: replyFlags, name: 'a.example', answers: [{ name, type: types.CNAME, data: 'b.example' }, { name: 'b.example', type: types.A, data: '198.51.100.1' }, { name, type: types.TXT, data: Buffer.from('\u0001x') }] })
    asked.copy(reply, 12, 12, end)
    return reply
  }
  const peer = await upstream(t, (asked, send) => send(written(asked)))
  const resolver = await resolverOf(t, [peer])
  const plain = written(query())
  for (let i = 0; i < 20; i++) {
    const reply = await askOnce(resolver, query(), end, 'udp')
    t.same(reply?.subarray(2), plain.subarray(2))
    t.ok(reply?.includes(owner))
  }
})

t.test('a server that cannot read the question and does not give it back: the next one is asked at once', async (t) => {
  const header = (asked: Buffer, flags: number): Buffer => Buffer.from([asked[0]!, asked[1]!, flags >> 8, flags & 255, 0, 0, 0, 0, 0, 0, 0, 0])
  const dull = await upstream(t, (asked, send) => send(header(asked, 0x8001)))
  const resolver = await resolverOf(t, [dull, await upstream(t, good)], 3000)
  let begun = performance.now()
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)))
  const alone = await resolverOf(t, [dull], 3000)
  t.equal((await askOnce(alone, query(), end, 'udp'))?.length, 12, 'it failed, and did not just stay silent')
  t.ok(performance.now() - begun < 1000, 'nobody waits')
  t.same(await alone.probe(query()), [], 'an error is an answer to a probe')
  begun = performance.now()
  await Promise.all([0x8000, 0x8003, 0x8201, 0x0001, 0x9001].map(async (flags) => {
    const odd = await resolverOf(t, [await upstream(t, (asked, send) => send(header(asked, flags)))], 300)
    t.equal(await askOnce(odd, query(), end, 'udp'), null)
    t.ok(performance.now() - begun > 250, `flags ${flags.toString(16)} without the question: that is no answer to anything`)
  }))
})

t.test('until it connects, its ports are nobody else\'s on any address, and only the upstream is heard', async (t) => {
  const stranger = createSocket('udp4')
  t.teardown(() => stranger.close())
  stranger.bind(0, '127.0.0.1')
  await once(stranger, 'listening')
  let strangers = 0
  // The same answer first from somewhere else: a right id and case are no excuse.
  const peer = await upstream(t, (asked, send, { port }) => stranger.send(answer(asked, '198.51.100.66'), port, '127.0.0.1', () => {
    strangers++
    setTimeout(() => send(answer(asked)), 20)
  }))
  const resolver = await createResolver({ upstreams: [peer], timeoutMs: 3000, tcp: () => true }, () => performance.now())
  t.teardown(() => resolver.close())
  const taken = async (): Promise<unknown[]> => Promise.all(resolver.ports[4].map(async (port) => {
    const socket = createSocket('udp4')
    const result = once(socket, 'listening').then(() => 'free', (error: NodeJS.ErrnoException) => error.code)
    socket.bind({ port, address: '127.0.0.2', exclusive: true })
    return result.finally(() => socket.close())
  }))
  t.same(new Set(await taken()), new Set(['EADDRINUSE']))
  for (let i = 0; i < 5; i++) t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)), 'the upstream is believed, nobody else')
  t.equal(strangers, 5)
  await resolver.connect()
  t.ok((await askOnce(resolver, query(), end, 'udp'))?.includes(Buffer.of(198, 51, 100, 1)), 'nor afterwards')
  t.ok((await taken()).includes('free'), 'what the rules are there for')
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
