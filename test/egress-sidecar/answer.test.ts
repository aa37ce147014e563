/** One question from start to end, with a resolver and a firewall that the test plays. */
import t from 'tap'
import { compilePolicy, type Rules } from '#policies/compile.ts'
import { readNetworkPolicy } from '#policies/document.ts'
import { answer, type AnswerDeps, type Outcome, type Transport } from '../../egress-sidecar/answer.ts'
import type { Opened } from '../../egress-sidecar/firewall.ts'
import { createAddressJudge, knownResolvers } from '../../egress-sidecar/judge.ts'
import { readAnswer, readQuestion, type Question } from '../../egress-sidecar/packet.ts'
import { answerCount, message, opt, rcodeOf, record, replyFlags, toQuestion, types, type MessageText } from './message.ts'

function rulesOf(...egress: [action: string, target: string][]): Rules {
  const read = readNetworkPolicy({ egress: egress.map(([action, target]) => ({ action, target })) })
  if (!read.ok) throw new Error(JSON.stringify(read.problems))
  return compilePolicy(read.policy)
}

type Play = {
  rules?: Rules
  query?: MessageText
  reply?: Buffer | null
  transport?: Transport
  /** What the firewall says, call by call; the last holds on. */
  opened?: Opened[]
  /** Called while upstream is asked. */
  meanwhile?: (switchTo: (rules: Rules) => void) => void
}

async function play({ rules = rulesOf(['allow', '*.example']), query = {}, reply = null, transport = 'udp', opened = ['open'], meanwhile }: Play) {
  let current = rules
  const seen = { asked: 0, opened: [] as { name: string; addresses: readonly string[]; seconds: number }[], outcomes: [] as Outcome[] }
  const deps: AnswerDeps = {
    resolver: {
      ask(bytes, _end, _transport, done) {
        seen.asked++
        bytes.writeUInt16BE(0x7777, 0)
        meanwhile?.((wanted) => (current = wanted))
        done(reply)
      },
    },
    firewall: {
      get rules() {
        return current
      },
      learned: 0,
      updates: 0,
      replace: async () => undefined,
      async open(name, _aliases, addresses, seconds) {
        seen.opened.push({ name, addresses, seconds })
        return opened[Math.min(seen.opened.length, opened.length) - 1] as Opened
      },
    },
    mayOpen: createAddressJudge(['198.51.100.53', ...knownResolvers]),
    now: () => 0,
    report: (outcome) => seen.outcomes.push(outcome),
  }
  const bytes = message(query)
  const got = await new Promise<Buffer | null>((resolve) => answer(bytes, transport, deps, resolve))
  return { ...seen, got: got as Buffer, result: seen.outcomes[0]?.result, reason: seen.outcomes[0]?.verdict.reason }
}

const replyTo = (text: MessageText): Buffer => message({ flags: replyFlags, ...text })
const addressReply = (...addresses: string[]): Buffer => replyTo({ answers: addresses.map((data) => ({ name: toQuestion, type: types.A, data })) })

function addressesIn(reply: Buffer): string[] {
  return readAnswer(reply, readQuestion(Buffer.concat([reply.subarray(0, 2), Buffer.of(1, 0), reply.subarray(4, 6), Buffer.alloc(6), reply.subarray(12)])) as Question)?.addresses.map((found) => found.address) ?? []
}

t.test('a denied name never leaves', async (t) => {
  for (const type of [types.A, types.AAAA, types.TXT, types.HTTPS, 255]) {
    const { got, asked, result, reason } = await play({ query: { name: 'secret.evil', type, id: 42 } })
    t.equal(asked, 0)
    t.equal(rcodeOf(got), 3, 'NXDOMAIN')
    t.equal(got.readUInt16BE(0), 42)
    t.equal(result, 'denied')
    t.equal(reason, 'default-denies')
  }
  const malformed = await play({ query: { name: ['a.example\0', 'example'] } })
  t.equal(malformed.asked, 0)
  t.equal(malformed.reason, 'malformed-name')
})

t.test('an allowed answer: addresses open first, then the same bytes under the client\'s id', async (t) => {
  const reply = replyTo({ id: 0x7777, answers: [{ name: toQuestion, type: types.A, ttl: 30, data: '198.51.100.1' }, { name: toQuestion, type: 9999, data: Buffer.from('unknown') }], additional: [opt(1232)] })
  const { got, opened, result } = await play({ query: { id: 0x0102, additional: [opt(1232)] }, reply: Buffer.from(reply) })
  t.same(opened, [{ name: 'a.example', addresses: ['198.51.100.1'], seconds: 90 }])
  t.same(got.subarray(2), reply.subarray(2), 'EDNS and unknown types byte for byte')
  t.equal(got.readUInt16BE(0), 0x0102)
  t.equal(result, 'answered')
})

t.test('leases and TTLs', async (t) => {
  for (const { ttl, seconds, told } of [{ ttl: 0, seconds: 60, told: 0 }, { ttl: 1, seconds: 61, told: 1 }, { ttl: 10, seconds: 70, told: 10 }, { ttl: 120, seconds: 180, told: 120 }, { ttl: 300, seconds: 360, told: 300 }, { ttl: 9999, seconds: 360, told: 300 }, { ttl: 0x80000000, seconds: 60, told: 0 }]) {
    const { got, opened } = await play({ reply: replyTo({ answers: [{ name: toQuestion, type: types.A, ttl, data: '198.51.100.1' }] }) })
    t.equal(opened[0]?.seconds, seconds, `TTL ${ttl}: lease`)
    t.equal(got.readUInt32BE(got.length - 10), told, `TTL ${ttl}: what the client hears`)
  }
})

t.test('addresses that an allowed name must not lead to', async (t) => {
  for (const address of ['127.0.0.1', '169.254.169.254', '10.0.0.1', '172.16.0.1', '192.168.1.1', '100.64.0.1', '0.0.0.0', '224.0.0.251', '255.255.255.255', '198.51.100.53', '8.8.8.8', '1.1.1.1', '9.9.9.9', '208.67.222.222', '94.140.14.14', '185.228.168.9', '76.76.2.1', '194.242.2.2', '185.222.222.222', '223.5.5.5', '120.53.53.53', '45.90.28.7']) {
    const { got, opened } = await play({ reply: addressReply(address) })
    t.same(opened, [], `${address} stays shut`)
    t.equal(rcodeOf(got), 0)
    t.equal(answerCount(got), 0, `${address} is not told`)
  }
  for (const data of ['::1', '::', 'fe80::1', 'fd00::1', 'ff02::fb', '::ffff:a9fe:a9fe', '64:ff9b::a9fe:a9fe', '2002:a9fe:a9fe::1', '2001:0:1::1', '2001:4860:4860::8888', '2606:4700:4700::1111', '2620:fe::fe', '2620:119:35::35', '2a10:50c0::ad1:ff']) {
    const { got, opened } = await play({ query: { type: types.AAAA }, reply: replyTo({ type: types.AAAA, answers: [{ name: toQuestion, type: types.AAAA, data }] }) })
    t.same(opened, [], `${data} stays shut`)
    t.equal(answerCount(got), 0)
  }
  const free = compilePolicy({ defaultAction: 'allow', egress: [] })
  t.same(addressesIn((await play({ rules: free, reply: addressReply('8.8.8.8', '10.0.0.1') })).got), ['8.8.8.8'], 'a public resolver, where every address is open anyway')
  const mixed = await play({ reply: addressReply('10.0.0.1', '198.51.100.1', '127.0.0.1') })
  t.same(addressesIn(mixed.got), ['198.51.100.1'], 'the good one of three is told')
  const explicit = await play({ rules: rulesOf(['allow', '*.example'], ['allow', '10.0.0.0/8']), reply: addressReply('10.0.0.1') })
  t.same(explicit.opened[0]?.addresses, ['10.0.0.1'], 'an address rule covers it')
  const denied = await play({ rules: rulesOf(['allow', '*.example'], ['deny', '198.51.100.0/24']), reply: addressReply('198.51.100.1', '198.18.0.1') })
  t.same(addressesIn(denied.got), ['198.18.0.1'])
  t.same(denied.outcomes[0]?.shut, [{ address: '198.51.100.1', reason: 'rule-denies' }])
  const floor = compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.example' }] }, { floor: ['198.18.0.0/15'] })
  const told = await play({ rules: floor, reply: addressReply('198.18.0.1', '10.0.0.1', '8.8.8.8', '198.51.100.1') })
  t.same(told.outcomes[0]?.shut, [{ address: '198.18.0.1', reason: 'floor' }, { address: '10.0.0.1', reason: 'special-use-address' }, { address: '8.8.8.8', reason: 'resolver-address' }], 'each with its reason')
  t.same([told.result, told.outcomes[0]?.addresses], ['answered', ['198.51.100.1']])
})

t.test('aliases', async (t) => {
  const chain = (target: string): Buffer => replyTo({ answers: [{ name: toQuestion, type: types.CNAME, data: target }, { name: target, type: types.A, data: '198.51.100.1' }] })
  t.equal((await play({ reply: chain('cdn.elsewhere') })).result, 'answered', 'a target that only the default denies is what CDNs do')
  const denied = await play({ rules: rulesOf(['allow', 'a.example'], ['deny', 'tracker.elsewhere']), reply: chain('tracker.elsewhere') })
  t.equal(denied.result, 'denied', 'a rule denies the target')
  t.match(denied.outcomes[0], { alias: 'tracker.elsewhere', verdict: { rule: 1 } })
  t.equal(rcodeOf(denied.got), 3)
  t.same(denied.opened, [])
  const stray = await play({ reply: replyTo({ answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }, { name: 'bank.elsewhere', type: types.A, data: '198.51.100.66' }] }) })
  t.same(stray.opened[0]?.addresses, ['198.51.100.1'])
  t.same(addressesIn(stray.got), ['198.51.100.1'], 'an address outside the chain is neither opened nor told')
})

t.test('HTTPS records lose hints and ECH under default deny', async (t) => {
  const param = (key: number, value: number[]): number[] => [key >> 8, key & 255, value.length >> 8, value.length & 255, ...value]
  const alpn = param(1, [2, 104, 50])
  const full = Buffer.from([0, 1, 0, ...alpn, ...param(4, [198, 51, 100, 1]), ...param(5, [1, 2, 3]), ...param(6, Array<number>(16).fill(0))])
  const clean = Buffer.from([0, 1, 0, ...alpn])
  const https = (data: Buffer): Play => ({ query: { type: types.HTTPS }, reply: replyTo({ type: types.HTTPS, answers: [{ name: toQuestion, type: types.HTTPS, data }] }) })
  t.ok((await play(https(full))).got.includes(record({ name: toQuestion, type: types.HTTPS, data: clean })))
  t.same((await play(https(clean))).got.subarray(12), replyTo({ type: types.HTTPS, answers: [{ name: toQuestion, type: types.HTTPS, data: clean }] }).subarray(12), 'one without them passes as it is')
  t.equal(answerCount((await play(https(Buffer.from([0, 1, 0, ...param(0, [0, 4]), ...param(4, [1, 2, 3, 4])])))).got), 0, 'hints declared mandatory')
  t.equal(answerCount((await play(https(Buffer.from([0, 1, 0, 0, 4, 0, 99])))).got), 0, 'malformed')
  const beside = record({ name: toQuestion, type: types.HTTPS, data: full })
  for (const [why, additional] of [['alone', [beside]], ['behind another record', [opt(1232), beside]], ['cut off', [beside.subarray(0, -1)]]] as const) {
    const { got } = await play({ query: { type: types.A }, reply: replyTo({ answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }], additional }) })
    t.same(addressesIn(got), ['198.51.100.1'], `in the additional section, ${why}: the answer stays`)
    t.notOk(got.includes(Buffer.from(param(5, [1, 2, 3]))), `in the additional section, ${why}: no ECH`)
  }
  const missing = await play({ query: { type: types.A }, reply: replyTo({ flags: replyFlags | 3, additional: [beside] }) })
  t.equal(rcodeOf(missing.got), 3, 'a name that does not exist does not come to exist')
  t.notOk(missing.got.includes(Buffer.from(param(5, [1, 2, 3]))))
  const open = readNetworkPolicy({ defaultAction: 'allow' })
  if (!open.ok) throw new Error('policy')
  t.ok((await play({ ...https(full), rules: compilePolicy(open.policy) })).got.includes(full), 'default allow: nothing to hide')
})

t.test('failures are SERVFAIL', async (t) => {
  const cut = addressReply('198.51.100.1').subarray(0, -1)
  for (const { why, play: input, want } of [
    { why: 'no upstream', play: { reply: null }, want: 'no-upstream' },
    { why: 'upstream says SERVFAIL', play: { reply: replyTo({ flags: replyFlags | 2 }) }, want: 'upstream-failed' },
    { why: 'or REFUSED', play: { reply: replyTo({ flags: replyFlags | 5 }) }, want: 'upstream-failed' },
    { why: 'a header that says it could not be read', play: { reply: Buffer.from([0, 0, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0]) }, want: 'upstream-failed' },
    { why: 'garbage', play: { reply: cut }, want: 'bad-answer' },
    { why: 'the kernel did not confirm', play: { reply: addressReply('198.51.100.1'), opened: ['failed' as const] }, want: 'kernel-failed' },
    { why: 'a policy that changes all the time', play: { reply: addressReply('198.51.100.1'), opened: ['stale' as const] }, want: 'policy-unsettled' },
  ]) {
    const { got, result } = await play({ query: { id: 99 }, ...input })
    t.equal(rcodeOf(got), 2, why)
    t.equal(got.readUInt16BE(0), 99)
    t.equal(result, want)
  }
})

t.test('a policy that changes while upstream is asked', async (t) => {
  const stricter = await play({ reply: addressReply('198.51.100.1'), meanwhile: (switchTo) => switchTo(rulesOf(['allow', '*.other'])) })
  t.equal(rcodeOf(stricter.got), 3, 'judged again, by the new one')
  t.same(stricter.opened, [])
  const other = await play({ reply: addressReply('198.51.100.1'), meanwhile: (switchTo) => switchTo(rulesOf(['allow', 'a.example'])) })
  t.equal(other.asked, 1, 'but not asked again')
  t.equal(other.result, 'answered')
  const late = await play({ reply: addressReply('198.51.100.1'), opened: ['stale', 'open'] })
  t.equal(late.opened.length, 2)
  t.equal(late.result, 'answered')
})

t.test('a truncated answer tells no address, wherever it was cut', async (t) => {
  const reply = addressReply('198.51.100.1')
  reply[2] = 0x83
  for (const cut of [0, 1, 4, 10, 15]) {
    const { got, opened, result } = await play({ reply: reply.subarray(0, reply.length - cut) })
    t.same(opened, [])
    t.equal(answerCount(got), 0)
    t.equal((got[2] as number) & 2, 2, `${cut} bytes missing`)
    t.equal(result, 'answered')
  }
})

t.test('reverse zones smaller than a network (RFC 2317)', async (t) => {
  const name = '4.113.0.203.in-addr.arpa'
  const alias = ['4', '0/25', '113', '0', '203', 'in-addr', 'arpa']
  const reply = message({ flags: replyFlags, name, type: 12, answers: [{ name: toQuestion, type: types.CNAME, data: Buffer.concat(alias.map((label) => Buffer.concat([Buffer.of(label.length), Buffer.from(label)])).concat(Buffer.of(0))) }, { name: alias, type: 12, data: Buffer.from('\u0004host\u0007example\0', 'latin1') }] })
  const { got, result } = await play({ rules: rulesOf(['allow', '*.in-addr.arpa']), query: { name, type: 12 }, reply })
  t.equal(result, 'answered')
  t.same(got.subarray(2), reply.subarray(2))
})

t.test('what cannot be told whole is not told to be missing', async (t) => {
  const https = record({ name: toQuestion, type: types.HTTPS, data: Buffer.from([0, 1, 0]) })
  const mail = { name: toQuestion, type: types.MX, data: Buffer.from('\0\n\u0004mail\u0007example\0', 'latin1') }
  const rows: [why: string, type: number, text: MessageText, want: number, records: number][] = [
    ['a mail exchanger', types.MX, { answers: [mail] }, 0, 1],
    ['beside an HTTPS record', types.MX, { answers: [mail], additional: [https] }, 2, 0],
    ["beside somebody else's address", types.TXT, { answers: [{ name: toQuestion, type: types.TXT, data: Buffer.from('\u0001x') }, { name: 'other.example', type: types.A, data: '198.51.100.9' }] }, 2, 0],
    ['all there is, one of it private', 255, { answers: [{ name: toQuestion, type: types.A, data: '10.0.0.1' }, { name: toQuestion, type: types.A, data: '198.51.100.1' }, mail] }, 0, 1],
    ['no addresses but private ones', types.A, { answers: [{ name: toQuestion, type: types.A, data: '10.0.0.1' }] }, 0, 0],
    ['an alias beside an HTTPS record', types.CNAME, { answers: [{ name: toQuestion, type: types.CNAME, data: 'b.example' }], additional: [https] }, 2, 0],
    ['a name that does not exist', types.MX, { flags: replyFlags | 3, additional: [https] }, 3, 0],
  ]
  for (const [why, type, text, want, records] of rows) {
    const { got } = await play({ query: { type }, reply: replyTo({ type, ...text }) })
    t.same([rcodeOf(got), answerCount(got)], [want, records], why)
  }
})

t.test('a reply that would be longer than a message can be is none', async (t) => {
  // Owned by the root, a record of the answer is a byte shorter than one of ours.
  const answers = (count: number): NonNullable<MessageText['answers']> => [{ name: toQuestion, type: types.CNAME, data: '' }, { name: '', type: types.A, data: '10.0.0.1' }, ...Array.from({ length: count }, () => ({ name: '', type: types.A, data: '198.51.100.9' }))]
  const rules = rulesOf(['allow', '*.example'])
  const fits = await play({ rules, transport: 'tcp', reply: message({ flags: replyFlags, answers: answers(4000) }) })
  t.equal(answerCount(fits.got), 4000, 'what fits is told, without the refused one')
  const { got, result } = await play({ rules, transport: 'tcp', reply: message({ flags: replyFlags, answers: answers(4360) }) })
  t.same([rcodeOf(got), result], [2, 'bad-answer'])
})
