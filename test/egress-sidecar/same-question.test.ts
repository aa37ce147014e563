/** One question upstream at a time, however often it is asked: everybody gets an answer of their own, and nobody chooses how many ids are right. */
import t from 'tap'
import type { Done, Resolver, Transport } from '../../egress-sidecar/answer.ts'
import { askEachOnce } from '../../egress-sidecar/same-question.ts'
import { message, replyFlags } from './message.ts'

type Asked = { readonly query: Buffer; readonly transport: Transport; readonly done: Done }

function setUp(): { asked: Asked[]; told: (string | null)[]; ask: (name: string, more?: { type?: number; id?: number; transport?: Transport; tail?: Buffer }) => void } {
  const asked: Asked[] = []
  const told: (string | null)[] = []
  const upstream: Resolver = { ask: (query, _end, transport, done) => void asked.push({ query, transport, done }) }
  const resolver = askEachOnce(upstream)
  return {
    asked,
    told,
    ask(name, { type = 1, id = 7, transport = 'udp', tail = Buffer.alloc(0) } = {}) {
      const plain = message({ id, name, type })
      resolver.ask(Buffer.concat([plain, tail]), plain.length, transport, (reply) => {
        told.push(reply === null ? null : reply.toString('latin1', 12, plain.length))
        // Whoever gets it writes into it.
        reply?.fill(0xff)
      })
    },
  }
}
const written = (name: string): string => message({ name }).toString('latin1', 12)

t.test('asked by many at once', async (t) => {
  const { asked, told, ask } = setUp()
  for (let i = 0; i < 1000; i++) ask(i % 2 === 0 ? 'api.example' : 'aPi.Example', { id: i })
  t.equal(asked.length, 1, 'goes upstream once, in whatever case')
  asked[0]!.done(message({ flags: replyFlags, name: 'api.example' }))
  t.equal(told.length, 1000, 'and all are told')
  t.same([told.filter((text) => text === written('api.example')).length, told.filter((text) => text === written('aPi.Example')).length], [500, 500], 'each in its own letters, on a reply of its own')
  ask('api.example')
  t.equal(asked.length, 2, 'behind the answer it is asked anew')
  ask('API.example')
  asked[1]!.done(null)
  t.same(told.slice(-2), [null, null], 'no answer is none for all')
})

t.test('what one reply does not answer goes upstream for itself, but not without end', async (t) => {
  const { asked, told, ask } = setUp()
  ask('api.example')
  for (const more of [{ type: 28 }, { type: 65 }, { type: 97 }, { transport: 'tcp' as const }, { tail: Buffer.of(0, 0, 41) }]) ask('api.example', more)
  ask('api2.example')
  t.equal(asked.length, 7, 'another type, another name, over TCP, with other options')
  for (let i = 0; i < 100; i++) ask('api.example', { tail: Buffer.of(0, 0, 41, i) })
  t.equal(asked.length, 12, 'eight of one name and type')
  t.same(told, Array(95).fill(null), 'the others are told at once')
  for (const { query, done } of asked.splice(0)) done(Buffer.from(query))
  ask('api.example', { tail: Buffer.of(0, 0, 41, 99) })
  t.equal(asked.length, 1, 'and there is room again')
})

t.test('more that wait than a flood needs', async (t) => {
  const { asked, told, ask } = setUp()
  for (let i = 0; i < 8200; i++) ask('api.example')
  t.same([asked.length, told.length], [1, 7], 'are told at once')
  asked[0]!.done(message({ flags: replyFlags, name: 'api.example' }))
  t.equal(told.length, 8200)
})
