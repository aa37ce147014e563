/** Datagrams that are lost and upstreams that are slow: what comes in the client's time is used. */
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { askOnce } from '../../egress-sidecar/question.ts'
import type { Upstream } from '../../egress-sidecar/ruleset.ts'
import { replyFlags } from './message.ts'
import { answer, end, good, query, resolverOf, upstream, type Reply } from './played-upstream.ts'

t.test('a datagram that is lost is sent once more, the same: an answer to either counts', async (t) => {
  const got: Buffer[] = []
  const loses = await upstream(t, (asked, send) => {
    if (got.push(asked) === 2) send(answer(asked))
  })
  t.equal((await askOnce(await resolverOf(t, [loses], 5000), query(), end, 'udp'))?.readUInt16BE(6), 1, 'a lone upstream, before its client gives up')
  t.same(got[0], got[1], 'a forger has one id and one spelling to guess, as before')

  // Only the first is answered, when the second is there.
  let first: Buffer | null = null
  const slow = await upstream(t, (asked, send) => (first === null ? void (first = asked) : send(answer(first))))
  t.equal((await askOnce(await resolverOf(t, [slow], 5000), query(), end, 'udp'))?.readUInt16BE(6), 1, 'the answer to the first comes late')
  t.equal(slow.asked, 2)

  const silent = await upstream(t, () => undefined)
  const last = await upstream(t, (asked, send) => void (last.asked === 2 && send(answer(asked))))
  t.equal((await askOnce(await resolverOf(t, [silent, last], 5000), query(), end, 'udp'))?.readUInt16BE(6), 1, 'the last of several')
  t.same([silent.asked, last.asked], [1, 2])
})

t.test('an upstream that is slow, beside others that are no better: its answer is as good when it comes', async (t) => {
  const sent: Promise<void>[] = []
  const late = (ms: number, address: string): Reply => (asked, send) => void sent.push(delay(ms).then(() => send(answer(asked, address))))
  const rows: [why: string, upstreams: (Upstream & { asked?: number })[], want: string][] = [
    ['the second is dead', [await upstream(t, late(1800, '198.51.100.7')), { address: '127.0.0.1', port: 1 }], '198.51.100.7'],
    ['the second is silent', [await upstream(t, late(1800, '198.51.100.7')), await upstream(t, () => undefined)], '198.51.100.7'],
    ['all are as slow: the first one\'s', [await upstream(t, late(3000, '198.51.100.7')), await upstream(t, late(3000, '198.51.100.8')), await upstream(t, late(3000, '198.51.100.9'))], '198.51.100.7'],
    ['the second refuses', [await upstream(t, late(1800, '198.51.100.7')), await upstream(t, (asked, send) => send(answer(asked, '198.51.100.1', replyFlags | 5)))], '198.51.100.7'],
    ['the second is faster', [await upstream(t, late(1800, '198.51.100.7')), await upstream(t, late(100, '198.51.100.8'))], '198.51.100.8'],
  ]
  const answers = new Map(rows.map(([why]) => [why, 0]))
  await Promise.all(rows.map(async ([why, upstreams, want]) => {
    const resolver = await resolverOf(t, upstreams, 5000)
    const reply = await new Promise<Buffer | null>((resolve) => resolver.ask(query(), end, 'udp', (got) => {
      answers.set(why, answers.get(why)! + 1)
      resolve(got)
    }))
    t.ok(reply?.includes(Buffer.from(want.split('.').map(Number))), why)
    t.ok(reply?.subarray(12, end).equals(query().subarray(12)), `${why}: in the case it was asked in`)
  }))
  await Promise.all(sent)
  t.ok(await askOnce(await resolverOf(t, [await upstream(t, good)]), query(), end, 'udp'), 'and what was sent before this has come')
  for (const [why, count] of answers) t.equal(count, 1, `${why}: the others' answers are nobody's`)
})
