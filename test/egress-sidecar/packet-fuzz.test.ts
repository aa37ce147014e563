/** Random and mutated datagrams: no exception, no answer that admits a denied name, bounded time. `SEED=<n>` repeats a run. */
import DNS from 'dns2'
import t from 'tap'
import { readNetworkPolicy } from '#policies/document.ts'
import { compilePolicy } from '#policies/compile.ts'
import { answer, type AnswerDeps, type Outcome } from '../../egress-sidecar/answer.ts'
import { echoOf } from '../../egress-sidecar/echo.ts'
import { readAnswer, readQuestion, type Question } from '../../egress-sidecar/packet.ts'
import { randomOf } from '../support/random.ts'
import { sized } from '../support/size.ts'
import { message, opt, rcodeOf, record, replyFlags, toQuestion, types } from './message.ts'

const read = readNetworkPolicy({ egress: [{ action: 'allow', target: '*.allowed.example' }] })
if (!read.ok) throw new Error('policy')
const rules = compilePolicy(read.policy)

const patterns = [
  message({ name: 'www.allowed.example', additional: [opt(1232)] }),
  message({ name: 'www.denied.example', type: types.AAAA }),
  message({ flags: replyFlags, name: 'www.allowed.example', answers: [{ name: toQuestion, type: types.CNAME, data: 'c.allowed.example' }, { name: 'c.allowed.example', type: types.A, data: '198.51.100.1' }] }),
  message({ flags: replyFlags, name: 'www.allowed.example', type: types.HTTPS, answers: [{ name: toQuestion, type: types.HTTPS, data: Buffer.of(0, 1, 0, 0, 1, 0, 3, 2, 104, 50) }] }),
  Buffer.of(0, 1, 1, 0, 255, 255, 255, 255, 255, 255, 255, 255),
]

/** Labels of the question as they stand on the wire; this test's own reading, byte by byte. */
function wireLabels(query: Buffer): string[] {
  const labels: string[] = []
  for (let at = 12; at < query.length && (query[at] ?? 0) > 0; at += (query[at] as number) + 1) labels.push(query.toString('latin1', at + 1, at + 1 + (query[at] as number)).toLowerCase())
  return labels
}

/** Below allowed.example, and every label of letters, digits, `-` and `_`. */
function mayLeave(query: Buffer): boolean {
  const labels = wireLabels(query)
  return labels.length > 2 && labels.slice(-2).join('/') === 'allowed/example' && labels.every((label) => /^[a-z0-9_-]+$/.test(label))
}

t.test('mutated messages', { timeout: 3_600_000 }, async (t) => {
  const random = randomOf(t)
  const count = sized(300_000, 5_000_000)
  const question = readQuestion(message({ name: 'www.allowed.example' }))
  if (question === null || typeof question === 'number') throw new Error('pattern')
  let asked: Buffer | null = null
  let left = 0
  let admitted = 0
  const outcomes: Outcome[] = []
  const deps: AnswerDeps = {
    resolver: { ask: (query, _end, _transport, done) => done((asked = query, null)) },
    firewall: { rules, learned: 0, updates: 0, replace: async () => undefined, open: () => 'open' },
    mayOpen: (_, address) => ({ opened: address, reason: null }),
    now: () => 0,
    report: (outcome) => outcomes.push(outcome),
  }
  let slowest = 0
  for (let i = 0; i < count; i++) {
    const bytes = Buffer.from(random.pick(patterns))
    for (let changes = random.between(0, 6); changes > 0; changes--) bytes[random.between(0, bytes.length - 1)] = random.pick([0, 1, 0x3f, 0x40, 0xc0, 0xff, random.between(0, 255)])
    const cut = bytes.subarray(0, random.between(0, 3) === 0 ? random.between(0, bytes.length) : bytes.length)
    const read = (): number => {
      const started = process.hrtime.bigint()
      readQuestion(cut)
      if (cut.length >= question.end) readAnswer(cut, question)
      return Number(process.hrtime.bigint() - started) / 1e6
    }
    let took = read()
    // The machine may pause in between: what is slow is read again, and the quickest counts.
    for (let again = 0; took > slowest && took > 1 && again < 20; again++) took = Math.min(took, read())
    slowest = Math.max(slowest, took)
    // The whole path for one in ten: what leaves must be allowed as it stands on the wire.
    if (i % 10 !== 0) continue
    asked = null
    answer(Buffer.from(cut), 'udp', deps, () => undefined)
    if (asked === null) continue
    left++
    if (!mayLeave(asked)) admitted++
  }
  t.equal(admitted, 0, `${count} datagrams, no denied one left`)
  t.ok(left > count / 1000 && outcomes.length > count / 100, `${left} allowed ones did, of ${outcomes.length} questions`)
  t.ok(slowest < 50, `the slowest took ${slowest.toFixed(2)} ms`)
})

/** Where an honest answer and its chain lead, and where the records beside it do. */
const [honest, foreign] = ['198.51.100.', '198.18.66.']
const allowedLabels = ['allowed', 'example']
const replies = [
  { flags: replyFlags, name: 'www.allowed.example', answers: [{ name: toQuestion, type: types.A, data: `${honest}1` }, { name: 'www.foreign.example', type: types.A, data: `${foreign}1` }] },
  { flags: replyFlags, name: 'www.allowed.example', answers: [{ name: toQuestion, type: types.CNAME, data: 'c.cdn.example' }, { name: 'd.cdn.example', type: types.A, data: `${foreign}2` }, { name: 'c.cdn.example', type: types.A, data: `${honest}2` }] },
  { flags: replyFlags, name: 'www.allowed.example', answers: [{ name: 'a.foreign.example', type: types.CNAME, data: 'www.allowed.example' }, { name: 'a.foreign.example', type: types.A, data: `${foreign}3` }], additional: [opt(1232), record({ name: 'www.allowed.example', type: types.A, data: `${foreign}4` })] },
  { flags: replyFlags, name: 'www.allowed.example', type: types.HTTPS, answers: [{ name: toQuestion, type: types.HTTPS, data: Buffer.of(0, 1, 0, 0, 1, 0, 3, 2, 104, 50, 0, 4, 0, 4, 198, 18, 66, 5) }] },
].map(message)

/** Addresses that the question's name leads to as dns2, somebody else's reader, has it; null when that cannot read it. */
function addressesByOther(reply: Buffer): Set<string> | null {
  try {
    const { questions, answers } = DNS.Packet.parse(reply) as unknown as { questions: { name: string }[]; answers: { name: string; type: number; address?: string; domain?: string }[] }
    const reached = new Set([questions[0]?.name.toLowerCase()])
    for (let more = true; more;) {
      const before = reached.size
      for (const { name, type, domain } of answers) if (type === types.CNAME && reached.has(name.toLowerCase())) reached.add(domain?.toLowerCase())
      more = reached.size > before
    }
    return new Set(answers.filter(({ name, address }) => address !== undefined && reached.has(name.toLowerCase())).map(({ address }) => address as string))
  } catch {
    return null
  }
}

t.test('mutated and grown answers: nothing is opened or told that the question does not lead to', { timeout: 3_600_000 }, async (t) => {
  const random = randomOf(t)
  const count = sized(60_000, 1_000_000)
  const spelling = (): string[] => random.between(0, 1) === 0 ? ['www', 'allowed', 'example'] : random.pick([['www.allowed.example'], ['www', 'allowed.example'], ['www', 'allowed', 'example\0'], ['allowed', 'example'], ['www', 'allowed', 'example', 'denied'], ['WWW', 'Allowed', 'eXample'], ['', 'www', 'allowed', 'example']])
  const problems: string[] = []
  const seen = { asked: 0, opened: 0, told: 0, refused: 0, unreadable: 0 }
  for (let i = 0; i < count && problems.length < 10; i++) {
    const query = message({ name: spelling(), type: random.pick([types.A, types.A, types.A, types.A, types.AAAA, types.HTTPS, types.CNAME, random.between(0, 65535)]) })
    const labels = wireLabels(query)
    let reply = Buffer.from(random.pick(replies))
    for (let changes = random.between(0, 3); changes > 0; changes--) reply[random.between(2, reply.length - 1)] = random.pick([0, 1, 5, 12, 28, 65, 0xc0, 0xff, random.between(0, 255)])
    if (random.between(0, 9) === 0) reply = Buffer.concat([reply, Buffer.from(Array.from({ length: random.between(1, 60) }, () => random.between(0, 255)))])
    if (random.between(0, 9) === 0) reply = reply.subarray(0, random.between(12, reply.length)) as Buffer<ArrayBuffer>
    const opened: string[] = []
    let got: Buffer | null = null
    answer(query, random.pick(['udp', 'tcp'] as const), {
      resolver: { ask: (asked, end, _transport, done) => {
        seen.asked++
        if (labels.length < 3 || labels.slice(-2).join('/') !== allowedLabels.join('/')) problems.push(`asked for ${JSON.stringify(labels)}`)
        // As the resolver does: what does not repeat the question is not an answer.
        done(echoOf(reply, asked, end) === 'none' ? null : reply)
      } },
      firewall: { rules, learned: 0, updates: 0, replace: async () => undefined, open: (_name, _aliases, addresses) => (opened.push(...addresses), 'open') },
      mayOpen: (_, address) => ({ opened: address, reason: null }), now: () => 0, report: () => undefined,
    }, (bytes) => (got = bytes))
    if (got === null) problems.push(`no reply to ${query.toString('hex')}`)
    else if (rcodeOf(got) !== 0) seen.refused++
    seen.opened += opened.length
    if (opened.length === 0) continue
    const others = addressesByOther(reply)
    if (others === null) seen.unreadable++
    else for (const address of opened) if (address.includes('.') && !others.has(address)) problems.push(`opened ${address} for ${reply.toString('hex')}`)
    // In the reply, as bytes: an address of records that lead nowhere.
    const told = got === null ? null : addressesByOther(got)
    if (told !== null) for (const address of told) if (address.includes('.') && !opened.includes(address)) problems.push(`told ${address} in ${(got as unknown as Buffer).toString('hex')}`)
    seen.told += told?.size ?? 0
  }
  t.same(problems, [])
  for (const [what, times] of Object.entries(seen)) if (what !== 'unreadable') t.ok(times > count / 100, `${what}: ${times}`)
  t.comment(JSON.stringify(seen))
})

t.test('names that point into each other cost as much as the message is long', async (t) => {
  const question = readQuestion(message({ name: 'a.example' })) as Question
  const head = message({ flags: replyFlags, name: 'a.example' })
  const cname = (target: number): Buffer => Buffer.of(0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 2, 0xc0 | (target >> 8), target & 255)
  /** Text of a record that nobody looks into, so that its data can hold anything; then as many aliases as there is room for. */
  const hostile = (data: Buffer, targets: (from: number) => number): Buffer => {
    const from = head.length + 12
    const holder = Buffer.concat([Buffer.of(0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60, data.length >> 8, data.length & 255), data])
    const aliases = Array.from({ length: Math.floor((65_500 - from - data.length) / 14) }, (_, i) => cname(targets(from + (i % data.length & ~1))))
    const bytes = Buffer.concat([head, holder, ...aliases])
    bytes.writeUInt16BE(aliases.length + 1, 6)
    return bytes
  }
  const start = head.length + 12
  const pointers = Buffer.concat(Array.from({ length: 8000 }, (_, i) => ((at) => Buffer.of(0xc0 | (at >> 8), at & 255))(i === 0 ? 12 : start + (i - 1) * 2)))
  const labels = Buffer.concat(Array.from({ length: 64 }, () => Buffer.concat([Buffer.concat(Array.from({ length: 126 }, () => Buffer.of(1, 97))), Buffer.of(0, 0)])))
  const rows: [why: string, bytes: Buffer][] = [
    ['16 KB of pointers to pointers, from the far end', hostile(pointers, () => start + pointers.length - 2)],
    ['16 KB of pointers to pointers, from everywhere', hostile(pointers, (at) => at)],
    ['names of 127 labels, begun at each of them', hostile(labels, (at) => Math.min(at, 0x3fff))],
    ['a circle of labels and a pointer back', hostile(Buffer.of(1, 97, 0xc0 | (start >> 8), start & 255), () => start)],
  ]
  for (const [why, bytes] of rows) {
    const times = Array.from({ length: 7 }, () => {
      const started = performance.now()
      readAnswer(bytes, question)
      return performance.now() - started
    })
    t.ok(Math.min(...times) < 25, `${why}: ${Math.min(...times).toFixed(2)} ms for ${bytes.length} bytes`)
  }
})

t.test('a header that claims 65,535 records costs next to nothing', async (t) => {
  const query = message({ name: 'a.example' })
  const question = readQuestion(query)
  if (question === null || typeof question === 'number') throw new Error('pattern')
  const claims = message({ flags: replyFlags })
  claims.fill(0xff, 6, 12)
  const started = process.hrtime.bigint()
  for (let i = 0; i < 10_000; i++) readAnswer(claims, question)
  const each = Number(process.hrtime.bigint() - started) / 1e4 / 1e3
  t.ok(each < 100, `${each.toFixed(2)} µs each`)
})
