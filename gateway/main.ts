/** The gateway program: configuration, logger, signals, workers. Everything else is in `gateway.ts`. */
import cluster from 'node:cluster'
import { createServer, type Server } from 'node:http'
import pino from 'pino'
import { ConfigError } from '#policies/config.ts'
import { openAccessLog } from './access-log.ts'
import { KeyRing } from './key-ring.ts'
import { readGatewayConfig, type GatewayConfig, type ReadConfig } from './config.ts'
import { connectionsThatFit, readLimits } from './descriptors.ts'
import { createGateway, type Gateway } from './gateway.ts'
import { postRenewals } from './providers/renewal-post.ts'
import { ServerProvider } from './providers/server.ts'
import { StaticProvider } from './providers/static.ts'
import { reportListening, superviseWorkers } from './workers.ts'

/** EX_USAGE of sysexits.h: the configuration is wrong, and starting again will not help. */
const exitUsage = 64
/** EX_UNAVAILABLE: the port or its address cannot be had now. */
const exitUnavailable = 69
const levels = new Set(['debug', 'info', 'warn', 'error', 'fatal'])

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
const log = pino({ level: levels.has(config.logLevel) ? config.logLevel : 'info', base: null, name: 'sallyport.gateway', timestamp: pino.stdTimeFunctions.isoTime, formatters: { level: (label) => ({ level: label }) } })
if (cluster.isPrimary) for (const warning of warnings) log.warn(warning)
if (cluster.isPrimary && fits < wanted.maxConnections) log.warn({ maxConnections: fits, wanted: wanted.maxConnections }, 'the descriptor limit allows fewer connections: raise ulimit -n')

if (config.workers > 1 && cluster.isPrimary) superviseWorkers(config.workers, config.drainTimeout, log)
else await serve(config)

async function serve(config: GatewayConfig): Promise<void> {
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
    const admin = await openAdmin(gateway, config)
    log.info({ port, mode: config.mode, provider: config.provider, routes: gateway.table.size, pid: process.pid }, 'listening')
    reportListening()
    closeOnSignal(gateway, admin, () => ring.close())
  } catch (error) {
    exitOnStart(error)
  }
}

/** Prometheus text for the operator, on a listener of its own. */
async function openAdmin(gateway: Gateway, config: GatewayConfig): Promise<Server | null> {
  if (config.adminPort === -1) return null
  const { registry } = gateway.metrics
  const server = createServer((request, response) => {
    if (request.method !== 'GET' || request.url !== '/metrics') {
      response.writeHead(404, { 'content-type': 'text/plain' }).end('not found\n')
      return
    }
    registry.metrics().then(
      (text) => response.writeHead(200, { 'content-type': registry.contentType }).end(text),
      (error: unknown) => {
        log.error({ err: error }, 'metrics failed')
        response.writeHead(500).end()
      },
    )
  })
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(config.adminPort, config.adminHost, resolve))
  return server
}

function closeOnSignal(gateway: Gateway, admin: Server | null, after: () => void): void {
  let closing = false
  const close = (signal: string): void => {
    // Twice means now.
    if (closing) process.exit(1)
    closing = true
    log.info({ signal }, 'draining')
    gateway.close().then(
      () => {
        admin?.close()
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
