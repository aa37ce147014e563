/**
 * A gateway with 100,000 routes that gets all of them anew while a client asks steadily: the longest it has to wait. The gateway takes its time;
 * a sandbox that only the new list has, at its end, tells when it is done. Once from a file, once from the lifecycle server.
 */
import { link, rename } from 'node:fs/promises'
import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { headerNames } from '#policies/wire.ts'
import { accepts, freePort, type Cleanups } from '../program.ts'
import { percentile, type Arena, type Effort, type Load, type Sample, type Target } from '../rounds.ts'
import { SteadyClient } from '../steady-requests.ts'
import { startGateway, writeRoutes, type StaticSandbox } from './gateway-program.ts'

const count = 100_000
/** One in so many has another address in the other list: another owner, and all that follows. */
const changing = 10
/** ms between an answer and the next request. */
const pause = 1
/** ms after the last route is there, for what a reload leaves to the collector. */
const after = 300
/** ms within which a reload must be done. */
const patience = 30_000
const versions = ['odd', 'even'] as const
type Version = (typeof versions)[number]
const peers = path.join(import.meta.dirname, '..', 'peers')

export const routes: Target = { title: 'Gateway: routes', start }

async function start(_: Effort, cleanups: Cleanups): Promise<Arena> {
  const backendPort = await freePort()
  await cleanups.start(process.execPath, [path.join(peers, 'http-backend.ts'), String(backendPort)], { ready: accepts(backendPort) })
  const fromFile = await startGateway(cleanups, backendPort, { sandboxes: sandboxesOf('even') })
  const files = versions.map((version) => `${fromFile.routes}.${version}`)
  for (const [index, version] of versions.entries()) await writeRoutes(files[index]!, sandboxesOf(version))
  const serverPort = await freePort()
  const server = `http://127.0.0.1:${serverPort}`
  await cleanups.start(process.execPath, [path.join(peers, 'route-server.ts'), String(serverPort), files[1]!, files[0]!], { ready: accepts(serverPort) })
  const fromServer = await startGateway(cleanups, backendPort, { server })
  const replaceFile = async (version: Version): Promise<void> => {
    await link(`${fromFile.routes}.${version}`, `${fromFile.routes}.new`)
    await rename(`${fromFile.routes}.new`, fromFile.routes)
  }
  return {
    loads: [
      await reloads('the file', fromFile.port, backendPort, replaceFile, cleanups),
      await reloads('the list of the lifecycle server', fromServer.port, backendPort, async () => void (await fetch(`${server}/next`, { method: 'POST' })), cleanups),
    ],
    notes: [
      'Gateway: one worker, header mode, metrics and access log on. What a lookup costs with 10 and with 100,000 routes: see locate.',
      'The lifecycle server is played by the bench: it breaks off the stream, and tells the other list to the gateway when it comes back.',
    ],
  }
}

/** @param replace gives the gateway the list of this version */
async function reloads(what: string, port: number, backendPort: number, replace: (version: Version) => Promise<void>, cleanups: Cleanups): Promise<Load> {
  const [asking, looking] = [await SteadyClient.open(port), await SteadyClient.open(port)]
  cleanups.add(async () => {
    asking.close()
    looking.close()
  })
  let turn = 0
  let last = 0
  const naming = (id: string): string => `${headerNames.ingressTo}: ${id}-${backendPort}`

  /** Asks steadily until `work` is done. */
  const waitDuring = async (work: Promise<unknown>): Promise<Sample> => {
    let over = false
    const done = work.finally(() => { over = true })
    const [times] = await Promise.all([asking.askSteadily(naming('bench'), pause, () => !over), done])
    const sorted = Float64Array.from(times).sort()
    return { longest: sorted.at(-1) ?? NaN, p99: percentile(sorted, 0.99), p50: percentile(sorted, 0.5) }
  }
  const arrived = async (version: Version): Promise<void> => {
    const begin = performance.now()
    while ((await looking.ask(naming(version))) !== 200) {
      if (performance.now() - begin > patience) throw new Error(`the new routes are not there after ${patience / 1000} s`)
      await delay(10)
    }
  }
  const reload = async (): Promise<void> => {
    const begin = performance.now()
    const version = versions[turn++ % versions.length]!
    await replace(version)
    await arrived(version)
    await delay(after)
    last = performance.now() - begin
  }
  await arrived('even')
  for (let run = 0; run < 2; run++) await waitDuring(reload())

  return {
    title: `a small GET every ${pause} ms while ${what} of ${count.toLocaleString('en')} routes is replaced`, rounds: 7, baseline: 'no reload',
    measures: [{ key: 'longest', label: 'longest wait', unit: 'ms' }, { key: 'p99', label: 'p99', unit: 'ms' }, { key: 'p50', label: 'p50', unit: 'ms' }],
    // As long as the last reload was: who asks more often waits longer at worst.
    contenders: { 'no reload': () => waitDuring(delay(last)), reload: () => waitDuring(reload()) },
    goals: [{ contender: 'reload', measure: 'longest', against: null, sense: 'at most', limit: 50 }],
    notes: [`One address in ${changing} is another after each reload. Times are the client's, so they hold what the machine adds of its own: see the row without a reload.`],
  }
}

function sandboxesOf(version: Version): StaticSandbox[] {
  const sandboxes = Array.from({ length: count - 2 }, (_, index) => {
    const moved = version === 'odd' && index % changing === 0 ? 1 : 0
    return { id: `sandbox${index}`, host: `10.${(index >> 16) + moved * 100}.${(index >> 8) & 255}.${index & 255}` }
  })
  return [{ id: 'bench', host: '127.0.0.1' }, ...sandboxes, { id: version, host: '127.0.0.1' }]
}
