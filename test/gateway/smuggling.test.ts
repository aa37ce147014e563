/**
 * Every request of the corpus is sent as raw bytes. Behind the gateway listens a server that keeps the bytes it gets and reads them with a
 * parser of its own, stricter than any real one: it must find exactly the requests that the corpus announces, or none. After each of them
 * another client asks for something: that must be all that follows, and the answer must be its own.
 */
import { readFileSync } from 'node:fs'
import t, { type Test } from 'tap'
import { ask, eventually, RawClient, startGateway } from './support.ts'
import { startWitness, echo, type Witness } from './smuggling/witness.ts'
import { readAnswers, readRequests, type SeenRequest } from './strict-parser.ts'

type Wanted = { method: string; target: string; body: string; /** Fields behind the body, lower case; none when absent. */ trailers?: [string, string][] }
type Case = Partial<Wanted> & {
  name: string
  why: string
  raw: string
  /** refused: nothing reaches the sandbox; incomplete: at most the named request does, and a broken-off one; forwarded: exactly these do. */
  expect: 'refused' | 'incomplete' | 'forwarded'
  /** Status of a refusal; 0: the client gives up on it, and may get a refusal or nothing. */
  status?: number
  /** Further requests behind the first. */
  then?: Wanted[]
}

const corpus = JSON.parse(readFileSync(new URL('./smuggling/corpus.json', import.meta.url), 'utf8')) as Case[]

t.test('the corpus is large enough and its names are unique', async (t) => {
  t.ok(corpus.length >= 150, `${corpus.length} requests`)
  t.equal(new Set(corpus.map(({ name }) => name)).size, corpus.length)
})

const hosted = /[\r\n]Host: a-\{port\}\.gw\.test(?=[\r\n])/
const firstPath = /^((?:\r\n)?\S*[ \t\v]+)(?=\/)/
const laterPaths = /(?<=[A-Z] )(\/\S*) HTTP\/1\.1\r\nHost: a-\{port\}\.gw\.test/g

/** The same request for URI mode; null when it is about something else than a path on a sandbox that the Host names. */
function inUriMode(one: Case): Case | null {
  if (!hosted.test(one.raw) || !firstPath.test(one.raw) || /\r\nOpenSandbox-Ingress-To:/.test(one.raw)) return null
  const raw = one.raw
    .replace(firstPath, '$1/a/{port}')
    .replace(laterPaths, (all, path: string) => (path.startsWith('/a/{port}/') ? all : `/a/{port}${all}`))
    .replaceAll('a-{port}.gw.test', 'gw.test')
  return { ...one, raw }
}
const uriCorpus = corpus.map(inUriMode).filter((one) => one !== null)

t.test('most of the corpus can be said in URI mode', async (t) => {
  t.ok(uriCorpus.length >= 150, `${uriCorpus.length} requests`)
  t.notOk(uriCorpus.some(({ raw }) => raw.includes('a-{port}')), 'nothing of them names a sandbox by Host')
  t.same(uriCorpus.find(({ name }) => name === 'pipelined')?.raw, 'GET /a/{port}/1 HTTP/1.1\r\nHost: gw.test\r\n\r\nGET /a/{port}/2 HTTP/1.1\r\nHost: gw.test\r\n\r\n')
})

type Door = { cases: Case[]; mode: 'header' | 'uri'; keeps: boolean }
const doors: [what: string, door: Door][] = [
  ['each connection of the sandbox carries one request', { cases: corpus, mode: 'header', keeps: false }],
  ['the sandbox keeps its connections', { cases: corpus, mode: 'header', keeps: true }],
  ['the path names the sandbox, which keeps its connections', { cases: uriCorpus, mode: 'uri', keeps: true }],
]

for (const [what, { cases, mode, keeps }] of doors) {
  t.test(`every request of the corpus has the outcome it announces: ${what}`, async (t) => {
    await using witness = await startWitness((request) => (keeps ? echo(request) : echo(request, 'connection: close')))
    await using gateway = await startGateway([{ id: 'a' }], { mode, authFailuresPerMinute: 0 })
    const get = (target: string): string =>
      `GET ${mode === 'uri' ? `/a/${witness.port}${target} HTTP/1.1\r\nHost: gw.test` : `${target} HTTP/1.1\r\nHost: a-${witness.port}.gw.test`}\r\nConnection: close\r\n\r\n`
    let whole = 0
    let broken = 0
    // The first canary opens a connection, so that what must not arrive finds one that stands.
    t.equal(bodyFor(await ask(gateway.port, get('/canary/first'))), 'GET /canary/first')
    whole += witness.take().length
    for (const [index, one] of cases.entries()) {
      const own = `/own/${index}`
      const canary = `/canary/${index}`
      const kept = await play(t, gateway.port, { ...one, raw: one.raw.replaceAll('{port}', String(witness.port)) }, own, get(own))
      t.equal(bodyFor(await ask(gateway.port, get(canary))), `GET ${canary}`, `${one.name}: another client gets its own answer`)
      const seen = witness.take()
      whole += seen.length
      broken += await judge(t, witness, one, seen, [...(kept ? [own] : []), canary])
    }
    compareStreams(t, witness, whole, broken)
    if (keeps) t.ok(witness.connections.length < cases.length / 4, `the canaries met connections that had been used: ${witness.connections.length} in all`)
    else t.equal(witness.connections.filter(({ read }) => read > 0).length, whole)
  })
}

/** The body of a single whole answer with status 200. */
function bodyFor(answer: string): string {
  const { complete, problems, rest } = readAnswers(answer, ['GET'])
  const [first, ...others] = complete
  return first?.status === 200 && others.length + problems.length === 0 && rest === '' ? first.body : answer
}

/**
 * Sends the bytes, and waits for all answers and for the end of the connection. One that may be kept is asked once more instead: answers keep
 * their order, so whatever else was read from it would have been answered before.
 * @returns true: it was asked once more
 */
async function play(t: Test, port: number, { name, why, raw, expect, status, method, target, then = [] }: Case, own: string, ownRequest: string): Promise<boolean> {
  const about = `${name}: ${why}`
  const wanted = expect === 'forwarded' ? [{ method: method as string, target: target as string }, ...then] : []
  const methods = wanted.map(({ method }) => method)
  const client = new RawClient(port).send(raw)
  const over = (): boolean => client.ended || client.closed
  if (status === 0) client.socket.end()
  try {
    await client.until(() => {
      if (over()) return true
      const { complete } = readAnswers(client.received, methods)
      return complete.length >= Math.max(wanted.length, 1) && complete.at(-1)?.closes === false
    })
    const kept = !over()
    if (kept) await client.send(ownRequest).untilClosed()
    const { complete, problems, rest } = readAnswers(client.received, methods)
    t.same([problems, rest], [[], ''], `${about} (the client got whole answers)`)
    if (kept) t.equal(complete.pop()?.body, `GET ${own}`, `${about} (and its next request its own)`)
    const statuses = complete.map(({ status }) => status)
    if (expect === 'forwarded') t.same(complete.map(({ status, body }) => [status, body]), wanted.map(({ method, target }) => [200, method === 'HEAD' ? '' : `${method} ${target}`]), `${about} (its answers)`)
    else if (expect === 'refused' && status !== 0) t.same(statuses, [status ?? 400], about)
    else t.ok(statuses.length === 0 || (statuses.length === 1 && (statuses[0] as number) >= 400), `${about} (no success): ${client.received.slice(0, 40)}`)
    t.ok(complete.flatMap(({ interim }) => interim).length <= (expect === 'forwarded' && raw.includes('\r\nExpect: ') ? 1 : 0), `${about} (a body is asked for once, and only for the sandbox)`)
    return kept
  } catch (error) {
    throw new Error(about, { cause: error })
  } finally {
    client.close()
  }
}

/**
 * What arrived is what the corpus announces and, behind it, what was asked on purpose.
 * @returns how many requests were broken off
 */
async function judge(t: Test, witness: Witness, { name, why, expect, method, target, body, trailers, then = [] }: Case, seen: SeenRequest[], asked: string[]): Promise<number> {
  const about = `${name}: ${why}`
  const theirs = seen.slice(0, -asked.length)
  t.same(witness.problems.splice(0), [], `${about} (what reached the sandbox is well-formed)`)
  t.same(seen.slice(-asked.length).map(asWanted), asked.map((target) => asWanted({ method: 'GET', target, body: '' })), `${about} (then what was asked after it)`)
  const announced = target === undefined ? [] : [{ method: method as string, target, body: body as string, ...(trailers === undefined ? {} : { trailers }) }, ...then]
  // Two requests on two connections may overtake each other.
  const byTarget = (a: Wanted, b: Wanted): number => (a.target < b.target ? -1 : 1)
  if (expect !== 'incomplete' || theirs.length > 0) t.same(theirs.map(asWanted).sort(byTarget), announced.map(asWanted).sort(byTarget), `${about} (what reached the sandbox)`)
  for (const { headers } of theirs) {
    t.notMatch(headers.map(([field]) => field).join(), /opensandbox-ingress-to|expect|upgrade|proxy-|keep-alive|http2-settings|x-secret/, `${about} (clean fields)`)
  }
  const loose = witness.takeLoose()
  t.ok(loose.length <= (expect === 'incomplete' ? 1 : 0), `${about} (no part of another request)`)
  await eventually(() => loose.every(({ open }) => !open), `${about} (the end of what was broken off)`)
  return loose.length
}

function asWanted({ method, target, body, trailers = [] }: Wanted): Wanted {
  return { method, target, body, trailers }
}

/** All that each connection carried, read again as one text: whole requests, and behind them at most one that was broken off. */
function compareStreams(t: Test, witness: Witness, whole: number, broken: number): void {
  const streams = witness.connections.map(({ bytes }) => readRequests(bytes))
  t.same(streams.flatMap(({ problems }) => problems), [], 'every byte of every connection is part of a well-formed request')
  t.equal(streams.reduce((sum, { complete }) => sum + complete.length, 0), whole, 'no request was counted twice or came late')
  t.equal(streams.filter(({ rest }) => rest !== '').length, broken, 'and no part of one')
}
