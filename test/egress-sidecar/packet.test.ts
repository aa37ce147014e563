/** The DNS reader: what it takes, what it refuses, and that neither costs much. */
import t from 'tap'
import { echoOf, mixCase } from '../../egress-sidecar/echo.ts'
import { capTtls, emptyReply, headerReply, rcodes, readAnswer, readQuestion, truncatedReply, type Question } from '../../egress-sidecar/packet.ts'
import { message, opt, replyFlags, toQuestion, types, wireName, type MessageText, type NameText } from './message.ts'

function questionOf(query: Buffer): Question {
  const question = readQuestion(query)
  if (question === null || typeof question === 'number') throw new Error(`no question: ${question}`)
  return question
}

t.test('names of questions', async (t) => {
  const rows: { why: string; name: NameText; want: string | null }[] = [
    { why: 'plain', name: 'www.example.com', want: 'www.example.com' },
    { why: 'case is folded', name: 'WwW.ExAmple.COM', want: 'www.example.com' },
    { why: 'digits, hyphen, underscore', name: '_dns-sd.4u.example', want: '_dns-sd.4u.example' },
    { why: 'the root', name: '', want: '' },
    { why: 'a dot inside a label reads as another name after decoding', name: ['x.allowed', 'example'], want: null },
    { why: 'NUL', name: ['a\0b', 'example'], want: null },
    { why: 'percent sign', name: ['a%2eb', 'example'], want: null },
    { why: 'backslash', name: ['a\\.b', 'example'], want: null },
    { why: 'raw UTF-8', name: ['\xc3\xa4', 'example'], want: null },
    { why: 'blank', name: ['a b', 'example'], want: null },
  ]
  for (const { why, name, want } of rows) t.equal(questionOf(message({ name })).name, want, why)
})

t.test('messages that are no question', async (t) => {
  const rows: { why: string; bytes: Buffer; want: number | null }[] = [
    { why: 'empty', bytes: Buffer.alloc(0), want: null },
    { why: 'eleven bytes', bytes: Buffer.alloc(11), want: null },
    { why: 'a reply', bytes: message({ flags: replyFlags }), want: null },
    { why: 'opcode STATUS', bytes: message({ flags: 0x1000 }), want: rcodes.notImp },
    { why: 'opcode NOTIFY', bytes: message({ flags: 0x2000 }), want: rcodes.notImp },
    { why: 'opcode IQUERY', bytes: message({ flags: 0x0800 }), want: rcodes.notImp },
    { why: 'an opcode that nobody uses', bytes: message({ flags: 0x4000 }), want: rcodes.notImp },
    { why: 'opcode UPDATE', bytes: message({ flags: 0x2800 }), want: rcodes.notImp },
    { why: 'no question', bytes: Buffer.concat([Buffer.of(0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)]), want: rcodes.formErr },
    { why: 'two questions claimed', bytes: patched(message({}), 5, 2), want: rcodes.formErr },
    { why: 'an answer in a question', bytes: patched(message({}), 7, 1), want: rcodes.formErr },
    { why: 'two authorities in a question', bytes: patched(message({}), 9, 2), want: rcodes.formErr },
    { why: '256 authorities in a question', bytes: patched(message({}), 8, 1), want: rcodes.formErr },
    { why: 'three additional records in a question', bytes: patched(message({}), 11, 3), want: rcodes.formErr },
    { why: '256 additional records in a question', bytes: patched(message({}), 10, 1), want: rcodes.formErr },
    { why: '65,535 records claimed', bytes: Buffer.of(0, 1, 1, 0, 255, 255, 255, 255, 255, 255, 255, 255), want: rcodes.formErr },
    { why: 'name runs out of the message', bytes: message({}).subarray(0, 18), want: rcodes.formErr },
    { why: 'type is missing', bytes: message({}).subarray(0, -3), want: rcodes.formErr },
    { why: 'compression in a question', bytes: Buffer.concat([message({}).subarray(0, 12), Buffer.of(0xc0, 12, 0, 1, 0, 1)]), want: rcodes.formErr },
    { why: 'name over 255 bytes', bytes: message({ name: Array<string>(5).fill('a'.repeat(60)) }), want: rcodes.formErr },
    { why: 'message of 513 bytes', bytes: Buffer.concat([message({}), Buffer.alloc(513 - message({}).length)]), want: rcodes.formErr },
    { why: 'message over 512 bytes', bytes: Buffer.concat([message({}), Buffer.alloc(600)]), want: rcodes.formErr },
  ]
  for (const { why, bytes, want } of rows) t.equal(readQuestion(bytes), want, why)
  for (const { why, bytes } of [
    { why: 'one authority', bytes: patched(message({}), 9, 1) },
    { why: 'two additional records, such as OPT and TSIG', bytes: patched(message({}), 11, 2) },
    { why: '512 bytes', bytes: Buffer.concat([message({}), Buffer.alloc(512 - message({}).length)]) },
    { why: 'every flag but QR and the opcode', bytes: message({ flags: 0x07ff }) },
    { why: 'a name of 255 bytes', bytes: message({ name: [...Array<string>(3).fill('a'.repeat(63)), 'a'.repeat(61)] }) },
  ]) t.type(questionOf(bytes).name, 'string', `${why}: is one`)
})

t.test('every byte inside a label: letters, digits, hyphen and underscore make a name, no other does', async (t) => {
  const harmless = new Map([...'abcdefghijklmnopqrstuvwxyz0123456789-_'].flatMap((char) => [[char, char], [char.toUpperCase(), char]]))
  t.equal(harmless.size, 26 + 26 + 10 + 2)
  const wrong: string[] = []
  for (let byte = 0; byte < 256; byte++) {
    const char = String.fromCharCode(byte)
    const folded = harmless.get(char)
    for (const [before, behind] of [['', ''], ['', 'yz'], ['x', 'z'], ['xy', '']] as const) {
      const { name } = questionOf(message({ name: [`${before}${char}${behind}`, 'example'] }))
      if (name !== (folded === undefined ? null : `${before}${folded}${behind}.example`)) wrong.push(`0x${byte.toString(16)} in "${before}?${behind}": ${name}`)
    }
  }
  t.same(wrong, [])
})

function patched(bytes: Buffer, at: number, value: number): Buffer {
  bytes[at] = value
  return bytes
}

function answerTo(text: MessageText): ReturnType<typeof readAnswer> {
  const reply = message({ flags: replyFlags, ...text })
  return readAnswer(reply, questionOf(message({ ...(text.name === undefined ? {} : { name: text.name }), ...(text.type === undefined ? {} : { type: text.type }) })))
}

t.test('addresses at the end of the chain count, others do not', async (t) => {
  const rows: { why: string; text: MessageText; want: string[]; ttl?: number; strays?: boolean }[] = [
    { why: 'one address', text: { answers: [{ name: 'a.example', type: types.A, ttl: 7, data: '198.51.100.1' }] }, want: ['198.51.100.1'], ttl: 7 },
    { why: 'owner as a pointer', text: { answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }] }, want: ['198.51.100.1'] },
    { why: 'owner in another case', text: { answers: [{ name: 'A.EXAMPLE', type: types.A, data: '198.51.100.1' }] }, want: ['198.51.100.1'] },
    { why: 'IPv6', text: { type: types.AAAA, answers: [{ name: toQuestion, type: types.AAAA, data: '2001:db8::1' }] }, want: ['2001:db8:0:0:0:0:0:1'] },
    {
      why: 'through aliases, lowest TTL of all', ttl: 3, want: ['198.51.100.3'],
      text: { answers: [{ name: toQuestion, type: types.CNAME, ttl: 300, data: 'b.example' }, { name: 'b.example', type: types.CNAME, ttl: 3, data: 'c.example' }, { name: 'c.example', type: types.A, ttl: 90, data: '198.51.100.3' }] },
    },
    { why: 'aliases in the wrong order', want: ['198.51.100.3'], text: { answers: [{ name: 'b.example', type: types.A, data: '198.51.100.3' }, { name: toQuestion, type: types.CNAME, data: 'b.example' }] } },
    { why: 'somebody else\'s address', strays: true, want: ['198.51.100.1'], text: { answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }, { name: 'other.example', type: types.A, data: '198.51.100.9' }] } },
    ...[types.A, types.AAAA, types.CNAME, types.HTTPS, types.SVCB].map((type) => ({ why: `type ${type} of another class beside it`, strays: true, want: ['198.51.100.1'], text: { answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }, { name: toQuestion, type, class: 3, data: Buffer.alloc(4) }] } })),
    { why: 'another type of another class', want: ['198.51.100.1'], text: { answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }, { name: toQuestion, type: types.TXT, class: 3, data: Buffer.alloc(4) }] } },
    { why: 'another class', strays: true, want: [], text: { answers: [{ name: toQuestion, type: types.A, class: 3, data: '198.51.100.1' }] } },
    { why: 'TTL with the top bit counts as 0', ttl: 0, want: ['198.51.100.1'], text: { answers: [{ name: toQuestion, type: types.A, ttl: 0x80000000, data: '198.51.100.1' }] } },
  ]
  for (const { why, text, want, ttl, strays = false } of rows) {
    const found = answerTo(text)
    t.same(found?.addresses.map((record) => record.address), want, why)
    t.equal(found?.strays, strays, `${why}: strays`)
    if (ttl !== undefined) t.equal(found?.ttl, ttl, `${why}: TTL`)
  }
})

t.test('malformed answers are of no use at all', async (t) => {
  const good = message({ flags: replyFlags, answers: [{ name: toQuestion, type: types.A, data: '198.51.100.1' }] })
  const question = questionOf(message({}))
  const loop = [{ name: toQuestion, type: types.CNAME, data: 'b.example' }, { name: 'b.example', type: types.CNAME, data: 'a.example' }]
  const long = Array.from({ length: 40 }, (_, i) => ({ name: i === 0 ? 'a.example' : `n${i}.example`, type: types.CNAME, data: `n${i + 1}.example` }))
  t.not(readAnswer(good, question), null, 'the pattern itself is good')
  t.equal(readAnswer(good.subarray(0, -1), question), null, 'record data runs out')
  t.equal(readAnswer(patched(Buffer.from(good), 7, 9), question), null, 'more records claimed than there are')
  t.equal(readAnswer(message({ flags: replyFlags, answers: [{ name: toQuestion, type: types.A, data: Buffer.alloc(5) }] }), question), null, 'an address of five bytes')
  t.equal(readAnswer(message({ flags: replyFlags, answers: [{ name: Buffer.of(0xc0, 0xff), type: types.A, data: '198.51.100.1' }] }), question), null, 'a pointer forwards')
  t.equal(readAnswer(message({ flags: replyFlags, answers: [{ name: toQuestion, type: types.CNAME, data: Buffer.concat([wireName('b.example'), Buffer.of(0)]) }, { name: 'b.example', type: types.A, data: '198.51.100.1' }] }), question), null, 'an alias with a byte behind its name')
  t.equal(readAnswer(message({ flags: replyFlags, answers: loop }), question), null, 'aliases in a circle')
  t.equal(readAnswer(message({ flags: replyFlags, answers: long }), question), null, 'forty aliases')
})

t.test('a name that only looks the same is another owner', async (t) => {
  const found = answerTo({ name: 'x.allowed.example', answers: [{ name: ['x.allowed', 'example'], type: types.A, data: '198.51.100.66' }] })
  t.same(found?.addresses, [])
  t.equal(found?.strays, true)
})

t.test('replies of our own', async (t) => {
  const query = message({ id: 0xbeef, flags: 0x0110, name: 'DeNied.Example', additional: [opt(1232)] })
  const end = questionOf(query).end
  const reply = emptyReply(query, end, rcodes.nxDomain)
  t.equal(reply.readUInt16BE(0), 0xbeef, 'same id')
  t.equal(reply.readUInt16BE(2), 0x8113, 'reply, RD and CD as asked, no AA, no RA, NXDOMAIN')
  t.same([4, 6, 8, 10].map((at) => reply.readUInt16BE(at)), [1, 0, 0, 0], 'the question and nothing else, no OPT')
  t.ok(reply.includes(wireName('DeNied.Example')), 'the name keeps its case')
  t.same(headerReply(Buffer.from([0, 7, 0x28, 0, 0, 9, 0, 9, 0, 9, 0, 9, 1, 2]), rcodes.notImp), Buffer.from([0, 7, 0xa8, 4, 0, 0, 0, 0, 0, 0, 0, 0]))
  t.equal(truncatedReply(query, end).readUInt16BE(2) & 0x0200, 0x0200, 'TC')
})

t.test('TTLs are only lowered', async (t) => {
  const reply = message({ flags: replyFlags, answers: [{ name: toQuestion, type: types.A, ttl: 9999, data: '198.51.100.1' }, { name: toQuestion, type: types.A, ttl: 5, data: '198.51.100.2' }] })
  capTtls(reply, readAnswer(reply, questionOf(message({})))?.ttlOffsets ?? [], 300)
  t.same(readAnswer(reply, questionOf(message({})))?.ttlOffsets.map((at) => reply.readUInt32BE(at)), [300, 5])
})

t.test('a reply must repeat the question', async (t) => {
  const query = message({ name: 'a.example', additional: [opt(1232)] })
  const end = questionOf(query).end
  const rows: { why: string; reply: Buffer; want: ReturnType<typeof echoOf> }[] = [
    { why: 'the same', reply: message({ flags: replyFlags }), want: 'exact' },
    { why: 'another case', reply: message({ flags: replyFlags, name: 'A.eXample' }), want: 'folded' },
    { why: 'another name', reply: message({ flags: replyFlags, name: 'b.example' }), want: 'none' },
    { why: 'another name, in another case before', reply: message({ flags: replyFlags, name: 'A.exampld' }), want: 'none' },
    { why: 'another type', reply: message({ flags: replyFlags, type: types.AAAA }), want: 'none' },
    { why: 'a shorter one', reply: message({ flags: replyFlags, name: 'example' }), want: 'none' },
    { why: 'not a reply', reply: message({}), want: 'none' },
    { why: 'no question at all', reply: patched(message({ flags: replyFlags }), 5, 0), want: 'none' },
  ]
  for (const { why, reply, want } of rows) t.equal(echoOf(reply, query, end), want, why)
})

t.test('the case of a question (0x20)', async (t) => {
  const mixed = (name: string | string[], mask: number, type: number = types.A): Buffer => {
    const query = message({ name, type, additional: [opt(1232)] })
    mixCase(query, questionOf(query).end, mask)
    return query
  }
  const rows: { why: string; name: string; mask: number; want: string }[] = [
    { why: 'none', name: 'aB.example', mask: 0, want: 'aB.example' },
    { why: 'all', name: 'aB.example', mask: -1, want: 'Ab.EXAMPLE' },
    { why: 'the first letter has the lowest bit', name: 'ab.example', mask: 1, want: 'Ab.example' },
    { why: 'only letters take one', name: 'a-1_z.example', mask: 2, want: 'a-1_Z.example' },
    { why: 'those behind the 32nd stay', name: 'a'.repeat(40), mask: -1, want: 'A'.repeat(32) + 'a'.repeat(8) },
    { why: 'the highest bit is one like any other', name: 'a'.repeat(33), mask: 1 << 31, want: 'a'.repeat(31) + 'Aa' },
  ]
  for (const { why, name, mask, want } of rows) {
    const query = mixed(name, mask)
    t.same(query, message({ name: want, additional: [opt(1232)] }), why)
    mixCase(query, questionOf(query).end, mask)
    t.same(query, message({ name, additional: [opt(1232)] }), `${why}, and back`)
  }
  // 97 to 122 are letters, and no type, class or length of a label may be taken for one.
  t.same(mixed('b'.repeat(63), -1, 0x6161), message({ name: 'B'.repeat(32) + 'b'.repeat(31), type: 0x6161, additional: [opt(1232)] }), 'lengths and types are left alone')
  t.same(mixed(['[{@`', 'a'], -1), message({ name: ['[{@`', 'A'], additional: [opt(1232)] }), 'neighbours of letters are none')
})

/** What `readQuestion` must say of the bytes, whatever it has read before. */
function byHand(bytes: Buffer): string {
  const labels: string[] = []
  let at = 12
  for (let length = bytes[at++]; length !== 0; length = bytes[at++]) {
    if (length === undefined || length > 63) return `${rcodes.formErr}`
    labels.push(bytes.toString('latin1', at, at + length).toLowerCase())
    at += length
  }
  if (at + 4 > bytes.length) return `${rcodes.formErr}`
  return `${labels.every((label) => /^[a-z0-9_-]+$/.test(label)) ? labels.join('.') : null} ${bytes.readUInt16BE(at)} ${bytes.readUInt16BE(at + 2)} ${at + 4}`
}

t.test('questions that differ in one byte are told apart, whichever it is', async (t) => {
  const wrong: string[] = []
  const look = (bytes: Buffer, at: number, values: Iterable<number>): void => {
    const before = bytes[at] as number
    for (const value of values) {
      bytes[at] = value
      const found = readQuestion(bytes)
      const said = found === null || typeof found === 'number' ? `${found}` : `${found.name} ${found.type} ${found.class} ${found.end}`
      if (said !== byHand(bytes)) wrong.push(`${bytes.toString('latin1', 12)}, byte ${at - 12}: ${said}`)
    }
    bytes[at] = before
  }
  const all = Array.from({ length: 256 }, (_, value) => value)
  // Of 256 questions some meet in one slot by chance. The last byte is hardly mixed in: there these names do, found by trying.
  for (const name of [...[487, 3606, 7206, 8312, 22095, 38901].map((i) => `n${i}.example`), ...['x', 'y', 'z', '0', '-'].map((char) => `n.${char.repeat(56)}`), `n.${'x'.repeat(57)}`]) {
    const bytes = message({ name })
    for (let at = 12; at < bytes.length; at++) look(bytes, at, all)
  }
  for (let i = 0; i < 10_000; i++) {
    // Five letters and a label of one, or one label of seven bytes.
    look(message({ name: [`${i}`.padStart(5, 'n'), 'a', 'b'.repeat(1 + (i % 40))] }), 12, [5, 7])
    // Two names from the same letters: the digit in the middle is 49, also as a length.
    look(message({ name: ['a', `zz1${`${i}`.padEnd(49, 'b')}`] }), 14, [52, 2])
  }
  t.same(wrong.slice(0, 3), [])
})

t.test('what is remembered of questions and addresses is never mixed up', async (t) => {
  // More than there are slots, so that most meet a newer one of their slot the second time.
  const names = Array.from({ length: 6000 }, (_, i) => `${i % 2 === 0 ? 'N' : 'n'}${i}.${i % 3 === 0 ? 'a-longer-label.' : ''}example`)
  const wrong: string[] = []
  for (let round = 0; round < 2; round++) {
    for (const [i, name] of names.entries()) {
      const type = i % 5 === 0 ? types.AAAA : types.A
      const data = `198.${18 + (i & 1)}.${(i >> 4) & 255}.${i & 255}`
      const question = questionOf(message({ name, type }))
      const found = readAnswer(message({ flags: replyFlags, name, type, answers: [{ name: toQuestion, type: types.A, data }] }), question)
      if (question.name !== name.toLowerCase() || question.type !== type || found?.addresses[0]?.address !== data) wrong.push(name)
    }
  }
  t.same(wrong, [])
  const before = questionOf(message({ name: 'again.example' }))
  t.equal(questionOf(message({ id: 7, name: 'again.example', additional: [opt(1232)] })), before, 'the same question is the same object')
  t.not(questionOf(message({ name: 'again.example', type: types.AAAA })), before)
  t.equal(questionOf(message({ name: 'Again.example' })).name, 'again.example', 'another case is another question of the same name')
})
