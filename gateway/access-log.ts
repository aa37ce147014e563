/** Where access lines go: a descriptor or a file, written in large pieces that nothing waits for. */
import { mkdirSync, openSync } from 'node:fs'
import { dirname } from 'node:path'
import pino from 'pino'
import { ConfigError } from '#policies/config.ts'

/** Bytes of access lines that wait for a slow reader; what comes on top is dropped rather than kept in memory. */
const mostWaiting = 16 * 1024 * 1024
/** Bytes gathered before they are handed on: the destination counts all it holds again with every write. No line is that long. */
const piece = 32 * 1024
const flushMs = 250

/**
 * @param where `stdout`, `stderr`, `off` or a path
 * @param onLoss told once when lines begin to be lost
 * @returns takes one line, newline included; null: none are wanted
 * @throws ConfigError when the file cannot be opened
 */
export function openAccessLog(where: string, onLoss: (error: unknown) => void): ((line: string) => void) | null {
  if (where === 'off') return null
  const fd = where === 'stdout' ? 1 : where === 'stderr' ? 2 : openFile(where)
  const destination = pino.destination({ fd, sync: false, maxLength: mostWaiting })
  let lost = false
  const losing = (error: unknown): void => {
    if (!lost) onLoss(error)
    lost = true
  }
  destination.on('error', losing)
  destination.on('drop', () => losing(new Error('the reader of the access log is too slow')))
  destination.on('drain', () => (lost = false))

  // Bytes at once: a text put together from a hundred thousand small ones costs V8's collector pauses of 10 ms and more.
  const gathered = Buffer.allocUnsafe(2 * piece)
  let size = 0
  const handOn = (): void => {
    if (size > 0) destination.write(gathered.toString('utf8', 0, size))
    size = 0
  }
  setInterval(handOn, flushMs).unref()
  process.on('exit', () => {
    handOn()
    destination.flushSync()
  })
  return (line) => {
    size += gathered.write(line, size)
    if (size >= piece) handOn()
  }
}

function openFile(path: string): number {
  try {
    mkdirSync(dirname(path), { recursive: true })
    return openSync(path, 'a')
  } catch (error) {
    throw new ConfigError([{ path: '--access-log', reason: `${path} cannot be opened: ${(error as NodeJS.ErrnoException).code}` }])
  }
}
