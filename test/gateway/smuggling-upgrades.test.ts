/**
 * Requests to become a WebSocket, twisted. The sandbox reads bytes strictly: it must see one well-formed upgrade, or an ordinary request, or
 * nothing. What stands behind an upgrade is the tunnel's: it must never be read as a request, least of all when the sandbox opens no tunnel.
 */
import { readFileSync } from 'node:fs'
import t, { type Test } from 'tap'
import { ask, eventually, RawClient, startGateway } from './support.ts'
import { echo, startWitness, type Witness } from './smuggling/witness.ts'
import { readAnswers, type SeenAnswer, type SeenRequest } from './strict-parser.ts'

type Case = {
  name: string
  why: string
  raw: string
  /** upgraded: an upgrade reaches the sandbox; forwarded: `requests` do, and none is an upgrade; refused: at most `requests` do. */
  expect: 'upgraded' | 'forwarded' | 'refused'
  /** What the tunnel carries. */
  tunnel?: string
  /** Fields that reach the sandbox with the upgrade. */
  fields?: [name: string, values: string[]][]
  /** Method, target and body. */
  requests?: [string, string, string][]
  /** Status of a refusal, 400 when absent; 0: the connection ends without an answer. */
  status?: number
}

const cases = JSON.parse(readFileSync(new URL('./smuggling/upgrades.json', import.meta.url), 'utf8')) as Case[]

/** What the sandbox says to an upgrade. It keeps its connections all the same. */
const sandboxes: [what: string, status: number, answer: string][] = [
  ['opens the tunnel', 101, 'HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n'],
  ['answers an upgrade like any request', 200, 'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok'],
  ['refuses upgrades', 403, 'HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno'],
]

const valuesOf = ({ headers }: SeenRequest, name: string): string[] => headers.filter(([field]) => field === name).map(([, value]) => value)
const isUpgrade = (request: SeenRequest): boolean => valuesOf(request, 'upgrade').length > 0

for (const [what, status, answer] of sandboxes) {
  t.test(`an upgrade is one well-formed request or none: the sandbox ${what}`, async (t) => {
    await using witness = await startWitness((request) => (isUpgrade(request) ? answer : echo(request)))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'header', authFailuresPerMinute: 0 })
    const get = (target: string, connection: string): string => `GET ${target} HTTP/1.1\r\nHost: a-${witness.port}.gw.test\r\nConnection: ${connection}\r\n\r\n`
    await ask(gateway.port, get('/first', 'close'))
    witness.take()
    for (const [index, one] of cases.entries()) {
      const about = `${one.name}: ${one.why}`
      const client = new RawClient(gateway.port).send(one.raw.replaceAll('{port}', String(witness.port)))
      try {
        if (one.expect === 'upgraded') await playUpgrade(t, about, client, witness, status, (one.tunnel as string).replaceAll('{port}', String(witness.port)))
        else await playOther(t, about, client, one, get('/own', 'close'))
      } catch (error) {
        throw new Error(about, { cause: error })
      } finally {
        client.close()
      }
      // Two more on what connections there are: an ordinary request, and an upgrade.
      const canary = `/canary/${index}`
      const bodies = readAnswers(await ask(gateway.port, get(canary, 'close')), ['GET']).complete.map(({ body }) => body)
      t.same(bodies, [`GET ${canary}`], `${about} (another client gets its own answer)`)
      const last = new RawClient(gateway.port).send(get(`/upgrade/${index}`, 'Upgrade\r\nUpgrade: websocket'))
      await last.until(({ received }) => readAnswers(received, ['GET']).complete.length > 0)
      t.same(readAnswers(last.received, ['GET']).complete.map(({ status }) => status), [status], `${about} (and so does another upgrade)`)
      last.close()
      judge(t, about, witness, one, [canary, `/upgrade/${index}`])
    }
    t.same(witness.take(), [], 'nothing came late')
  })
}

/** One answer and the end, or a tunnel with every byte behind the head in it. */
async function playUpgrade(t: Test, about: string, client: RawClient, witness: Witness, status: number, tunnel: string): Promise<void> {
  if (status === 101) {
    await client.until(({ received }) => readAnswers(received, ['GET']).complete.length > 0)
    client.send('<the end>').socket.end()
    const carried = (): string => witness.connections.at(-1)?.tunnel ?? ''
    await eventually(() => carried().endsWith('<the end>'), 'the end of what the client sent')
    t.equal(carried(), `${tunnel}<the end>`, `${about} (what stood behind it came through the tunnel)`)
  }
  await client.untilClosed()
  const { complete, problems, rest } = readAnswers(client.received, ['GET'])
  t.same([complete.map(({ status, interim, closes }) => [status, interim, closes]), problems, rest], [[[status, [], status !== 101]], [], ''], `${about} (one answer)`)
}

/** Waits for the answers and for the end of the connection. One that may be kept is asked once more instead, see smuggling.test.ts. */
async function playOther(t: Test, about: string, client: RawClient, { expect, status = 400, requests = [] }: Case, ownRequest: string): Promise<void> {
  const methods = expect === 'forwarded' ? requests.map(([method]) => method) : ['GET']
  const answers = (): SeenAnswer[] => readAnswers(client.received, methods).complete
  const over = (): boolean => client.ended || client.closed
  await client.until(() => over() || (answers().length >= methods.length && answers().at(-1)?.closes === false))
  const kept = !over()
  if (kept) await client.send(ownRequest).untilClosed()
  const { problems, rest } = readAnswers(client.received, methods)
  const wanted = expect === 'forwarded' ? requests.map(([method, target]) => `200 ${method} ${target}`) : status === 0 ? [] : [`${status}`]
  const got = answers().map(({ status, body }) => (status === 200 ? `200 ${body}` : `${status}`))
  t.same([got, problems, rest], [kept ? [...wanted, '200 GET /own'] : wanted, [], ''], `${about} (its answers)`)
}

/** What arrived is what the case announces and, behind it, what was asked on purpose. */
function judge(t: Test, about: string, witness: Witness, { expect, requests = [], fields = [] }: Case, asked: string[]): void {
  const seen = witness.take().filter(({ target }) => target !== '/own')
  const theirs = seen.slice(0, -asked.length)
  t.same(witness.problems.splice(0), [], `${about} (what reached the sandbox is well-formed)`)
  t.same(witness.takeLoose().map(({ bytes, read }) => bytes.slice(read)), [], `${about} (and all of it requests)`)
  t.same(seen.slice(-asked.length).map(({ target }) => target), asked, `${about} (then what was asked after it)`)
  const texts = theirs.map(({ method, target, body }) => [method, target, body])
  if (expect === 'upgraded') {
    t.same(texts, [['GET', '/u', '']], `${about} (one upgrade)`)
    const framing = ['upgrade', 'connection', 'content-length', 'transfer-encoding', 'trailer', 'expect', 'keep-alive', 'http2-settings', 'x-secret']
    t.same(framing.map((name) => theirs.flatMap((request) => valuesOf(request, name))), [['websocket'], ['Upgrade'], [], [], [], [], [], [], []], `${about} (which says no more than that)`)
    for (const [name, values] of fields) t.same(theirs.map((request) => valuesOf(request, name)), [values], `${about} (${name})`)
    return
  }
  t.notOk(theirs.some(isUpgrade), `${about} (no upgrade)`)
  if (expect === 'forwarded' || texts.length > 0) t.same(texts.sort(), [...requests].sort(), `${about} (what reached the sandbox)`)
}

/** node:http throws away what comes in one packet behind any of these, although nobody follows them. */
const unfollowed: [why: string, line: string, protocol: string][] = [
  ['another protocol', 'GET /1 HTTP/1.1', 'h2c'],
  ['another method', 'POST /1 HTTP/1.1', 'websocket'],
]

t.test('a body is no request, even when its head was thrown away', async (t) => {
  for (const [why, line, protocol] of unfollowed) {
    await using witness = await startWitness((request) => echo(request))
    await using gateway = await startGateway([{ id: 'a' }], { mode: 'header' })
    const host = `Host: a-${witness.port}.gw.test\r\n`
    const inner = `GET /smuggled HTTP/1.1\r\n${host}\r\n`
    const client = new RawClient(gateway.port)
    client.send(`${line}\r\n${host}Connection: Upgrade\r\nUpgrade: ${protocol}\r\n\r\nPOST /2 HTTP/1.1\r\n${host}Content-Length: ${inner.length}\r\n\r\n`)
    await client.until(({ received }) => readAnswers(received, []).complete.length > 0)
    client.send(inner).socket.end()
    await client.untilClosed()
    client.close()
    t.same(witness.take().map(({ target }) => target).filter((target) => target !== '/2'), ['/1'], why)
  }
})
