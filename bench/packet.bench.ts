/** Reading a question and an answer, the two packets of every forwarded query, and one that lies about its length. */
import { readAnswer, readQuestion, type Question } from '../egress-sidecar/packet.ts'
import type { Micro } from './micro.ts'

const query = question('registry.some-host.example', 1)
const asked = readQuestion(query) as Question
const short = answer(query, asked.end, 1)
const long = answer(query, asked.end, 20)
const liar = Buffer.from(query)
liar.writeUInt16BE(0x8180, 2)
liar.writeUInt16BE(65_535, 6)

export const bench: Micro = {
  title: 'DNS packets',
  cases: {
    readQuestion: () => readQuestion(query),
    'readAnswer, 1 address': () => readAnswer(short, asked),
    'readAnswer, 20 addresses': () => readAnswer(long, asked),
    'readAnswer, claims 65,535 records and has none': () => readAnswer(liar, asked),
  },
}

function question(name: string, type: number): Buffer {
  const labels = name.split('.').map((label) => Buffer.concat([Buffer.from([label.length]), Buffer.from(label)]))
  return Buffer.concat([Buffer.from([0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]), ...labels, Buffer.from([0, 0, type, 0, 1])])
}

function answer(query: Buffer, end: number, count: number): Buffer {
  const head = Buffer.from(query.subarray(0, end))
  head.writeUInt16BE(0x8180, 2)
  head.writeUInt16BE(count, 6)
  const records = Array.from({ length: count }, (_, index) => Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4, 198, 18, 0, index + 1]))
  return Buffer.concat([head, ...records])
}
