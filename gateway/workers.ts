/**
 * Several processes behind one port. Each worker binds the port itself with SO_REUSEPORT and the kernel spreads new connections by
 * hash, so no process hands descriptors to another and none is a bottleneck. Every worker holds its own routes, pools and limits.
 */
import cluster, { type Worker } from 'node:cluster'
import type { Logger } from 'pino'
import type { Fleet } from './fleet.ts'

/** What a worker tells its parent once its port is open. */
const listening = 'listening'
const firstRestartMs = 500
const longestRestartMs = 30_000
/** A worker that lived this long was well: its death is not held against the next. */
const steadyMs = 60_000

/** ms until a dead worker is replaced. @param quick deaths in a row of workers that did not live long, this one included */
export function restartDelay(quick: number): number {
  return Math.min(firstRestartMs * 2 ** Math.max(quick - 1, 0), longestRestartMs)
}

/** Called by a worker when clients can reach it. */
export function reportListening(): void {
  process.send?.(listening)
}

export type Supervision = {
  readonly count: number
  /** ms until workers that still run are killed at shutdown, and a little more. */
  readonly drainTimeout: number
  readonly log: Logger
  /** Told who lives. */
  readonly fleet: Fleet
  /** Called when no worker will be started any more. */
  readonly onClosing: () => void
}

/**
 * Keeps `count` workers running. The first one goes ahead: what keeps it from listening would keep them all, and is said once. Until
 * every worker has listened, a death ends the program with that worker's exit code; after that it is replaced, ever later while
 * replacements die young.
 */
export function superviseWorkers({ count, drainTimeout, log, fleet, onClosing }: Supervision): void {
  const born = new Map<number, number>()
  let closing = false
  let awaited = count
  let quick = 0
  const fork = (): void => {
    const worker = cluster.fork()
    born.set(worker.id, performance.now())
    worker.once('message', (message: unknown) => {
      if (message !== listening || closing) return
      fleet.join(worker)
      if (awaited === count) for (let i = 1; i < count; i++) fork()
      awaited--
    })
  }
  fork()

  cluster.on('exit', (worker: Worker, code: number | null, signal: string | null) => {
    fleet.leave(worker)
    if (closing) {
      if (Object.keys(cluster.workers ?? {}).length === 0) process.exit(0)
      return
    }
    if (awaited > 0) {
      log.fatal({ pid: worker.process.pid, code, signal }, 'a worker died before it listened')
      // The others end when they lose their parent.
      process.exit(code === null || code === 0 ? 1 : code)
    }
    const lived = performance.now() - (born.get(worker.id) ?? 0)
    born.delete(worker.id)
    quick = lived < steadyMs ? quick + 1 : 0
    const wait = restartDelay(quick)
    log.error({ pid: worker.process.pid, code, signal, restart_ms: wait }, 'worker died')
    setTimeout(() => closing || fork(), wait)
  })

  const close = (): void => {
    if (closing) process.exit(1)
    closing = true
    fleet.closing = true
    onClosing()
    for (const worker of Object.values(cluster.workers ?? {})) worker?.process.kill('SIGTERM')
    setTimeout(() => {
      for (const worker of Object.values(cluster.workers ?? {})) worker?.process.kill('SIGKILL')
    }, drainTimeout + 5_000).unref()
  }
  process.on('SIGTERM', close)
  process.on('SIGINT', close)
}
