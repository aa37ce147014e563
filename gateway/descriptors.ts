/** How many client connections the process can serve. */
import { readFileSync } from 'node:fs'

/** Listener, log files, timers, the route stream. */
const reserved = 200
/** A client's own and one towards its sandbox; and for each ten clients one more comes who is refused (`refusalMargin`). */
const perClient = 2.1

/** @param limits text of /proc/self/limits @returns connections that fit, or Infinity when there is no limit */
export function connectionsThatFit(limits: string): number {
  const soft = /^Max open files\s+(\d+)/m.exec(limits)?.[1]
  return soft === undefined ? Infinity : Math.max(16, Math.floor((Number(soft) - reserved) / perClient))
}

export function readLimits(): string {
  try {
    return readFileSync('/proc/self/limits', 'utf8')
  } catch {
    return ''
  }
}
