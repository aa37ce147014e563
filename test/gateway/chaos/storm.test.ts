/**
 * Hostile clients, hostile sandboxes and an operator who keeps changing the routes, all at once and at random, through one gateway. However
 * they interfere: nobody gets what belongs to somebody else, nothing half looks whole, who behaves is served, and nothing stays behind.
 * `SEED=<n> node test/gateway/chaos/storm.test.ts` repeats a run as far as the kernel plays along.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { randomOf, type Random } from '../../support/random.ts'
import { sized } from '../../support/size.ts'
import { hostile, Line, polite, type Door } from './clients.ts'
import { judgeAccess, judgeLine, liar, type Pair } from './judge.ts'
import { Ledger } from './ledger.ts'
import { startSandbox } from './sandboxes.ts'
import { entry, startGateway, type TestGateway } from '../support.ts'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

/** What no request should ever lead to, in all of this process. */
const alarms: string[] = []
process.on('uncaughtExceptionMonitor', (error, origin) => void alarms.push(`${origin}: ${error.stack}`))
process.on('unhandledRejection', (reason) => void alarms.push(`unhandled rejection: ${reason instanceof Error ? reason.stack : String(reason)}`))
process.on('warning', (warning) => void alarms.push(String(warning.stack)))

const drainTimeout = 300
const crowd = 45
/** Of the ports below those that the kernel gives to servers of other tests. */
const nobodyListens = 9

type Outcome = { readonly problems: string[]; readonly counts: Record<string, number> }

/** @param drains the gateway is closed while all goes on; false: when everybody has what he asked for */
async function storm(seed: number, drains: boolean): Promise<Outcome> {
  const ledger = new Ledger(seed)
  const random = ledger.randomOf(0)
  const { problems } = ledger
  await using wild = await startSandbox(ledger, 'wild')
  await using calm = await startSandbox(ledger, 'calm')
  await using lying = await startSandbox(ledger, 'liar')
  const door = (sandbox: string, port: number, token = '', barred = false): Door => ({ sandbox, port, token, barred })
  const good = door('calm', calm.port)
  const doors = [door('a', wild.port), door('a', wild.port), door('b', wild.port), door('b', wild.port), door('sec', wild.port, 'secret'), door(liar, lying.port), door('nobody', wild.port, '', true), door('paused', wild.port, '', true), door('a', nobodyListens), good]
  const crowded = random.between(0, 3) === 0
  const options = {
    baseDomain: 'gw.test', drainTimeout, connectTimeout: 500,
    firstByteTimeout: random.pick([300, 600]), idleTimeout: random.pick([800, 1_200]), headerTimeout: random.pick([600, 1_000]), keepAliveTimeout: random.pick([150, 5_000]), bootGrace: random.pick([0, 200]),
    maxRequestsPerPort: random.pick([4, 1_024]), maxConnections: crowded ? 15 : 9_000, maxUpgradesPerClient: random.pick([3, 10_000]), maxMessageBytes: random.pick([0, 2_000]), preserveHost: random.between(0, 1) === 0, hideMissing: random.between(0, 2) === 0,
  }
  await using gateway = await startGateway([{ id: 'a' }, { id: 'b' }, { id: 'calm' }, { id: liar }, { id: 'sec', secureAccessToken: 'secret' }, { id: 'paused', state: 'Paused' }], options)
  const lines: Line[] = []
  let actors = 1
  const connect = (choices: Random): Line => {
    const line = new Line(gateway.port, ledger, choices)
    lines.push(line)
    return line
  }
  const state = { goesOn: true, draining: false }
  const operator = operate(gateway, ledger, ledger.randomOf(actors++), state)
  const clients = Array.from({ length: crowd }, async () => {
    const choices = ledger.randomOf(actors++)
    await delay(choices.between(0, 900))
    // Its port may be somebody else's by now.
    if (!state.draining) await hostile(connect(choices), doors, choices)
  })
  const polites = crowded ? [] : Array.from({ length: 2 }, () => {
    const choices = ledger.randomOf(actors++)
    return polite(() => connect(choices), good, choices, state, problems)
  })

  if (drains) await delay(random.between(200, 1_200))
  else {
    await Promise.all(clients)
    // Silence, heads and bodies that do not come, answers that do not come: each has its time, looked at once a second.
    const waits = (): Line[] => lines.filter(({ client, asked, left }) => !left && !client.closed && !client.ended && asked.some(({ sent }) => sent) && !client.received.includes('HTTP/1.1 101 '))
    const hangs = (): Line[] => waits().filter((line) => line.answers() < line.asked.filter(({ sent }) => sent).length)
    for (const end = Date.now() + 6_000; hangs().length > 0 && Date.now() < end; ) await delay(20)
    state.goesOn = false
    await Promise.all(polites)
    for (const line of hangs()) problems.push(`never answered: ${JSON.stringify(line.asked.at(line.answers()))}, received ${JSON.stringify(line.client.received.slice(-300))}`)
  }
  const open = new Set(lines.filter(({ over }) => !over))
  state.goesOn = false
  state.draining = true
  const begun = performance.now()
  await gateway.close()
  const took = performance.now() - begun
  if (took > drainTimeout + 2_000) problems.push(`closed after ${took} ms`)
  await Promise.all([...clients, operator])
  const served = (await Promise.all(polites)).reduce((sum, count) => sum + count, 0)

  const sockets = (): number => wild.sockets.size + calm.sockets.size + lying.sockets.size
  const metrics = async (): Promise<string> => gateway.gateway.metrics.registry.metrics()
  const held = async (): Promise<number[]> => [...(await metrics()).matchAll(/^sallyport_gateway_(?:client_connections|requests_in_flight|upgraded_connections) (\d+)$/gm)].map(([, count]) => Number(count)).concat(sockets())
  let left = await held()
  for (const end = Date.now() + 3_000; left.some((count) => count > 0) && Date.now() < end; left = await held()) await delay(20)
  if (left.join() !== '0,0,0,0') problems.push(`held after the end: ${left.join()}`)
  const pairs: Pair[] = []
  for (const line of lines) {
    if (!line.left) await line.client.untilClosed(2_000).catch(() => problems.push(`a connection stays: ${JSON.stringify(line.client.received.slice(-200))}`))
    line.client.close()
    const judged = judgeLine(line, ledger, open.has(line))
    problems.push(...judged.problems)
    pairs.push(...judged.pairs)
  }
  problems.push(...judgeAccess(gateway.lines, ledger, pairs))
  const counted = [...(await metrics()).matchAll(/^ingress_http_request_count\{.*\} (\d+)$/gm)].reduce((sum, [, count]) => sum + Number(count), 0)
  const told = gateway.lines.filter((line) => !line.includes('"msg":"malformed"')).length
  if (counted !== told) problems.push(`${counted} counted, ${told} lines`)
  const asked = [...ledger.asked.values()]
  const relayed = pairs.filter(({ answer }) => answer.headers.some(([name]) => name === 'x-echo'))
  return { problems, counts: { asked: asked.length, delivered: asked.filter(({ deliveries }) => deliveries.length > 0).length, again: asked.filter(({ deliveries }) => deliveries.length > 1).length, answered: relayed.length, refused: pairs.length - relayed.length, tunnels: relayed.filter(({ answer }) => answer.status === 101).length, served } }
}

/** Ends sandboxes, gives their ids to new ones, and stops them for a while; not the one that behaves. */
async function operate({ gateway: { table } }: TestGateway, ledger: Ledger, random: Random, state: { readonly goesOn: boolean }): Promise<void> {
  for (let life = 1; state.goesOn; life++) {
    await delay(random.between(20, 150))
    const id = random.pick(['a', 'b', 'sec', liar])
    const route = { id, lifecycle: `life-${life}`, ...(id === 'sec' ? { secureAccessToken: 'secret' } : {}) }
    const act = random.pick(['pause', 'delete', 'reborn', 'terminate', 'touch'])
    const before = table.get(id)?.entry
    if (before === undefined || act === 'reborn') {
      ledger.lifeEnds(id)
      table.put(entry(route))
    } else if (act === 'delete') {
      ledger.lifeEnds(id)
      table.delete(id)
      await delay(random.between(0, 20))
      table.put(entry(route))
    } else if (act === 'terminate') {
      ledger.lifeEnds(id)
      table.put({ ...before, state: 'Terminated' })
      await delay(random.between(0, 20))
      table.put(entry(route))
    } else if (act === 'pause') {
      table.put({ ...before, state: 'Paused' })
      await delay(random.between(0, 20))
      table.put(before)
    } else table.put({ ...before })
  }
}

/** ms after which it ends, whatever still holds it. */
const patience = sized(90_000, 480_000)
t.setTimeout(patience)
setTimeout(() => process.exit(1), patience + 5_000).unref()

const memory = (): number => {
  for (let round = 0; round < 3; round++) collect()
  const { heapUsed, external } = process.memoryUsage()
  return (heapUsed + external) / 2 ** 20
}
const connections = (): number => process.getActiveResourcesInfo().filter((name) => name === 'TCPSocketWrap').length

t.test('whatever clients, sandboxes and the operator do at the same time', { timeout: patience }, async (t) => {
  const random = randomOf(t)
  const rounds = sized(3, 40)
  const total: Record<string, number> = {}
  let level = 0
  for (let round = 0; round < rounds; round++) {
    // Some at a time: each of them mostly waits.
    const seeds = Array.from({ length: 3 }, () => random.between(0, 2 ** 31 - 1))
    const outcomes = await Promise.all(seeds.map((seed, index) => storm(seed, index === 0)))
    for (const [index, { problems, counts }] of outcomes.entries()) {
      t.same(problems.slice(0, 10), [], `round ${round}, storm ${index} of seed ${seeds[index]}: ${JSON.stringify(counts)}`)
      for (const [name, count] of Object.entries(counts)) total[name] = (total[name] ?? 0) + count
    }
    for (const end = Date.now() + 2_000; connections() > 0 && Date.now() < end; ) await delay(20)
    t.equal(connections(), 0, 'no connection is left')
    if (round === 0) level = memory()
  }
  t.same(alarms, [])
  t.ok(memory() < level + 24, `from ${level.toFixed(1)} to ${memory().toFixed(1)} MiB`)
  t.comment(JSON.stringify(total))
  for (const [name, count] of Object.entries(total)) t.ok(count > 0, `${name}: ${count}`)
})
