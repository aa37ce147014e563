/** Renew-on-access: who is reported, how often, and what happens when nobody listens. */
import t from 'tap'
import type { Renewals as Report } from '#policies/wire.ts'
import { postRenewals } from '../../gateway/providers/renewal-post.ts'
import { Renewals } from '../../gateway/renewals.ts'
import { ask, entry, eventually, get, RawClient, startGateway, startHttp, statusOf } from './support.ts'

const wants = entry({ id: 'wants', renewOnAccess: true })
const ids = (report: Report | undefined): string => (report?.sandboxes ?? []).map(({ id }) => id).join()

t.test('at most one report per sandbox and interval, and no use is lost', async (t) => {
  const reports: Report[] = []
  const said: string[] = []
  let fails = ''
  const renewals = new Renewals({ interval: 60_000, onState: (problem) => void said.push(problem), send: async (report) => {
    if (fails !== '') throw new Error(fails)
    reports.push(report)
  } })
  const start = performance.now()
  const flush = async (after: number): Promise<string[]> => {
    reports.length = 0
    renewals.flush(start + after)
    await new Promise((resolve) => setImmediate(resolve))
    return reports.map(ids)
  }
  t.same(await flush(0), [], 'nothing was used')
  renewals.used(entry({ id: 'does not' }))
  t.same(await flush(0), [], 'a sandbox that did not ask for it is nobody’s business')
  renewals.used(wants)
  renewals.used(wants)
  t.same(await flush(0), ['wants'], 'the first use at once')
  t.same(await flush(1000), [], 'once')
  renewals.used(wants)
  renewals.used(entry({ id: 'other', renewOnAccess: true }))
  t.same(await flush(30_000), ['other'], 'not before the interval is over')
  t.same(await flush(61_000), ['wants'], 'but then: the use in between is not lost')
  t.same(await flush(122_000), [], 'without a use there is nothing to say')

  fails = 'the server is away'
  renewals.used(wants)
  t.same(await flush(200_000), [])
  fails = ''
  t.same(await flush(201_000), [], 'not again at once')
  t.same(await flush(206_000), ['wants'], 'again after a pause')
  t.same(said, ['the server is away', ''], 'said once')

  for (let n = 0; n < 1500; n++) renewals.used(entry({ id: `s${n}`, renewOnAccess: true }))
  await flush(300_000)
  t.equal(reports[0]?.sandboxes.length, 1000, 'a report is bounded')
  await flush(300_100)
  t.equal(reports[0]?.sandboxes.length, 500, 'the rest follows')
  renewals.used(entry({ id: 'last', renewOnAccess: true }))
  reports.length = 0
  await renewals.close(start + 300_200)
  t.same(reports.map(ids), ['last'], 'what is due is said before the end')
})

t.test('before the end everything due is reported, however many reports that takes', async (t) => {
  for (const [why, fails, wanted] of [['all of them', false, [1000, 1000, 500]], ['a server that is away is asked once', true, [1000]]] as const) {
    const sizes: number[] = []
    const renewals = new Renewals({ interval: 60_000, onState: () => undefined, send: async ({ sandboxes }) => {
      sizes.push(sandboxes.length)
      if (fails) throw new Error('away')
    } })
    for (let n = 0; n < 2500; n++) renewals.used(entry({ id: `s${n}`, renewOnAccess: true }))
    await renewals.close(performance.now())
    t.same(sizes, wanted, why)
  }
})

t.test('through the gateway: requests that are let in, and what stays open', async (t) => {
  await using upstream = await startHttp((request, response) => {
    if (request.url !== '/stream') return void response.end('hello')
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write('data: 1\n\n')
  })
  const reports: Report[] = []
  const routes = ['quick', 'stream', 'secured', 'silent'].map((id) => ({ id, renewOnAccess: id !== 'silent', ...(id === 'secured' ? { secureAccessToken: 'token' } : {}) }))
  await using gateway = await startGateway(routes, { mode: 'uri', renewInterval: 1 }, async (report) => void reports.push(report))
  const seen = (id: string): number => reports.filter((report) => report.sandboxes.some((sandbox) => sandbox.id === id)).length

  for (const id of ['quick', 'silent']) t.equal(statusOf(await ask(gateway.port, get(`/${id}/${upstream.port}/`))), 200)
  t.equal(statusOf(await ask(gateway.port, get(`/secured/${upstream.port}/`))), 401)
  const open = new RawClient(gateway.port).send(get(`/stream/${upstream.port}/stream`))
  t.teardown(() => open.close())
  await open.until(({ received }) => received.includes('data: 1'))
  await eventually(() => seen('stream') >= 2, 'a stream is a use as long as it is open')
  t.equal(seen('quick'), 1, 'a request is one use')
  t.equal(seen('silent'), 0, 'not asked for')
  t.equal(seen('secured'), 0, 'a refused request is no use')
  const [{ observedAt } = { observedAt: '' }] = reports[0]!.sandboxes
  t.ok(Math.abs(Date.parse(observedAt) - Date.now()) < 10_000, observedAt)
  open.close()
  await new Promise((resolve) => open.socket.once('close', resolve))
  await eventually(() => [...gateway.gateway.table.inUse()].length === 0, 'nothing is in use')
})

t.test('on the wire', async (t) => {
  let status = 204
  const seen: unknown[] = []
  await using server = await startHttp((request, response) => {
    let body = ''
    request.setEncoding('utf8').on('data', (text: string) => (body += text)).on('end', () => {
      seen.push([request.method, request.url, request.headers.authorization, JSON.parse(body)])
      response.writeHead(status).end()
    })
  })
  const report = { sandboxes: [{ id: 'a', observedAt: '2026-01-01T00:00:00.000Z' }] }
  await postRenewals(`http://127.0.0.1:${server.port}/below/`, 'token', report)
  t.same(seen, [['POST', '/below/internal/v1/renewals', 'Bearer token', report]])
  status = 401
  await t.rejects(postRenewals(`http://127.0.0.1:${server.port}`, 'token', report), { message: 'refused with status 401' })
})
