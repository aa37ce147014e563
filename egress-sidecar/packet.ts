/**
 * DNS messages (RFC 1035) as raw bytes: the question, the few fields of an answer that a verdict needs, and the replies we make.
 * Everything else in a message is forwarded untouched. All loops are bounded by the message's length, never by what it claims.
 */
import type { Verdict } from '#policies/verdict.ts'

export const rcodes = { noError: 0, formErr: 1, servFail: 2, nxDomain: 3, notImp: 4, refused: 5 } as const
export const recordTypes = { a: 1, ns: 2, cname: 5, aaaa: 28, svcb: 64, https: 65, any: 255 } as const

export const headerLength = 12
const classIn = 1
/** No client's question is longer (name 255, fixed parts, EDNS with a cookie and padding); the original reads no more either. */
const maxQuestionMessage = 512
/** RFC 1035 3.1: a name has at most 255 bytes on the wire. */
const maxNameLength = 255
/** Labels and pointers of one name: 127 labels fill 255 bytes. */
const maxDepth = 255
/** Resolvers give up at chains of 8 to 16; a longer one is an attack. */
const maxChain = 16

export type Question = {
  /** Lower case without the trailing dot, '' for the root; null when a label has bytes other than letters, digits, `-`, `_`. */
  readonly name: string | null
  readonly type: number
  readonly class: number
  /** Offset of the first byte behind the question. */
  readonly end: number
  /** For the judge of names: what it said of this one, and by which rules. */
  readonly judged: { policy: number; verdict: Verdict | null }
}

/** A question; or the rcode to refuse the message with; or null for what must not be answered at all (too short, itself a reply). */
export function readQuestion(message: Buffer): Question | number | null {
  if (message.length < headerLength) return null
  const flags = uint16(message, 2)
  if ((flags & 0x8000) !== 0) return null
  if ((flags & 0x7800) !== 0) return rcodes.notImp
  const oneQuestion = uint16(message, 4) === 1 && uint16(message, 6) === 0 && uint16(message, 8) <= 1 && uint16(message, 10) <= 2
  if (!oneQuestion || message.length > maxQuestionMessage) return rcodes.formErr
  const nameEnd = endOfPlainName(message, headerLength)
  if (nameEnd === -1 || nameEnd + 4 > message.length) return rcodes.formErr
  return rememberedQuestion(message, nameEnd)
}

export function uint16(message: Buffer, at: number): number {
  return ((message[at] as number) << 8) | (message[at + 1] as number)
}

/**
 * Questions seen lately, byte for byte: programs ask for the same few names again and again, and a string that is made anew has to be hashed
 * anew by everybody who looks it up. A slot holds the last question of its hash; long ones, the carriers of tunnels, have no place here.
 */
const recent = { slots: 2048, width: 64 } as const
const recentBytes = new Uint8Array(recent.slots * recent.width)
const recentQuestions: (Question | null)[] = Array<null>(recent.slots).fill(null)

function rememberedQuestion(message: Buffer, nameEnd: number): Question {
  const end = nameEnd + 4
  const length = end - headerLength
  if (length > recent.width) return newQuestion(message, nameEnd)
  let hash = 0
  for (let at = headerLength; at < end; at++) hash = (Math.imul(hash, 31) + (message[at] as number)) | 0
  const slot = (hash ^ (hash >>> 11)) & (recent.slots - 1)
  const from = slot * recent.width
  const before = recentQuestions[slot] as Question | null
  let same = 0
  if (before !== null && before.end === end) while (same < length && recentBytes[from + same] === message[headerLength + same]) same++
  if (before !== null && same === length) return before
  for (let i = 0; i < length; i++) recentBytes[from + i] = message[headerLength + i] as number
  return (recentQuestions[slot] = newQuestion(message, nameEnd))
}

function newQuestion(message: Buffer, nameEnd: number): Question {
  return { name: plainName(message, headerLength, nameEnd), type: uint16(message, nameEnd), class: uint16(message, nameEnd + 2), end: nameEnd + 4, judged: { policy: 0, verdict: null } }
}

/** Offset behind an uncompressed name, or -1. Compression has no place in a question: there is nothing to point at. */
function endOfPlainName(message: Buffer, start: number): number {
  let at = start
  for (;;) {
    const length = message[at]
    if (length === undefined || length > 63) return -1
    at += length + 1
    if (at - start > maxNameLength) return -1
    if (length === 0) return at
  }
}

const nameBytes = Buffer.alloc(maxNameLength)
/** Lower-cased byte of a harmless label, 0 for every other. */
export const labelByte = new Uint8Array(256)
for (const char of 'abcdefghijklmnopqrstuvwxyz0123456789-_') labelByte[char.charCodeAt(0)] = char.charCodeAt(0)
for (let code = 65; code <= 90; code++) labelByte[code] = code + 32

// Decided on wire labels: a dot, NUL or percent sign inside a label must not read as a label border later.
function plainName(message: Buffer, start: number, end: number): string | null {
  let at = start
  let written = 0
  while (at < end - 1) {
    const labelEnd = at + 1 + (message[at] as number)
    for (at++; at < labelEnd; at++) {
      const byte = labelByte[message[at] as number] as number
      if (byte === 0) return null
      nameBytes[written++] = byte
    }
    nameBytes[written++] = 0x2e
  }
  return nameBytes.toString('latin1', 0, Math.max(0, written - 1))
}

/** An A or AAAA record at the end of the question's CNAME chain. */
export type AddressRecord = { readonly address: string; readonly type: number; readonly rdata: number }

export type Answer = {
  readonly rcode: number
  /** Addresses the question's name leads to, in order. */
  readonly addresses: readonly AddressRecord[]
  /** Names of the CNAME chain behind the question's name; null for one with unusual bytes. */
  readonly aliases: readonly (string | null)[]
  /** Lowest TTL of the chain and its addresses, in seconds; values with the top bit set count as 0 (RFC 2181 8). */
  readonly ttl: number
  /** Offsets of the TTLs in the answer section. */
  readonly ttlOffsets: readonly number[]
  /** HTTPS and SVCB records of the chain. */
  readonly services: readonly ServiceRecord[]
  /** Records that lead elsewhere without belonging to the question: addresses of others or of other classes, HTTPS and SVCB records behind the answer section. */
  readonly strays: boolean
}

/** `rdata` and `length` delimit the record's data in the message. */
export type ServiceRecord = { readonly type: number; readonly rdata: number; readonly length: number }

const none: readonly never[] = []

/** Names by their offset; most replies have none but the question's. */
type KnownNames = { at: Map<number, string> | null }

type FoundRecord = { owner: string; type: number; ttl: number; rdata: number; length: number }

/** Reads a reply to `question` (its echo was checked before). Null when it is malformed: nothing of it may be used. */
export function readAnswer(message: Buffer, question: Question): Answer | null {
  const flags = uint16(message, 2)
  const claimed = uint16(message, 6)
  let records: FoundRecord[] | null = null
  let ttlOffsets: number[] | null = null
  let aliasOf: Map<string, Alias> | null = null
  let foreign = false
  const names: KnownNames = { at: null }
  // A question that was allowed has a name without unusual bytes, the same in both forms.
  const asked = question.name ?? (readName(message, headerLength, names) as string)
  let at = question.end

  for (let i = 0; i < claimed; i++) {
    const owner = message[at] === 0xc0 && message[at + 1] === headerLength ? asked : readName(message, at, names)
    at = skipName(message, at)
    if (owner === null || at === -1 || at + 10 > message.length) return null
    const type = uint16(message, at)
    const isIn = uint16(message, at + 2) === classIn
    const rawTtl = message.readUInt32BE(at + 4)
    const length = uint16(message, at + 8)
    const rdata = at + 10
    if (rdata + length > message.length) return null
    const ttl = rawTtl > 0x7fffffff ? 0 : rawTtl
    // Not every client's library looks at the class.
    if (!isIn && leadsElsewhere.has(type)) foreign = true
    if (isIn && type === recordTypes.cname) {
      const target = readName(message, rdata, names)
      // With more data than the name, two readers would go on at two places.
      if (target === null || skipName(message, rdata) !== rdata + length) return null
      aliasOf ??= new Map()
      if (!aliasOf.has(owner)) aliasOf.set(owner, { target, ttl })
      ttlOffsets = added(ttlOffsets, at + 4)
    } else if (isIn && (type === recordTypes.a || type === recordTypes.aaaa)) {
      if (length !== (type === recordTypes.a ? 4 : 16)) return null
      records = added(records, { owner, type, ttl, rdata, length })
      ttlOffsets = added(ttlOffsets, at + 4)
    } else if (isIn && (type === recordTypes.https || type === recordTypes.svcb)) {
      records = added(records, { owner, type, ttl, rdata, length })
      ttlOffsets = added(ttlOffsets, at + 4)
    }
    at = rdata + length
  }
  return followChain(message, { flags, asked, aliasOf, records: records ?? none, ttlOffsets: ttlOffsets ?? none, strays: foreign || holdsServices(message, at) })
}

const leadsElsewhere: ReadonlySet<number> = new Set([recordTypes.a, recordTypes.cname, recordTypes.aaaa, recordTypes.svcb, recordTypes.https])

/** Whether an HTTPS or SVCB record (RFC 9460 4.1 lets them come along) is behind the answer section, or something that cannot be read. */
function holdsServices(message: Buffer, start: number): boolean {
  const claimed = uint16(message, 8) + uint16(message, 10)
  let at = start
  for (let i = 0; i < claimed; i++) {
    at = skipName(message, at)
    if (at === -1 || at + 10 > message.length) return true
    const type = uint16(message, at)
    if (type === recordTypes.https || type === recordTypes.svcb) return true
    at += 10 + uint16(message, at + 8)
  }
  return at > message.length
}

/** The list with the item at its end; most lists have one, and `[]` would make room for seventeen. */
export function added<T>(list: T[] | null, item: T): T[] {
  if (list === null) return [item]
  list.push(item)
  return list
}

type Alias = { readonly target: string; readonly ttl: number }

type Collected = { flags: number; asked: string; aliasOf: ReadonlyMap<string, Alias> | null; records: readonly FoundRecord[]; ttlOffsets: readonly number[]; strays: boolean }

function followChain(message: Buffer, { flags, asked, aliasOf, records, ttlOffsets, strays: before }: Collected): Answer | null {
  const chain = [asked]
  let aliases: readonly (string | null)[] = none
  let ttl = 0x7fffffff
  if (aliasOf !== null) {
    for (let link = aliasOf.get(asked); link !== undefined; link = aliasOf.get(link.target)) {
      if (chain.includes(link.target) || chain.length > maxChain) return null
      chain.push(link.target)
      ttl = Math.min(ttl, link.ttl)
    }
    aliases = chain.slice(1).map(harmlessName)
  }
  let addresses: AddressRecord[] | null = null
  let services: ServiceRecord[] | null = null
  let strays = before
  for (const record of records) {
    if (record.owner !== asked && !chain.includes(record.owner)) strays = true
    else {
      ttl = Math.min(ttl, record.ttl)
      if (record.type === recordTypes.a || record.type === recordTypes.aaaa) addresses = added(addresses, { address: formatAddress(message, record.rdata, record.length), type: record.type, rdata: record.rdata })
      else services = added(services, { type: record.type, rdata: record.rdata, length: record.length })
    }
  }
  return { rcode: flags & 0xf, addresses: addresses ?? none, aliases, ttl, ttlOffsets, services: services ?? none, strays }
}

/** A slash, too: reverse zones smaller than a network lead through such names (RFC 2317), and nobody takes it for the border of a label. */
function harmlessName(name: string): string | null {
  for (let i = 0; i < name.length; i++) if (name[i] !== '.' && name[i] !== '/' && labelByte[name.charCodeAt(i)] === 0) return null
  return name
}

/**
 * A possibly compressed name as lower-case text; a byte that could be taken for a label border is escaped. Null when malformed. Label by
 * label, each remembered, so that a message costs as much as it has bytes, however its names point into each other.
 */
function readName(message: Buffer, at: number, known: KnownNames, depth = 0): string | null {
  const before = known.at?.get(at)
  if (before !== undefined) return before
  const length = message[at]
  if (length === undefined || depth > maxDepth) return null
  let text: string | null = ''
  if (length >= 0xc0) {
    const target = ((length & 0x3f) << 8) | (message[at + 1] ?? 0)
    // Only backwards; where labels lead round in a circle all the same, the depth ends it.
    if (at + 1 >= message.length || target >= at || target < headerLength) return null
    text = readName(message, target, known, depth + 1)
  } else if (length > 63 || at + 1 + length > message.length) return null
  else if (length > 0) {
    const rest = readName(message, at + 1 + length, known, depth + 1)
    if (rest === null) return null
    const label = message.toString('latin1', at + 1, at + 1 + length).toLowerCase().replaceAll('.', '\\.')
    text = rest === '' ? label : `${label}.${rest}`
  }
  if (text === null || text.length > maxNameLength) return null
  known.at ??= new Map()
  known.at.set(at, text)
  return text
}

function skipName(message: Buffer, start: number): number {
  let at = start
  for (;;) {
    const length = message[at]
    if (length === undefined || (length > 63 && length < 0xc0)) return -1
    if (length >= 0xc0) return at + 2
    if (length === 0) return at + 1
    at += length + 1
  }
}

/** Text of an address; the IPv6 form is not the shortest but valid. */
function formatAddress(message: Buffer, at: number, length: number): string {
  if (length === 4) return formatFour(message, at)
  let text = message.readUInt16BE(at).toString(16)
  for (let i = 2; i < 16; i += 2) text += `:${message.readUInt16BE(at + i).toString(16)}`
  return text
}

// As with questions: the same text again instead of a new one that has to be hashed.
const fourSlots = 2048
const fourValues = new Int32Array(fourSlots)
const fourTexts = Array<string>(fourSlots).fill('0.0.0.0')

function formatFour(message: Buffer, at: number): string {
  const value = message.readInt32BE(at)
  const slot = (value ^ (value >>> 11)) & (fourSlots - 1)
  if (fourValues[slot] !== value) {
    fourValues[slot] = value
    fourTexts[slot] = `${value >>> 24}.${(value >>> 16) & 255}.${(value >>> 8) & 255}.${value & 255}`
  }
  return fourTexts[slot] as string
}

/** A reply without records: id, opcode, RD and CD of the question, its text with the case it had. */
export function emptyReply(query: Buffer, questionEnd: number, rcode: number): Buffer {
  const reply = Buffer.from(query.subarray(0, questionEnd))
  const flags = query.readUInt16BE(2)
  reply.writeUInt16BE(0x8000 | (flags & 0x7910) | rcode, 2)
  reply.writeUInt16BE(questionEnd > headerLength ? 1 : 0, 4)
  reply.fill(0, 6, headerLength)
  return reply
}

/** The refusal of a message that has no readable question. */
export function headerReply(query: Buffer, rcode: number): Buffer {
  return emptyReply(query, headerLength, rcode)
}

/** "Ask again over TCP." */
export function isTruncated(message: Buffer): boolean {
  return (uint16(message, 2) & 0x0200) !== 0
}

/** The same reply with the truncation bit: "ask again over TCP". */
export function truncatedReply(query: Buffer, questionEnd: number): Buffer {
  const reply = emptyReply(query, questionEnd, rcodes.noError)
  reply.writeUInt16BE(reply.readUInt16BE(2) | 0x0280, 2)
  return reply
}

/** A record for `listReply`; its owner is the question's name. */
export type ReplyRecord = { readonly type: number; readonly ttl: number; readonly data: Buffer }

/** A reply with records that all belong to the question's name: a chain of aliases is folded away. */
export function listReply(query: Buffer, questionEnd: number, rcode: number, records: readonly ReplyRecord[]): Buffer {
  const parts = [emptyReply(query, questionEnd, rcode)]
  const head = parts[0] as Buffer
  head.writeUInt16BE(head.readUInt16BE(2) | 0x0080, 2)
  head.writeUInt16BE(records.length, 6)
  for (const { type, ttl, data } of records) {
    const fixed = Buffer.alloc(12)
    fixed.writeUInt16BE(0xc000 | headerLength, 0)
    fixed.writeUInt16BE(type, 2)
    fixed.writeUInt16BE(classIn, 4)
    fixed.writeUInt32BE(ttl, 6)
    fixed.writeUInt16BE(data.length, 10)
    parts.push(fixed, data)
  }
  return Buffer.concat(parts)
}

/** Lowers every listed TTL to `seconds` at most, in place. */
export function capTtls(message: Buffer, offsets: readonly number[], seconds: number): void {
  for (const offset of offsets) if (message.readUInt32BE(offset) > seconds) message.writeUInt32BE(seconds, offset)
}
