/** What the sandbox gets of an upstream's answer: the same bytes where nothing had to be taken away, else a reply of our own. */
import { capTtls, listReply, rcodes, recordTypes, type AddressRecord, type Answer, type Question, type ReplyRecord, type ServiceRecord } from './packet.ts'
import { lease } from './ruleset.ts'

export type ComposeInput = {
  readonly query: Buffer
  readonly question: Question
  readonly message: Buffer
  readonly found: Answer
  /** Those of `found.addresses` that are open now. */
  readonly allowed: readonly AddressRecord[]
  /** Seconds that they stay open. */
  readonly seconds: number
  /** Take address hints and encrypted hellos out of HTTPS and SVCB records. */
  readonly strict: boolean
}

/**
 * No TTL outlives the lease of the addresses. Refused addresses are left out; when something was, the reply is written anew with
 * the question's own name as owner, because names in the original may point into the part that is gone. Null when that is longer than a message
 * can be, or would deny what there is.
 */
export function composeReply({ query, question, message, found, allowed, seconds, strict }: ComposeInput): Buffer | null {
  const services = strict && found.services.length > 0 ? found.services.map((record) => cleanService(message, record)) : none
  const untouched = allowed.length === found.addresses.length && !found.strays && (services.length === 0 || services.every((data, i) => data?.length === found.services[i]?.length))
  const longest = seconds - lease.grace
  if (untouched) {
    capTtls(message, found.ttlOffsets, longest)
    return message
  }
  const ttl = Math.min(found.ttl, longest)
  const records: ReplyRecord[] = allowed.map(({ type, rdata }) => ({ type, ttl, data: message.subarray(rdata, rdata + (type === recordTypes.a ? 4 : 16)) }))
  const kept = strict ? services : found.services.map(({ rdata, length }) => message.subarray(rdata, rdata + length))
  for (const [i, data] of kept.entries()) if (data !== null) records.push({ type: found.services[i]?.type as number, ttl, data })
  // A mail exchanger beside an HTTPS record that may not be told is still there: no answer is better than "there is none".
  if (records.length === 0 && found.rcode === rcodes.noError && !rewritable.has(question.type)) return null
  const reply = listReply(query, question.end, found.rcode, records)
  return reply.length > maxMessage ? null : reply
}

/** Types of questions whose answers consist of what is judged here; 255 may be answered with a part of what there is (RFC 8482). */
const rewritable: ReadonlySet<number> = new Set([recordTypes.a, recordTypes.aaaa, recordTypes.svcb, recordTypes.https, recordTypes.any])

/** Bytes: its length has two before it over TCP. RFC 1035 4.2.2 */
const maxMessage = 65_535

const none: readonly (Buffer | null)[] = []

/** SvcParamKeys (RFC 9460 14.3.2): `mandatory`, and those that would lead around the judged name. */
const serviceKeys = { mandatory: 0, ipv4Hint: 4, ech: 5, ipv6Hint: 6 } as const
const strippedKeys: readonly number[] = [serviceKeys.ipv4Hint, serviceKeys.ech, serviceKeys.ipv6Hint]

/** The record's data without hints and ECH; null when it is malformed or declares one of them mandatory. */
function cleanService(message: Buffer, { rdata, length }: ServiceRecord): Buffer | null {
  const data = message.subarray(rdata, rdata + length)
  let at = 2
  for (;;) {
    const label = data[at]
    // The target's name is never compressed (RFC 9460 2.2).
    if (label === undefined || label > 63) return null
    at += label + 1
    if (label === 0) break
  }
  const parts = [data.subarray(0, at)]
  while (at < data.length) {
    if (at + 4 > data.length) return null
    const key = data.readUInt16BE(at)
    const end = at + 4 + data.readUInt16BE(at + 2)
    if (end > data.length) return null
    if (key === serviceKeys.mandatory) for (let i = at + 4; i + 1 < end; i += 2) if (strippedKeys.includes(data.readUInt16BE(i))) return null
    if (!strippedKeys.includes(key)) parts.push(data.subarray(at, end))
    at = end
  }
  return Buffer.concat(parts)
}
