/** The webhook: what is sent, what is tried again, what is dropped; and the lookups of its name. */
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { getCACertificates, setDefaultCACertificates } from 'node:tls'
import t, { type Test } from 'tap'
import { createControlPlace } from '../../egress-sidecar/control.ts'
import { createWebhook, defaultAttemptMs } from '../../egress-sidecar/webhook.ts'
import { makeCertificate } from '../support/certificate.ts'
import { fakeNft } from './fake-nft.ts'
import { message, replyFlags, toQuestion, types } from './message.ts'

type Got = { readonly method: string; readonly url: string; readonly type: string; readonly authorization: string; readonly body: string }

/** A receiver that answers with these statuses one after the other, then 204; 'cut' ends the connection, 'hold' waits for `release`, 'endless' begins one. */
async function receiver(t: Test, ...answers: (number | 'cut' | 'hold' | 'endless')[]) {
  const got: Got[] = []
  const held: ServerResponse[] = []
  let heard: () => void = () => undefined
  const server = createServer(async (request: IncomingMessage, response) => {
    let body = ''
    for await (const part of request) body += String(part)
    got.push({ method: request.method ?? '', url: request.url ?? '', type: request.headers['content-type'] ?? '', authorization: request.headers.authorization ?? '', body })
    const answer = answers.shift() ?? 204
    if (answer === 'cut') request.socket.destroy()
    else if (answer === 'hold') held.push(response)
    else if (answer === 'endless') response.writeHead(200).write('x')
    else response.writeHead(answer).end()
    heard()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return {
    url: new URL(`http://user:secret@hook.example:${(server.address() as AddressInfo).port}/a?b=c`),
    got,
    release: () => held.shift()?.writeHead(200).end(),
    async until(count: number) {
      while (got.length < count) await new Promise<void>((resolve) => (heard = resolve))
    },
  }
}

async function webhookTo(t: Test, url: URL, attemptMs = defaultAttemptMs) {
  const warnings: string[] = []
  const pauses: number[] = []
  let forgotten = 0
  let warned: () => void = () => undefined
  const webhook = await createWebhook({
    url,
    sandboxId: 'box',
    place: { reach: async () => '127.0.0.1', forget: () => void forgotten++ },
    warn: (text) => {
      warnings.push(text)
      warned()
    },
    pause: async (ms) => void pauses.push(ms),
    attemptMs,
  })
  t.teardown(() => webhook.close())
  return {
    webhook, warnings, pauses,
    forgotten: () => forgotten,
    async untilWarned() {
      while (warnings.length === 0) await new Promise<void>((resolve) => (warned = resolve))
    },
  }
}

t.test('one event per denied name, in order, as the original writes it', async (t) => {
  const peer = await receiver(t)
  const { webhook, warnings } = await webhookTo(t, peer.url)
  for (const name of ['a.example', 'b.example', 'a.example']) webhook.denied(name)
  await peer.until(3)
  t.match(peer.got[0], { method: 'POST', url: '/a?b=c', type: 'application/json', authorization: `Basic ${btoa('user:secret')}` })
  t.match(peer.got[0]?.body, /^\{"hostname":"a\.example","timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ","source":"opensandbox-egress","sandboxId":"box"\}$/)
  t.same(peer.got.map(({ body }) => (JSON.parse(body) as { hostname: string }).hostname), ['a.example', 'b.example', 'a.example'])
  t.same(warnings, [])
})

for (const [answers, posts, waits, warning] of [
  [[500, 503], 3, [1000, 2000], null],
  [['cut', 'cut', 'cut'], 4, [1000, 2000, 4000], null],
  [[500, 500, 500, 502], 4, [1000, 2000, 4000], /status 502$/],
  [['cut', 'cut', 'cut', 'cut'], 4, [1000, 2000, 4000], /a\.example: .+/],
  [[404], 1, [], /status 404$/],
  [[301], 1, [], /status 301$/],
] as const) {
  t.test(`answers ${answers.join(', ')}`, async (t) => {
    const peer = await receiver(t, ...answers)
    const { webhook, warnings, pauses, forgotten, untilWarned } = await webhookTo(t, peer.url)
    webhook.denied('a.example')
    await peer.until(posts)
    if (warning !== null) await untilWarned()
    t.equal(peer.got.length, posts)
    t.same(pauses, waits)
    t.equal(forgotten(), waits.length, 'the name is asked for again before every further attempt')
    if (warning === null) t.same(warnings, [])
    else t.match(warnings, [warning])
  })
}

t.test('an attempt that is never answered is given up in time', async (t) => {
  t.equal(defaultAttemptMs, 5000, 'five seconds')
  const [silent, endless] = [await receiver(t, 'hold', 200), await receiver(t, 'endless')]
  const told = [await webhookTo(t, silent.url, 500), await webhookTo(t, endless.url, 500)] as const
  const begun = performance.now()
  told[0].webhook.denied('a.example')
  told[1].webhook.denied('b.example')
  told[1].webhook.denied('c.example')
  await silent.until(1)
  await silent.until(2)
  const took = performance.now() - begun
  t.ok(took > 450 && took < 3000, `${took.toFixed(0)} ms`)
  t.same(silent.got.map(({ body }) => (JSON.parse(body) as { hostname: string }).hostname), ['a.example', 'a.example'], 'and made again')
  t.same([told[0].pauses, told[0].forgotten(), told[0].warnings], [[1000], 1, []])
  await endless.until(2)
  t.match(endless.got[1]?.body, /"c\.example"/, 'an answer that never ends holds nobody up for longer')
  t.ok(performance.now() - begun < 3000)
  t.same(told[1].warnings, [])
})

t.test('256 wait, the newest is dropped', async (t) => {
  const peer = await receiver(t, 'hold')
  const { webhook, warnings } = await webhookTo(t, peer.url)
  webhook.denied('first.example')
  await peer.until(1)
  for (let i = 0; i < 258; i++) webhook.denied(`n${i}.example`)
  t.same(warnings, ['[events] blocked-event queue full; dropping hostname n256.example', '[events] blocked-event queue full; dropping hostname n257.example'])
  peer.release()
  await peer.until(257)
  t.match(peer.got[256]?.body, /"n255\.example"/)
})

t.test('closed: what waits is lost, nothing is sent any more', async (t) => {
  const peer = await receiver(t, 'hold')
  const { webhook, warnings } = await webhookTo(t, peer.url)
  webhook.denied('a.example')
  webhook.denied('b.example')
  await peer.until(1)
  webhook.close()
  webhook.denied('c.example')
  await new Promise(setImmediate)
  t.equal(peer.got.length, 1)
  t.same(warnings, [])
})

t.test('over https: told to whoever proves the name, and to nobody else', async (t) => {
  const [trusted, unknown, other, over] = [makeCertificate(['hook.example']), makeCertificate(['hook.example']), makeCertificate(['other.example']), makeCertificate(['hook.example'], Date.now() - 86_400_000)]
  const before = getCACertificates('default')
  setDefaultCACertificates([trusted, other, over].map(({ cert }) => cert))
  t.teardown(() => setDefaultCACertificates(before))
  const got: string[] = []
  let told: () => void = () => undefined
  const server = createTlsServer(unknown, async (request, response) => {
    for await (const part of request) got.push((JSON.parse(String(part)) as { hostname: string }).hostname)
    response.writeHead(204).end()
    told()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  const { webhook, warnings, pauses, untilWarned } = await webhookTo(t, new URL(`https://hook.example:${(server.address() as AddressInfo).port}/`))
  for (const [why, certificate, warning] of [
    ['an authority that nobody trusts', unknown, /unknown\.example: (self.signed certificate|unable to verify)/i],
    ['another name', other, /name\.example: .*does not match certificate/],
    ['yesterday', over, /over\.example: certificate has expired/],
  ] as const) {
    server.setSecureContext(certificate)
    server.closeAllConnections()
    warnings.length = pauses.length = 0
    webhook.denied(`${certificate === unknown ? 'unknown' : certificate === other ? 'name' : 'over'}.example`)
    await untilWarned()
    t.match(warnings, [warning], why)
    t.same([pauses, got], [[1000, 2000, 4000], []], `${why}: tried again like any failure, told nothing`)
  }
  server.setSecureContext(trusted)
  const heard = new Promise<void>((resolve) => (told = resolve))
  webhook.denied('last.example')
  await heard
  t.same(got, ['last.example'], 'refusals stop nothing: the next event is delivered')
})

function placeOf(host: string, answers: readonly { type: number; data: string; ttl: number }[], ipv6 = true) {
  const nft = fakeNft()
  const asked: number[] = []
  let time = 0
  const place = createControlPlace({
    host, port: 8443, ipv6, nft, now: () => time,
    resolver: {
      ask: (query, end, _transport, done) => {
        const type = query.readUInt16BE(end - 4)
        asked.push(type)
        const records = answers.filter((record) => record.type === type).slice(-1)
        done(message({ id: query.readUInt16BE(0), flags: replyFlags, name: host, type, answers: records.map((record) => ({ name: toQuestion, ...record })) }))
      },
    },
  })
  return { place, nft, asked, pass: (ms: number) => void (time += ms) }
}

t.test('a place of our own: asked for over our sockets, opened, remembered', async (t) => {
  const records = [{ type: types.A, data: '198.51.100.80', ttl: 60 }]
  const { place, nft, asked, pass } = placeOf('hook.example', records)
  t.equal(await place.reach(), '198.51.100.80')
  t.match(nft.transactions, [/flush set inet opensandbox control_v4; .*add element inet opensandbox control_v4 \{ 198\.51\.100\.80 \. tcp \. 8443 \}$/])
  pass(59_000)
  await place.reach()
  t.equal(asked.length, 1, 'its TTL')
  pass(2000)
  await place.reach()
  t.same([asked.length, nft.transactions.length], [2, 1], 'the same address: nothing to open')
  records.push({ type: types.A, data: '198.51.100.81', ttl: 0 })
  place.forget()
  t.equal(await place.reach(), '198.51.100.81')
  t.equal(nft.transactions.length, 2, 'another one takes its place')
  await place.reach()
  t.equal(asked.length, 3, 'not asked for every event even with TTL 0')
})

t.test('a place of our own: addresses and failures', async (t) => {
  const literal = placeOf('198.51.100.80', [])
  t.same([await literal.place.reach(), literal.asked, literal.nft.transactions.length], ['198.51.100.80', [], 1])
  const six = placeOf('six.example', [{ type: types.AAAA, data: '2001:db8::80', ttl: 60 }])
  t.same([await six.place.reach(), six.asked], ['2001:db8::80', [types.A, types.AAAA]])
  await t.rejects(placeOf('six.example', [{ type: types.AAAA, data: '2001:db8::80', ttl: 60 }], false).place.reach(), /has no address/)
  await t.rejects(placeOf('2001:db8::80', [], false).place.reach(), /has no address/, 'without IPv6 not even as a literal: nobody wipes marks there')
})

t.test('an answer that never ends costs the next event nothing', async (t) => {
  const peer = await receiver(t, 'endless')
  const { webhook, pauses } = await webhookTo(t, peer.url, 500)
  for (const name of ['a.example', 'b.example', 'c.example']) webhook.denied(name)
  await peer.until(3)
  t.same(peer.got.map(({ body }) => (JSON.parse(body) as { hostname: string }).hostname), ['a.example', 'b.example', 'c.example'])
  t.same(pauses, [])
})
