/** The gateway program: configuration, logger, signals, workers. Everything else is in `gateway.ts`. */
import cluster from 'node:cluster'
import { setFlagsFromString } from 'node:v8'
import pino from 'pino'
import { ConfigError } from '#policies/config.ts'
import { openAccessLog } from './access-log.ts'
import { openAdmin, type Overseen } from './admin.ts'
import { claimPort } from './claim-port.ts'
import { KeyRing } from './key-ring.ts'
import { readGatewayConfig, type GatewayConfig, type ReadConfig } from './config.ts'
import { connectionsThatFit, readLimits } from './descriptors.ts'
import { Fleet, reportToParent } from './fleet.ts'
import { createGateway, type Gateway } from './gateway.ts'
import { metricsType } from './metrics.ts'
import { postRenewals } from './providers/renewal-post.ts'
import { ServerProvider } from './providers/server.ts'
import { StaticProvider } from './providers/static.ts'
import { reportListening, superviseWorkers } from './workers.ts'

/** EX_USAGE of sysexits.h: the configuration is wrong, and starting again will not help. */
const exitUsage = 64
/** EX_UNAVAILABLE: the port or its address cannot be had now. */
const exitUnavailable = 69
/** The original's names for them. */
const levels = new Map(['debug', 'info', 'warn', 'error', 'fatal'].map((level) => [level, level]).concat([['warning', 'warn']]) as [string, string][])

function readOrExit(): ReadConfig {
  try {
    return readGatewayConfig(process.argv.slice(2), process.env)
  } catch (error) {
    return exitOnStart(error)
  }
}

/** A person reads why it did not start, a line for each reason. What nobody foresaw keeps its stack. */
function exitOnStart(error: unknown): never {
  const { syscall, message } = error as NodeJS.ErrnoException
  if (error instanceof ConfigError) {
    for (const { path, reason } of error.problems) process.stderr.write(`gateway: ${path}: ${reason}\n`)
    process.exit(exitUsage)
  }
  if (syscall !== 'listen' && syscall !== 'getaddrinfo') throw error
  process.stderr.write(`gateway: cannot listen: ${message}\n`)
  process.exit(exitUnavailable)
}

const { config: wanted, warnings } = readOrExit()
const fits = connectionsThatFit(readLimits())
const config = Object.freeze({ ...wanted, maxConnections: Math.min(wanted.maxConnections, fits) })
const log = pino({ level: levels.get(config.logLevel) ?? 'info', base: null, name: 'sallyport.gateway', timestamp: pino.stdTimeFunctions.isoTime, formatters: { level: (label) => ({ level: label }) } })
if (cluster.isPrimary) for (const warning of warnings) log.warn(warning)
if (cluster.isPrimary && fits < wanted.maxConnections) log.warn({ maxConnections: fits, wanted: wanted.maxConnections }, 'the descriptor limit allows fewer connections: raise ulimit -n')

if (config.workers > 1 && cluster.isPrimary) await oversee(config)
else await serve(config)

/** The parent of workers: it answers the operator, and touches no request. */
async function oversee({ port, host, workers, drainTimeout, adminPort, adminHost }: GatewayConfig): Promise<void> {
  try {
    const giveUpPort = await claimPort(port, host)
    const fleet = new Fleet(workers)
    if (adminPort !== -1) await openAdmin(fleet, adminPort, adminHost, onAdminError)
    superviseWorkers({ count: workers, drainTimeout, log, fleet, onClosing: giveUpPort })
  } catch (error) {
    exitOnStart(error)
  }
}

function onAdminError(error: unknown): void {
  log.error({ err: error }, 'the admin listener failed to answer')
}

async function serve(config: GatewayConfig): Promise<void> {
  // Bodies pass through buffers outside V8's heap. Counted apart, every 30 MB of them start a whole collection of 10 ms and more.
  setFlagsFromString('--external-memory-accounted-in-global-limit')
  const ring = new KeyRing(config.secureAccessKeys, config.secureAccessKeysFile, (problem) => log.error({ problem }, 'access keys not reloaded'))
  try {
    const access = openAccessLog(config.accessLog, (error) => log.error({ err: error }, 'access lines are lost'))
    ring.start()
    const gateway = createGateway(config, {
      keys: () => ring.keys,
      renewals: config.provider === 'server' ? { send: (report) => postRenewals(config.serverUrl, config.serverToken, report), onState: (problem) => (problem === '' ? log.info('renewals arrive again') : log.warn({ problem }, 'renewals do not arrive')) } : null,
      access,
      provider: (table) =>
        config.provider === 'static'
          ? new StaticProvider({ path: config.routes, every: 500, onProblem: (problem) => log.error({ problem }, 'routes not reloaded') }, table)
          : new ServerProvider({ url: config.serverUrl, token: config.serverToken, random: Math.random, onState: (state) => log.info({ state }, 'route stream') }, table),
    })
    const port = await gateway.listen()
    const { registry } = gateway.metrics
    const overseen: Overseen = { contentType: metricsType, metrics: () => registry.metrics(), unready: async () => gateway.unready() }
    if (cluster.isWorker) reportToParent(async () => ({ unready: gateway.unready(), counted: await registry.getMetricsAsJSON() }))
    else if (config.adminPort !== -1) await openAdmin(overseen, config.adminPort, config.adminHost, onAdminError)
    log.info({ port, mode: config.mode, provider: config.provider, routes: gateway.table.size, pid: process.pid }, 'listening')
    reportListening()
    closeOnSignal(gateway, () => ring.close())
  } catch (error) {
    exitOnStart(error)
  }
}

function closeOnSignal(gateway: Gateway, after: () => void): void {
  let closing = false
  const close = (signal: string): void => {
    // Twice means now.
    if (closing) process.exit(1)
    closing = true
    log.info({ signal }, 'draining')
    gateway.close().then(
      () => {
        log.info('closed')
        after()
        process.exit(0)
      },
      (error: unknown) => {
        log.error({ err: error }, 'could not close')
        process.exit(1)
      },
    )
  }
  process.on('SIGTERM', close)
  // Ctrl-C reaches workers and their parent alike; the parent's SIGTERM is the one that counts.
  process.on('SIGINT', (signal) => void (cluster.isPrimary && close(signal)))
}
