/** Reading a question and an answer, the two packets of every forwarded query, and one that lies about its length. */
import { readAnswer, readQuestion, type Question } from '../egress-sidecar/packet.ts'
import { dnsQuestion, dnsReply } from './dns-message.ts'
import type { Micro } from './micro.ts'

const query = dnsQuestion('registry.some-host.example', 1)
const asked = readQuestion(query) as Question
const short = dnsReply(query, 1)
const long = dnsReply(query, 20)
const liar = dnsReply(query, 0)
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
