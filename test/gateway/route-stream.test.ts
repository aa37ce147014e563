/** Routes from the lifecycle server: what is read, when it counts, and what happens when the stream breaks. */
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setImmediate as turn } from 'node:timers/promises'
import t from 'tap'
import { routeStreamPath, type RouteEntry, type RouteEvent } from '#policies/wire.ts'
import { readEvent, RouteReader, ServerProvider } from '../../gateway/providers/server.ts'
import { RouteTable, type Sandbox } from '../../gateway/routes.ts'
import { entry, eventually } from './support.ts'

t.test('route events: the table is swapped at synced, never half-read', async (t) => {
  const table = new RouteTable(() => false)
  let synced = 0
  const reader = new RouteReader(table, () => synced++)
  const feed = (...events: RouteEvent[]): void => t.equal(reader.feed(events.map((event) => `${JSON.stringify(event)}\n`).join('')), null) as unknown as void
  table.put(entry({ id: 'old' }))
  feed({ type: 'reset' }, { type: 'put', sandbox: entry({ id: 'a' }) })
  t.ok(table.get('old'), 'the old table is served while the new one is read')
  t.notOk(table.get('a'))
  t.ok(table.stale(Date.now()), 'half a list proves nothing')
  feed({ type: 'put', sandbox: entry({ id: 'b' }) }, { type: 'delete', id: 'b' }, { type: 'synced' })
  t.same([table.size, synced, table.get('old')], [1, 1, undefined])
  t.notOk(table.stale(performance.now()))
  feed({ type: 'put', sandbox: entry({ id: 'c' }) }, { type: 'ping' })
  t.ok(table.get('c'), 'changes apply at once after that')
  feed({ type: 'delete', id: 'c' })
  t.notOk(table.get('c'))
  const line = JSON.stringify({ type: 'put', sandbox: entry({ id: 'cut' }) })
  reader.feed(line.slice(0, 10))
  reader.feed(`${line.slice(10)}\n`)
  t.ok(table.get('cut'), 'a line may arrive in pieces')
  t.same(readEvent('{"type":"news"}'), { type: 'ping' }, 'a newer server may say more')
})

t.test('an event that cannot be read is named by line and field, and never repeated: it may hold a token', async (t) => {
  const good = { id: 'a', host: 'h', lifecycle: 'l', state: 'Running', secureAccessToken: 's3cr3t' }
  const put = (change: object): string => JSON.stringify({ type: 'put', sandbox: { ...good, ...change } })
  const rows: [line: string, wanted: string][] = [
    ['s3cr3t', 'is not JSON'],
    [put({}).replace('"s3cr3t"', 's3cr3t'), 'is not JSON'],
    ['"s3cr3t"', 'is not an object'],
    ['null', 'is not an object'],
    ['["s3cr3t"]', 'type must be a string'],
    ['{"type":["s3cr3t"]}', 'type must be a string'],
    ['{"type":"put"}', 'sandbox must be an object'],
    ['{"type":"put","sandbox":"s3cr3t"}', 'sandbox must be an object'],
    [put({ id: '' }), 'sandbox.id must be a string that is not empty'],
    [put({ id: ['s3cr3t'] }), 'sandbox.id must be a string that is not empty'],
    [put({ host: 5 }), 'sandbox.host of "a" is wrong'],
    [put({ lifecycle: null }), 'sandbox.lifecycle of "a" is wrong'],
    [put({ state: undefined }), 'sandbox.state of "a" is wrong'],
    [put({ secureAccessToken: ['s3cr3t'] }), 'sandbox.secureAccessToken of "a" is wrong'],
    [put({ epoch: 's3cr3t' }), 'sandbox.epoch of "a" is wrong'],
    [put({ renewOnAccess: 's3cr3t' }), 'sandbox.renewOnAccess of "a" is wrong'],
    [put({ id: `\n${'x'.repeat(100)}`, host: 5 }), `sandbox.host of "\\n${'x'.repeat(63)}" is wrong`],
    ['{"type":"delete"}', 'id must be a string'],
  ]
  const table = new RouteTable(() => false)
  for (const [line, wanted] of rows) t.equal(new RouteReader(table, () => undefined).feed(`{"type":"reset"}\n\n${line}\n{"type":"ping"}\n`), `line 3: ${wanted}`, line)
  const reader = new RouteReader(table, () => undefined)
  t.equal(reader.feed('{"type":"reset"}\n{"type":'), null)
  t.equal(reader.feed('"ping"}\n{"type":"put"}\n'), 'line 3: sandbox must be an object', 'lines are counted however they are cut')
  t.equal(new RouteReader(table, () => undefined).feed(`\n${'x'.repeat(2 << 20)}`), 'line 2 is too long')
})

t.test('a state this gateway does not know makes one sandbox wait, and no other', async (t) => {
  const table = new RouteTable(() => true)
  const reader = new RouteReader(table, () => undefined)
  const feed = (...events: object[]): void => t.equal(reader.feed(events.map((event) => `${JSON.stringify(event)}\n`).join('')), null) as unknown as void
  const put = (id: string, host: string, state: string): object => ({ type: 'put', sandbox: { ...entry({ id, host }), state } })
  const seen = (): (string | undefined)[] => ['new', 'old', 'next'].map((id) => table.get(id)?.entry.state)
  feed({ type: 'reset' }, put('new', '10.0.0.1', 'Hibernating'), put('old', '10.0.0.2', 'Running'), { type: 'synced' })
  t.same(seen(), ['Unknown', 'Running', undefined], 'the list is taken')
  t.notOk(table.stale(performance.now()))
  let ended = 0
  table.tiesOf(table.get('old') as Sandbox).others.add({ destroy: () => void ended++ })
  feed(put('next', '10.0.0.1', 'Running'), put('old', '10.0.0.2', 'Archived'))
  t.same([seen(), ended], [['Unknown', 'Unknown', 'Running'], 1], 'its address may be somebody else\'s: it has none, and no connections')
  feed(put('old', '10.0.0.2', 'Running'))
  t.same([seen(), table.get('old')?.entry.host], [['Unknown', 'Running', 'Running'], '10.0.0.2'], 'and it comes back')
})

t.test('a long list is taken in slices, in order with what follows, and a newer one wins', async (t) => {
  const table = new RouteTable(() => true)
  const count = 20_000
  const listOf = (life: string): RouteEvent[] => [{ type: 'reset' }, ...Array.from({ length: count }, (_none, n): RouteEvent => ({ type: 'put', sandbox: entry({ id: `s${n}`, host: `10.0.${n >> 8}.${n & 255}`, lifecycle: life }) })), { type: 'synced' }]
  const text = (events: RouteEvent[]): string => events.map((event) => `${JSON.stringify(event)}\n`).join('')
  const read = (events: RouteEvent[]): Promise<void> => new Promise((resolve) => new RouteReader(table, resolve).feed(text(events)))
  const first = read([...listOf('1'), { type: 'delete', id: 's0' }, { type: 'put', sandbox: entry({ id: 'last', host: '10.9.9.9' }) }])
  t.ok(table.size < count, 'not all at once')
  t.ok(table.stale(performance.now()), 'half a table proves nothing')
  await first
  t.same([table.size, table.get('s0'), table.get('last')?.entry.id], [count, undefined, 'last'], 'what followed the list applies after it')
  void read(listOf('2'))
  await read(listOf('3').filter((event) => event.type !== 'put' || event.sandbox.id !== 's5'))
  await new Promise((resolve) => setTimeout(resolve, 50))
  t.same([table.get('s5'), table.get('s6')?.entry.lifecycle, table.get('last')], [undefined, '3', undefined], 'a list that was overtaken changes nothing any more')
})

t.test('what a list repeats is not kept twice, and what it changes is never lost', async (t) => {
  const table = new RouteTable(() => false)
  const whole: RouteEntry = { id: 'a', host: '10.0.0.1', state: 'Running', lifecycle: '1', secureAccessToken: 'tok', epoch: 1, renewOnAccess: true }
  table.put(whole)
  t.equal(table.known({ ...whole }), whole)
  const changes: Partial<Record<keyof RouteEntry, unknown>>[] = [{ id: 'b' }, { host: '10.0.0.2' }, { state: 'Paused' }, { lifecycle: '2' }, { secureAccessToken: 'other' }, { secureAccessToken: undefined }, { epoch: 2 }, { renewOnAccess: undefined }]
  for (const change of changes) {
    const other = { ...whole, ...change } as RouteEntry
    t.equal(table.known(other), other, JSON.stringify(change))
  }
  await table.replace(new Map([['a', { ...whole, epoch: 2 }]]))
  t.equal(table.get('a')?.entry.epoch, 2)
  const read = (event: RouteEvent[]): string | null => new RouteReader(table, () => undefined).feed(event.map((one) => `${JSON.stringify(one)}\n`).join(''))
  read([{ type: 'reset' }, { type: 'put', sandbox: { ...whole, epoch: 3 } }, { type: 'put', sandbox: { ...whole, epoch: 2 } }, { type: 'synced' }])
  t.equal(table.get('a')?.entry.epoch, 2, 'the last word of a list counts, also where the table had it before')
})

t.test('the route stream: token, reconnect, relist', async (t) => {
  const streams: ServerResponse[] = []
  const seen: (string | undefined)[] = []
  let refuse = true
  const source = createServer((request, response) => {
    seen.push(`${request.url} ${request.headers.authorization}`)
    if (refuse) return void response.writeHead(401).end()
    streams.push(response.writeHead(200))
  })
  await new Promise<void>((resolve) => source.listen(0, '127.0.0.1', resolve))
  const states: string[] = []
  const table = new RouteTable(() => false)
  const provider = new ServerProvider({ url: `http://127.0.0.1:${(source.address() as AddressInfo).port}/base/`, token: 'tok', random: () => 0, onState: (state) => void states.push(state) }, table)
  t.teardown(async () => {
    await provider.close()
    source.closeAllConnections()
    source.close()
  })
  const started = provider.start()
  await eventually(() => states.length > 0, 'refused')
  t.equal(states[0], 'refused with status 401')
  refuse = false
  const say = (stream: ServerResponse | undefined, ...events: RouteEvent[]): void => events.forEach((event) => stream?.write(`${JSON.stringify(event)}\n`))
  await eventually(() => streams.length === 1, 'connected')
  say(streams[0], { type: 'reset' }, { type: 'put', sandbox: entry({ id: 'a' }) }, { type: 'synced' })
  await started
  t.ok(table.get('a'))
  t.equal(seen[0], `/base${routeStreamPath} Bearer tok`)
  streams[0]?.destroy()
  await eventually(() => streams.length === 2, 'reconnected')
  t.ok(table.get('a'), 'the old table is served meanwhile')
  say(streams[1], { type: 'reset' }, { type: 'put', sandbox: entry({ id: 'b' }) }, { type: 'synced' })
  await eventually(() => table.get('b') !== undefined, 'relisted')
  t.notOk(table.get('a'), 'what ended in the gap is gone')
  const many: RouteEvent[] = Array.from({ length: 20_000 }, (_none, n) => ({ type: 'put', sandbox: entry({ id: `s${n}` }) }))
  const list = [{ type: 'reset' }, ...many, { type: 'synced' }].map((event) => `${JSON.stringify(event)}\n`).join('')
  streams[1]?.write(list)
  let turns = 0
  for (; table.get('s19999') === undefined && turns < 100_000; turns++) await turn()
  t.equal(table.size, 20_000)
  t.ok(turns >= list.length / (16 * 1024), `${turns} turns for ${list.length} characters: requests get theirs meanwhile`)
  streams[1]?.write(JSON.stringify({ type: 'put', sandbox: { ...entry({ id: 'x', secureAccessToken: 's3cr3t' }), host: 5 } }) + '\n')
  await eventually(() => streams.length === 3, 'a stream that cannot be read is opened anew')
  t.ok(states.some((state) => /^unreadable: line \d+: sandbox\.host of "x" is wrong$/.test(state)), states.join(' | '))
  t.notOk(states.join().includes('s3cr3t'), 'no token in what is told')
})
