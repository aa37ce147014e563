/** The lifecycle server: reads its configuration, wires the parts, serves until it is told to stop. */
import { parseArgs } from 'node:util'
import { homedir } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { pino } from 'pino'
import { ConfigError } from '#policies/config.ts'
import { createWorkshop } from './carry-out.ts'
import { Clock, machineClocks } from './clock.ts'
import { readConfig, type Config } from './config.ts'
import { Docker } from './docker.ts'
import { EgressProbe } from './egress-probe.ts'
import { Execd } from './execd.ts'
import { Groups } from './groups.ts'
import { HostGuard } from './host-guard.ts'
import { HostPorts } from './host-ports.ts'
import { defaultInstance } from './ids.ts'
import { Images } from './images.ts'
import { SandboxNetwork } from './network.ts'
import { othersOn, readOldMetadata } from './ownership.ts'
import { RouteStream } from './route-stream.ts'
import { toRoute } from './sandbox-view.ts'
import { createServer } from './server.ts'
import { SidecarClient } from './sidecar-client.ts'
import { Store } from './store.ts'
import { Watch } from './watch.ts'

/** sysexits.h: bad usage or configuration, a service that is missing, missing rights. */
const exitUsage = 64
const exitUnavailable = 69
const exitNoRights = 77
/** ms within which an engine that is well answers. */
const readinessPatience = 2_000

const config = readConfigOrExit()
const log = pino({ level: pinoLevel(config.log.level) })
const store = openOr(() => new Store(config.store.path), 'the store cannot be opened')
const instance = store.instance(config.docker.instance, () => defaultInstance(config.store.path))
const engine = new Docker(config.docker.api_timeout * 1000)
const guard = config.docker.host_guard === 'on' ? new HostGuard() : null
const network = new SandboxNetwork(config, { engine, guard })
const routes = new RouteStream()
const ports = new HostPorts(config.server.host)
const images = new Images(engine)
const execd = config.runtime.execd_image === undefined ? null : new Execd(config.runtime.execd_image, { engine, images, instance })
const sidecars = new SidecarClient(config.egress.ready_seconds * 1000)
const probe = config.egress.probe === 'off' ? null : new EgressProbe(config, {
  engine, instance, network, confirm: sidecars.confirm,
  proved: { get: () => store.note('egress-proof'), set: (proof) => store.setNote('egress-proof', proof) },
  report: (event, detail) => log[/failed/.test(event) ? 'warn' : 'info']({ event, ...detail }),
})
let guardFault = ''

if (config.secureRuntime !== null) await requireRuntime(config.secureRuntime)
await network.guard().catch((error: unknown) => {
  stopStart(exitNoRights, `the host guard cannot be set: ${guardText(error)}. Run as root with nftables installed, or set [docker] host_guard = "off" and accept that sandboxes reach this host`)
})

const clock = new Clock(machineClocks, store.note('clock'), (milliseconds, note) => groups.stepped(milliseconds, note))
const groups = new Groups({
  config, instance, store, engine, ports,
  workshop: createWorkshop(config, { machine: () => engine.machine(), images, network, confirm: sidecars.confirm, execd, probe }),
  oldMetadata: (id) => readOldMetadata(homedir(), id),
  inUse: (id) => probe?.tries(id) === true,
  now: clock.now,
  changed: (id, group) => (group === null ? routes.delete(id) : routes.put(toRoute(group))),
  report: (event, id, detail) => log[/failed|orphan|ended|stepped/.test(event) ? 'warn' : 'info']({ event, sandbox: id, ...detail }),
})
const watch = new Watch({
  engine, instance, network: network.name,
  touch: (id, what) => groups.touch(id, what),
  networkGone: () => network.forget(),
  sweep: async (missed) => {
    await Promise.all([groups.sweep(missed), network.guard().then(() => { guardFault = '' }, (error: unknown) => { guardFault = guardText(error) })])
  },
  report: (event, detail) => log.warn({ event, ...detail }),
})
// Set while the server was away: noticed before anybody is found to be late.
clock.now()
rememberClock()
groups.load()
await watch.start(10_000)

/** One question at a time, however many ask: this is open to everybody. */
let asked: Promise<boolean> | null = null
function engineAnswers(): Promise<boolean> {
  asked ??= Promise.race([engine.ping().then(() => true, () => false), delay(readinessPatience, false, { ref: false })]).finally(() => (asked = null))
  return asked
}

const server = createServer({
  config, groups, routes,
  askPolicy: sidecars.policy,
  now: clock.now,
  readiness: async () => {
    // The watch learns of an engine's end from its stream, which may outlive the engine's port by some moments.
    const reached = watch.connected && (await engineAnswers())
    const checks = {
      engine: reached ? 'ok' : 'unreachable',
      store: storeCheck(),
      host_guard: guard === null ? 'off' : guardFault === '' ? 'ok' : guardFault,
      isolation: network.isolation,
    }
    return { ready: reached && checks.store === 'ok' && guardFault === '', checks }
  },
  finished: (request) => log.info({ event: 'request', ...request }),
  clientEvent: (event) => log.info({ event: 'client-event', ...event }),
})
const address = await server.listen({ host: config.server.host, port: config.server.port, backlog: config.server.backlog }).catch((error: Error) => stopStart(exitUnavailable, `cannot listen: ${error.message}`))
log.info({ event: 'listening', address, instance, isolation: network.isolation, host_guard: guard === null ? 'off' : 'on', upstreams: config.upstreams })
if (config.ignoredKeys.length > 0) log.warn({ event: 'config-ignored', keys: config.ignoredKeys, detail: 'nobody reads these keys: are they misspelt?' })
if (guard === null) log.warn({ event: 'host-guard-off', detail: 'sandboxes reach this host, its published ports and cloud metadata' })
if (config.apiKey === null) log.warn({ event: 'no-api-key', detail: 'anybody who reaches this port may run code here' })
// After a store was lost nobody else tells that they are still there. An engine that is away has told so itself.
void othersOn(engine, instance).then(({ containers, instances }) => {
  if (containers > 0) log.warn({ event: 'other-instances', containers, instances, detail: "another server's, or, if this one had another docker.instance or store, its own: nobody ends those" })
}, () => undefined)

for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => void stop(signal))

/** An engine that does not answer now refuses such containers itself later. */
async function requireRuntime(name: string): Promise<void> {
  const machine = await Promise.race([engine.machine().catch(() => null), delay(5000, null, { ref: false })])
  if (machine === null || machine.runtimes.includes(name)) return
  stopStart(exitUsage, `secure_runtime: the Docker engine has no runtime "${name}"; it has ${machine.runtimes.join(', ')}`)
}

/** Sandboxes keep running; the network and the rules go only when nobody's sandbox needs them. */
async function stop(signal: string): Promise<void> {
  log.info({ event: 'stopping', signal })
  setTimeout(() => process.exit(1), 20_000).unref()
  routes.close()
  await server.close()
  await groups.close(8000)
  await watch.close()
  await sidecars.close()
  await network.release().catch((error: unknown) => log.warn({ event: 'release-failed', error: String(error) }))
  store.close()
  process.exit(0)
}

function readConfigOrExit(): Config {
  try {
    const { values } = parseArgs({ options: { config: { type: 'string' } } })
    const path = values.config ?? process.env.SANDBOX_CONFIG_PATH ?? '~/.sandbox.toml'
    return readConfig(path.startsWith('~/') ? homedir() + path.slice(1) : path, process.env)
  } catch (error) {
    const problems = error instanceof ConfigError ? error.problems.map((p) => `${p.path}: ${p.reason}`) : [(error as Error).message]
    return stopStart(exitUsage, `the configuration has ${problems.length} problem(s)\n${problems.map((p) => `  ${p}`).join('\n')}`)
  }
}

function openOr<T>(open: () => T, what: string): T {
  try {
    return open()
  } catch (error) {
    return stopStart(exitUnavailable, `${what}: ${(error as Error).message}`)
  }
}

function stopStart(code: number, message: string): never {
  process.stderr.write(`sallyport server: ${message}\n`)
  process.exit(code)
}

/** For the next server. A full disk is no reason not to start. */
function rememberClock(): void {
  try {
    if (store.note('clock') !== clock.note) store.setNote('clock', clock.note)
  } catch (error) {
    log.warn({ event: 'clock-note-failed', error: String((error as Error).cause ?? error) })
  }
}

function storeCheck(): string {
  try {
    store.check()
    return 'ok'
  } catch (error) {
    return (error as Error).message
  }
}

function guardText(error: unknown): string {
  const { stderr, message } = error as { stderr?: string; message: string }
  return ((stderr ?? '') || message).split('\n')[0] ?? ''
}

function pinoLevel(level: string): string {
  const lower = level.toLowerCase()
  return lower === 'warning' ? 'warn' : lower === 'critical' ? 'fatal' : ['debug', 'info', 'warn', 'error', 'fatal'].includes(lower) ? lower : 'info'
}
