/**
 * Several processes behind one port. Each worker binds the port itself with SO_REUSEPORT and the kernel spreads new connections by
 * hash, so no process hands descriptors to another and none is a bottleneck. Every worker holds its own routes, pools and limits.
 */
import cluster, { type Worker } from 'node:cluster'
import type { Logger } from 'pino'

/** A worker that dies is replaced, but not faster than this. */
const restartAfterMs = 500

export function superviseWorkers(count: number, drainTimeout: number, log: Logger): void {
  let closing = false
  const fork = (): void => void cluster.fork()
  for (let i = 0; i < count; i++) fork()

  cluster.on('exit', (worker: Worker, code: number | null, signal: string | null) => {
    if (closing) {
      if (Object.keys(cluster.workers ?? {}).length === 0) process.exit(0)
      return
    }
    // A worker that refuses its configuration says so once; starting it again would only repeat that.
    if (code === 64) process.exit(64)
    log.error({ pid: worker.process.pid, code, signal }, 'worker died')
    setTimeout(() => closing || fork(), restartAfterMs)
  })

  const close = (): void => {
    if (closing) process.exit(1)
    closing = true
    for (const worker of Object.values(cluster.workers ?? {})) worker?.process.kill('SIGTERM')
    setTimeout(() => {
      for (const worker of Object.values(cluster.workers ?? {})) worker?.process.kill('SIGKILL')
    }, drainTimeout + 5_000).unref()
  }
  process.on('SIGTERM', close)
  process.on('SIGINT', close)
}
