/** Log lines with the original's keys: level, ts, logger, msg, sandbox_id and the event's own. */
import { pino, multistream, destination, type Level, type StreamEntry } from 'pino'
import { canonicalAddress } from '#policies/address.ts'
import type { Outcome } from './answer.ts'
import { rcodes, recordTypes } from './packet.ts'

export type Log = {
  event(level: Level, event: string, message: string, fields?: object): void
  outcome(outcome: Outcome): void
  /** A warning of a kind that the sandbox can cause as often as it likes. */
  limited(event: string, message: string): void
  flush(): void
}

export type LogOptions = {
  readonly level: Level
  readonly outputs: readonly string[]
  readonly sandboxId: string
  /** On every line, beside our own keys. */
  readonly attributes: ReadonlyMap<string, string>
}

/**
 * Lines of one kind per second; what is beyond is counted and told once. The sandbox decides how many questions there are. Each kind has its own, or
 * answers to harmless questions would hide what was denied.
 */
const linesPerSecond = 100

/** A reply may hold hundreds. */
const maxLoggedAddresses = 16

export function createLog({ level, outputs, sandboxId, attributes }: LogOptions): Log {
  const open = (output: string): ReturnType<typeof destination> => {
    const stream = destination({ dest: output === 'stdout' ? 1 : output === 'stderr' ? 2 : output, sync: true, mkdir: true })
    // A full disk costs lines, not the sandbox.
    return stream.on('error', () => undefined)
  }
  const streams = outputs.map((output): StreamEntry => ({ level, stream: open(output) }))
  const base = { ...Object.fromEntries(attributes), logger: 'opensandbox.egress', ...(sandboxId === '' ? {} : { sandbox_id: sandboxId }) }
  const log = pino({ level, base, timestamp: () => `,"ts":"${new Date().toISOString()}"`, formatters: { level: (label) => ({ level: label }) } }, multistream(streams))
  let second = 0
  const lines = new Map<string, number>()
  let missing = 0
  let telling: NodeJS.Timeout | null = null

  function tellDropped(): void {
    if (telling !== null) clearTimeout(telling)
    telling = null
    if (missing > 0) log.warn({ 'opensandbox.event': 'egress.lines_dropped', dropped: missing }, 'more events than log lines')
    missing = 0
  }

  /** @param kind one of a closed list */
  function dropped(kind: string): boolean {
    const now = Math.floor(Date.now() / 1000)
    if (now !== second) {
      second = now
      lines.clear()
    }
    const count = (lines.get(kind) ?? 0) + 1
    lines.set(kind, count)
    if (count <= linesPerSecond) return false
    missing++
    // A timer: nobody may ask any more.
    telling ??= setTimeout(tellDropped, 1000).unref()
    return true
  }

  return {
    event: (eventLevel, event, message, fields = {}) => log[eventLevel]({ 'opensandbox.event': event, ...fields }, message),
    outcome({ question, verdict, rules, alias, result, addresses, shut, rcode, took }) {
      if (dropped(result === 'answered' || result === 'denied' ? result : 'failed')) return
      const fields = { 'target.host': question.name ?? '(malformed)', qtype: typeName(question.type), took_ms: Math.round(took * 100) / 100 }
      if (result === 'denied') log.info({ 'opensandbox.event': 'egress.denied', ...fields, reason: verdict.reason, rule: verdict.rule, target: rules.written[verdict.rule ?? -1]?.target, ...(alias === undefined ? {} : { via: alias ?? '(malformed)' }) }, 'egress denied')
      else log.info({ 'opensandbox.event': 'egress.outbound', ...fields, ...(addresses.length > 0 ? { 'target.ips': addresses.slice(0, maxLoggedAddresses) } : {}), ...(shut.length > 0 ? { left_out: shut.slice(0, maxLoggedAddresses).map(({ address, reason }) => ({ ip: canonicalAddress(address), reason })) } : {}), ...(result !== 'answered' ? { error: result } : rcode === rcodes.noError ? {} : { rcode }) }, 'egress outbound')
    },
    limited(event, message) {
      if (!dropped(event)) log.warn({ 'opensandbox.event': event }, message)
    },
    flush() {
      tellDropped()
      log.flush()
    },
  }
}

const typeNames = new Map<number, string>(Object.entries(recordTypes).map(([name, type]) => [type, name.toUpperCase()]))

function typeName(type: number): string {
  return typeNames.get(type) ?? `TYPE${type}`
}
