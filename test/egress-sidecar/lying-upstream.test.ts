/**
 * An upstream that lies, through the whole path of a question: real sockets, real reader, a firewall that only writes down what it is told
 * to open. Alone it gets the sandbox a SERVFAIL, beside an honest one the honest answer; never a hang, never an address that is a lie.
 */
import { createSocket, type Socket } from 'node:dgram'
import { once } from 'node:events'
import { createServer, type Socket as TcpSocket } from 'node:net'
import t, { type Test } from 'tap'
import { compilePolicy } from '#policies/compile.ts'
import { answer } from '../../egress-sidecar/answer.ts'
import { createAddressJudge } from '../../egress-sidecar/judge.ts'
import { readAnswer, readQuestion, type Question } from '../../egress-sidecar/packet.ts'
import { createResolver } from '../../egress-sidecar/resolver.ts'
import type { Upstream } from '../../egress-sidecar/ruleset.ts'
import { message, rcodeOf, replyFlags, toQuestion, types, type MessageText } from './message.ts'

const truth = '198.51.100.1'
const lie = '198.18.0.66'
const name = 'a.example'
const questionLength = message({ name }).length - 12
const honestRecords = [{ name: toQuestion, type: types.A, data: truth }]
const lyingRecords = [{ name: toQuestion, type: types.A, data: lie }]
const truncated = 0x0200

type Send = (reply: Buffer) => void
type Liar = (asked: Buffer, send: Send, count: number, stranger: Send) => void
/** With the question as it came, unless the text has another one. */
function reply(asked: Buffer, text: MessageText): Buffer {
  const bytes = message({ id: asked.readUInt16BE(0), flags: replyFlags, name, ...text })
  if (text.name === undefined && text.type === undefined && text.class === undefined) asked.copy(bytes, 12, 12, 12 + questionLength)
  return bytes
}
const good = (asked: Buffer): Buffer => reply(asked, { answers: honestRecords })
const bad = (asked: Buffer, text: MessageText = {}): Buffer => reply(asked, { answers: lyingRecords, ...text })
function patched(bytes: Buffer, change: (bytes: Buffer) => void): Buffer {
  change(bytes)
  return bytes
}
const chain = (...names: string[]): MessageText => ({ answers: [...names.slice(1).map((data, i) => ({ name: names[i] as string, type: types.CNAME, data })), { name: names.at(-1) as string, type: types.A, data: lie }] })

type Result = 'the truth' | 'SERVFAIL' | 'truncated' | 'nothing'
/** What the sandbox gets where the liar is the only upstream, and where an honest one is second. */
const liars: [why: string, liar: Liar, alone: Result, beside: Result][] = [
  ['dead', () => undefined, 'SERVFAIL', 'the truth'],
  ['a wrong id', (asked, send) => send(patched(bad(asked), (bytes) => bytes.writeUInt16BE(asked.readUInt16BE(0) ^ 1, 0))), 'SERVFAIL', 'the truth'],
  ['every id but the right one', (asked, send) => { for (let i = 1; i < 500; i++) send(patched(bad(asked), (bytes) => bytes.writeUInt16BE(asked.readUInt16BE(0) ^ i, 0))) }, 'SERVFAIL', 'the truth'],
  ['another name as question', (asked, send) => send(bad(asked, { name: 'b.example' })), 'SERVFAIL', 'the truth'],
  ['another type as question', (asked, send) => send(bad(asked, { type: types.AAAA })), 'SERVFAIL', 'the truth'],
  ['another class as question', (asked, send) => send(bad(asked, { class: 3 })), 'SERVFAIL', 'the truth'],
  ['no question', (asked, send) => send(patched(bad(asked), (bytes) => bytes.writeUInt16BE(0, 4))), 'SERVFAIL', 'the truth'],
  ['two questions', (asked, send) => send(patched(bad(asked), (bytes) => bytes.writeUInt16BE(2, 4))), 'SERVFAIL', 'the truth'],
  ['the question itself', (asked, send) => send(asked), 'SERVFAIL', 'the truth'],
  ['another opcode', (asked, send) => send(bad(asked, { flags: replyFlags | 0x2000 })), 'SERVFAIL', 'the truth'],
  ['garbage', (_asked, send) => { for (const text of ['', 'x', 'garbage', 'g'.repeat(1400)]) send(Buffer.from(text)) }, 'SERVFAIL', 'the truth'],
  ['garbage behind the right header', (asked, send) => send(Buffer.concat([asked.subarray(0, 2), Buffer.of(0x81, 0x80, 0, 1, 0xff, 0xff, 0, 0, 0, 0), asked.subarray(12), Buffer.alloc(200, 0xc0)])), 'SERVFAIL', 'SERVFAIL'],
  ['an answer that is cut off', (asked, send) => send(bad(asked).subarray(0, -3)), 'SERVFAIL', 'SERVFAIL'],
  ['a record more than there is', (asked, send) => send(patched(bad(asked), (bytes) => bytes.writeUInt16BE(2, 6))), 'SERVFAIL', 'SERVFAIL'],
  ['cut off within the question', (asked, send) => send(bad(asked).subarray(0, 20)), 'SERVFAIL', 'the truth'],
  ['truncated, with an address', (asked, send) => send(bad(asked, { flags: replyFlags | truncated })), 'truncated', 'truncated'],
  ['SERVFAIL with an address', (asked, send) => send(bad(asked, { flags: replyFlags | 2 })), 'SERVFAIL', 'the truth'],
  ['NXDOMAIN with an address', (asked, send) => send(bad(asked, { flags: replyFlags | 3 })), 'SERVFAIL', 'SERVFAIL'],
  ['REFUSED with an address', (asked, send) => send(bad(asked, { flags: replyFlags | 5 })), 'SERVFAIL', 'the truth'],
  ['slow', (asked, send) => void setTimeout(() => send(good(asked)), 1300).unref(), 'the truth', 'the truth'],
  ['too slow', (asked, send) => void setTimeout(() => send(bad(asked)), 3600).unref(), 'SERVFAIL', 'the truth'],
  ['an answer from another port', (asked, _send, _count, stranger) => stranger(bad(asked)), 'SERVFAIL', 'the truth'],
  ['aliases in a circle', (asked, send) => send(bad(asked, chain(name, 'b.example', 'c.example', name))), 'SERVFAIL', 'SERVFAIL'],
  ['an alias of itself', (asked, send) => send(bad(asked, chain(name, name))), 'SERVFAIL', 'SERVFAIL'],
  ['forty aliases', (asked, send) => send(bad(asked, chain(name, ...Array.from({ length: 40 }, (_, i) => `n${i}.example`)))), 'SERVFAIL', 'SERVFAIL'],
  ['the address of another name', (asked, send) => send(bad(asked, { answers: [{ name: 'b.example', type: types.A, data: lie }] })), 'nothing', 'nothing'],
  ['a second answer with other data', (asked, send) => { send(good(asked)); send(bad(asked)) }, 'the truth', 'the truth'],
  ['a wrong answer first, then the right one', (asked, send) => { send(bad(asked, { name: 'b.example' })); send(good(asked)) }, 'the truth', 'the truth'],
  ['the case of the name changed, and no TCP to prove it (0x20)', (asked, send) => send(patched(good(asked), (bytes) => bytes.write('eXaMpLe', 15, 'latin1'))), 'the truth', 'the truth'],
]

t.test('every kind of lie', async (t) => {
  const honest = await peer(t, (asked, send) => send(good(asked)))
  // All at once: most of them end by a timeout.
  const asked = liars.flatMap(([why, liar, alone, beside]) => [{ why, liar, others: [], timeoutMs: 3000, wanted: alone }, { why: `${why}, beside an honest one`, liar, others: [honest], timeoutMs: 20_000, wanted: beside }])
  await Promise.all(asked.map(async ({ why, liar, others, timeoutMs, wanted }) => {
    const { got, opened } = await ask(t, [await peer(t, liar), ...others], timeoutMs)
    t.equal(resultOf(got), wanted, why)
    t.same(opened.filter((address) => address !== truth), [], `${why}: nothing but the truth is opened`)
  }))
})

t.test('flapping: every question is answered', async (t) => {
  const upstreams = [await peer(t, (asked, send, count) => void (count % 2 === 0 && send(good(asked)))), await peer(t, (asked, send) => send(good(asked)))]
  const resolver = await open(t, upstreams, 6000)
  const all = await Promise.all(Array.from({ length: 40 }, () => askBy(resolver)))
  t.same(new Set(all.map(({ got }) => resultOf(got))), new Set(['the truth']))
})

t.test('answers to a question that nobody asked', async (t) => {
  const strays = new Set<number>()
  const honest = await peer(t, (asked, send) => {
    // For the questions that may come next, from the right address to the right port.
    for (let i = 0; i < 100; i++) {
      const id = (asked.readUInt16BE(0) + 1 + i * 131) & 0xffff
      strays.add(id)
      send(patched(bad(asked), (bytes) => bytes.writeUInt16BE(id, 0)))
    }
    send(good(asked))
  })
  const resolver = await open(t, [honest], 6000)
  for (let i = 0; i < 20; i++) {
    const { got, opened } = await askBy(resolver)
    t.equal(resultOf(got), 'the truth')
    t.same(opened, [truth])
  }
  t.ok(strays.size > 1000, 'many of them')
})

t.test('lies over TCP, behind a truncated answer', async (t) => {
  const framed = (bytes: Buffer): Buffer => Buffer.concat([Buffer.of(bytes.length >> 8, bytes.length & 255), bytes])
  const rows: [why: string, talk: Talk, want: Result][] = [
    ['the truth', (asked, socket) => socket.write(framed(good(asked))), 'the truth'],
    ['silence', () => undefined, 'SERVFAIL'],
    ['hangs up', (_asked, socket) => socket.destroy(), 'SERVFAIL'],
    ['half an answer', (asked, socket) => socket.end(framed(bad(asked)).subarray(0, 20)), 'SERVFAIL'],
    ['a wrong id', (asked, socket) => socket.write(framed(patched(bad(asked), (bytes) => bytes.writeUInt16BE(asked.readUInt16BE(0) ^ 1, 0)))), 'SERVFAIL'],
    ['another question', (asked, socket) => socket.write(framed(bad(asked, { name: 'b.example' }))), 'SERVFAIL'],
    ['no length', (_asked, socket) => socket.write(Buffer.of(0, 0)), 'SERVFAIL'],
    ['a byte now and then', (asked, socket) => { const bytes = framed(bad(asked)); let at = 0; const timer = setInterval(() => socket.write(bytes.subarray(at, ++at)), 200); socket.on('close', () => clearInterval(timer)) }, 'SERVFAIL'],
    ['truncated again', (asked, socket) => socket.write(framed(bad(asked, { flags: replyFlags | truncated }))), 'truncated'],
  ]
  await Promise.all(rows.map(async ([why, talk, want]) => {
    const upstream = await peerWithTcp(t, (asked, send) => send(bad(asked, { flags: replyFlags | truncated })), talk)
    const { got, opened } = await ask(t, [upstream], 1500, 'tcp')
    t.equal(resultOf(got), want, why)
    t.same(opened.filter((address) => address !== truth), [], `${why}: nothing but the truth is opened`)
  }))
})

async function peer(t: Test, liar: Liar): Promise<Upstream> {
  const socket: Socket = createSocket('udp4')
  const other: Socket = createSocket('udp4')
  socket.bind(0, '127.0.0.1')
  await once(socket, 'listening')
  let count = 0
  let over = false
  socket.on('message', (asked, from) => {
    const by = (sender: Socket): Send => (bytes) => void (over || sender.send(bytes, from.port, from.address))
    liar(asked, by(socket), count++, by(other))
  })
  // A question that was given up may be answered when its asker's port is closed again.
  for (const one of [socket, other]) one.on('error', () => undefined)
  t.teardown(() => {
    over = true
    socket.close()
    other.close()
  })
  return { address: '127.0.0.1', port: socket.address().port }
}

type Talk = (asked: Buffer, socket: TcpSocket) => void

/** The same port for both: taken anew until it is free for TCP, too. */
async function peerWithTcp(t: Test, liar: Liar, talk: Talk): Promise<Upstream> {
  const upstream = await peer(t, liar)
  const server = createServer((socket) => {
    socket.on('error', () => socket.destroy())
    socket.on('data', (data) => talk(data.subarray(2), socket))
  }).listen(upstream.port, upstream.address)
  const listening = await once(server, 'listening').then(() => true, () => false)
  if (!listening) return peerWithTcp(t, liar, talk)
  t.teardown(() => server.close())
  return upstream
}

type Asker = Awaited<ReturnType<typeof createResolver>>

async function open(t: Test, upstreams: readonly Upstream[], timeoutMs: number): Promise<Asker> {
  const resolver = await createResolver({ upstreams: [...upstreams], timeoutMs, tcp: () => true }, () => performance.now())
  t.teardown(() => resolver.close())
  await resolver.connect()
  return resolver
}

async function ask(t: Test, upstreams: readonly Upstream[], timeoutMs: number, transport: 'udp' | 'tcp' = 'udp'): Promise<{ got: Buffer; opened: string[] }> {
  return askBy(await open(t, upstreams, timeoutMs), transport)
}

async function askBy(resolver: Asker, transport: 'udp' | 'tcp' = 'udp'): Promise<{ got: Buffer; opened: string[] }> {
  const rules = compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.example' }] })
  const opened: string[] = []
  const firewall = { rules, learned: 0, updates: 0, replace: async () => undefined, open: async (_name: string, _aliases: readonly unknown[], addresses: readonly string[]) => (opened.push(...addresses), 'open' as const) }
  const deps = { resolver, firewall, mayOpen: createAddressJudge([]), now: () => 0, report: () => undefined }
  const got = await new Promise<Buffer | null>((resolve) => answer(message({ name, id: 77 }), transport, deps, resolve))
  if (got === null || got.readUInt16BE(0) !== 77) throw new Error('not an answer to the question')
  return { got, opened }
}

function resultOf(got: Buffer): Result | string {
  if (rcodeOf(got) === 2) return 'SERVFAIL'
  if ((got.readUInt16BE(2) & truncated) !== 0) return got.readUInt16BE(6) === 0 ? 'truncated' : 'truncated, with records'
  const found = readAnswer(got, readQuestion(message({ name })) as Question)?.addresses.map(({ address }) => address) ?? []
  return rcodeOf(got) === 0 && found.length === 0 ? 'nothing' : rcodeOf(got) === 0 && found.join() === truth ? 'the truth' : `rcode ${rcodeOf(got)}: ${found.join()}`
}
