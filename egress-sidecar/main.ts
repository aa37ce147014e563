/** The egress sidecar: guards one sandbox's network namespace from inside. Configured by environment variables only (README.md). */
import { ConfigError } from '#policies/config.ts'
import { readConfig, type Config } from './config.ts'
import { createLog } from './log.ts'
import { createSidecar } from './sidecar.ts'

const exitCodes = { failed: 1, usage: 64 } as const
/** Whatever hangs at the end must not keep the container alive: its end is what closes the sandbox's network. */
const closeTimeoutMs = 3000
/** Once; it takes some 30 ms. The image starts Node with `--expose-gc`. */
const collectAfterMs = 1000

function readConfigOrExit(): Config {
  try {
    return readConfig(process.env)
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    for (const { path, reason } of error.problems) process.stderr.write(`${path === '' ? '' : `${path}: `}${reason}\n`)
    process.exit(exitCodes.usage)
  }
}

const config = readConfigOrExit()
const log = createLog({ level: config.logLevel, outputs: config.logOutput.split(','), sandboxId: config.sandboxId, attributes: config.attributes })
for (const { path, reason } of config.ignored) log.event('warn', 'egress.config', `${path}: ${reason}`)
const sidecar = createSidecar(config, log, failed)

let ending = false
function end(code: number): void {
  if (ending) return
  ending = true
  setTimeout(() => process.exit(code), closeTimeoutMs).unref()
  void sidecar.close().finally(() => process.exit(code))
}
function failed(reason: string): void {
  if (ending) return
  log.event('fatal', 'egress.failed', reason)
  end(exitCodes.failed)
}
for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  process.on(signal, () => {
    log.event('info', 'egress.stopping', `stopping on ${signal}; the rules stay`)
    end(0)
  })
}
try {
  await sidecar.start()
  // Starting leaves megabytes behind, and an idle process would never collect them. Not at once: who created the sandbox is waiting for us.
  setTimeout(() => globalThis.gc?.({ type: 'major', execution: 'sync', flavor: 'last-resort' }), collectAfterMs).unref()
} catch (error) {
  failed((error as Error).message)
}
