/** Into a real sandbox through real gateways, in every mode: the bytes that arrive are the bytes that were sent, and in time. */
import { createHash, randomBytes } from 'node:crypto'
import { execa } from 'execa'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { request } from 'undici'
import { closeSocket, doorModes, exchange, fetchThrough, openDoor, openSocket, type Door, type DoorMode } from '#test/support/doors.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack, type GatewayMode, type Sandbox, type Stack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const MiB = 1024 * 1024
const port = 8080

t.test('three doors', async (t) => {
  await using internet = await startInternet()
  await using stack = await startStack({ internet, gateways: ['wildcard', 'uri', 'header', 'auto'] })
  const guarded = await stack.create({ networkPolicy: {} })
  const open = await stack.create()

  const pairs: [gateway: GatewayMode, door: DoorMode][] = [...doorModes.map((mode): [GatewayMode, DoorMode] => [mode, mode]), ...doorModes.map((mode): [GatewayMode, DoorMode] => ['auto', mode])]
  for (const [gateway, mode] of pairs) {
    for (const [kind, sandbox] of [['with a policy', guarded], ['without', open]] as const) {
      await t.test(`gateway ${gateway}, door ${mode}, sandbox ${kind}`, async (t) => {
        const door = openDoor(mode, addressOf(stack, gateway), sandbox.id, port)
        await bytesArrive(t, door)
        await requestsArriveAsSent(t, door)
        await eventsArriveOneByOne(t, door)
        await socketsCarryBytes(t, door)
      })
    }
  }
  for (const mode of doorModes) await t.test(`64 MiB each way, ${mode}`, (t) => bigBodies(t, openDoor(mode, addressOf(stack, mode), guarded.id, port)))
  await t.test('places that are not there', (t) => absentPlaces(t, stack, guarded))
  await t.test('endpoints name the first gateway, and curl gets there', async (t) => {
    const { endpoint } = await stack.api.endpoint(guarded.id, port)
    t.equal(endpoint, `${guarded.id}-${port}.sandbox.localhost:${addressOf(stack, 'wildcard').split(':')[1]}`)
    t.match((await execa`curl -sS -m 10 http://${endpoint}/`).stdout, 'sallyport sandbox')
  })
  t.equal(await internet.strays(), 0)
})

function addressOf(stack: Stack, mode: GatewayMode): string {
  return stack.gateways.get(mode)!.url.replace('http://', '')
}

/** Byte i of `/bytes/<n>` is i mod 251. */
function pattern(length: number): Buffer {
  return Buffer.from(Uint8Array.from({ length }, (_, i) => i % 251))
}

async function bytesArrive(t: Test, door: Door): Promise<void> {
  for (const length of [0, 1, 65_537, 1_000_003]) {
    const { status, headers, body } = await fetchThrough(door, `/bytes/${length}`)
    t.equal(status, 200)
    t.equal(headers['content-length'], String(length))
    t.ok(body.equals(pattern(length)), `${length} bytes down`)
  }
  const body = randomBytes(300_001)
  const { body: answer } = await fetchThrough(door, '/upload', { method: 'POST', body })
  t.same(JSON.parse(answer.toString()), { bytes: body.length, sha256: createHash('sha256').update(body).digest('hex') }, '300,001 bytes up')
}

/** The sandbox says what it got: the target must be the client's own, untouched. */
async function requestsArriveAsSent(t: Test, door: Door): Promise<void> {
  for (const [method, path] of [['GET', '/echo'], ['DELETE', '/echo?a=1&b=%20x'], ['PUT', '/echo?%2e%2e/..//'], ['PATCH', '/echo?%C3%BC']] as const) {
    const { body } = await fetchThrough(door, path, { method, headers: { cookie: 'a=1; b=2' } })
    const seen = JSON.parse(body.toString()) as { method: string; url: string; headers: string[] }
    t.match(seen, { method, url: path }, `${method} ${path}`)
    t.equal(headerOf(seen.headers, 'cookie'), 'a=1; b=2')
    t.equal(headerOf(seen.headers, 'opensandbox-ingress-to'), undefined, 'the routing header is for the gateway')
  }
}

function headerOf(raw: readonly string[], name: string): string | undefined {
  const at = raw.findIndex((value, index) => index % 2 === 0 && value.toLowerCase() === name)
  return at === -1 ? undefined : raw[at + 1]
}

/** The application sends three events 300 ms apart; a gateway that buffers hands them over together. */
async function eventsArriveOneByOne(t: Test, door: Door): Promise<void> {
  const { url, headers } = door.target('/sse')
  const answer = await request(url, { headers })
  t.match(answer.headers['content-type'], 'text/event-stream')
  const delays: number[] = []
  for await (const chunk of answer.body as AsyncIterable<Buffer>) {
    for (const [, sent] of chunk.toString().matchAll(/data: event \d+ at (\d+)/g)) delays.push(Date.now() - Number(sent))
  }
  t.equal(delays.length, 3, 'three events')
  t.ok((delays[0] ?? Infinity) < 600, 'the first arrives before the last is sent', { delays })
}

async function socketsCarryBytes(t: Test, door: Door): Promise<void> {
  const socket = await openSocket(door)
  for (const length of [0, 1, 125, 126, 65_535, 65_536, MiB]) {
    const message = randomBytes(length)
    const { data, binary } = await exchange(socket, message)
    t.ok(binary && data.equals(message), `a binary message of ${length} bytes`)
  }
  const { data, binary } = await exchange(socket, 'grüße 🚪')
  t.equal(binary, false)
  t.equal(data.toString(), 'grüße 🚪')
  t.equal(await closeSocket(socket), 1000, 'the close code comes back')
}

async function bigBodies(t: Test, door: Door): Promise<void> {
  const size = 64 * MiB
  const down = door.target(`/bytes/${size}`)
  const answer = await request(down.url, { headers: down.headers })
  const received = createHash('sha256')
  let length = 0
  for await (const chunk of answer.body as AsyncIterable<Buffer>) {
    received.update(chunk)
    length += chunk.length
  }
  t.equal(length, size)
  t.equal(received.digest('hex'), patternHash(size), 'down')

  const up = randomBytes(size)
  const { body } = await fetchThrough(door, '/upload', { method: 'POST', body: up })
  t.same(JSON.parse(body.toString()), { bytes: size, sha256: createHash('sha256').update(up).digest('hex') }, 'up')
}

function patternHash(size: number): string {
  const hash = createHash('sha256')
  const block = pattern(251 * 4096)
  for (let left = size; left > 0; left -= block.length) hash.update(left >= block.length ? block : block.subarray(0, left))
  return hash.digest('hex')
}

async function absentPlaces(t: Test, stack: Stack, sandbox: Sandbox): Promise<void> {
  // A WebSocket that cannot be dialled is a plain 503, as the original gateway answers.
  const cases: [why: string, id: string, port: number, http: number, upgrade: number][] = [
    ['no such sandbox', '00000000-0000-4000-8000-000000000000', port, 404, 404],
    ['nobody listens there', sandbox.id, 9, 502, 503],
  ]
  for (const mode of doorModes) {
    for (const [why, id, at, http, upgrade] of cases) {
      const door = openDoor(mode, addressOf(stack, mode), id, at)
      t.equal((await fetchThrough(door, '/')).status, http, `${mode}: ${why}`)
      await t.rejects(openSocket(door), { message: new RegExp(String(upgrade)) }, `${mode}: ${why}, WebSocket`)
    }
  }
  const bad = await request(stack.gateways.get('header')!.url, { headers: { 'opensandbox-ingress-to': `${sandbox.id}-70000` } })
  await bad.body.dump()
  t.equal(bad.statusCode, 400, 'a port that is none')
}
