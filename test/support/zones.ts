/** The names of the tests' internet: what its DNS server answers. Pure. */
import DNS from 'dns2'

const { Packet } = DNS

/** What one name has. A name that is not listed does not exist (NXDOMAIN); a listed one without the asked type answers empty. */
export type Records = {
  readonly a?: readonly string[]
  readonly aaaa?: readonly string[]
  /** Followed, also through further names of the zones, into one answer. */
  readonly cname?: string
  readonly txt?: readonly string[]
  readonly ptr?: string
  /** Seconds; 60 when absent. */
  readonly ttl?: number
  /** Answer with this code (2 = SERVFAIL) and nothing else. */
  readonly rcode?: number
  /** Never answer: the asker runs into its own timeout. */
  readonly silent?: boolean
}
/** Keys are lower-case names without a trailing dot, or `*.suffix` for everything below the suffix. */
export type Zones = Readonly<Record<string, Records>>

/** The records of a name; an exact entry goes before the nearest wildcard. */
export function findRecords(zones: Zones, name: string): Records | undefined {
  if (Object.hasOwn(zones, name)) return zones[name]
  for (let dot = name.indexOf('.'); dot !== -1; dot = name.indexOf('.', dot + 1)) {
    const wildcard = `*${name.slice(dot)}`
    if (Object.hasOwn(zones, wildcard)) return zones[wildcard]
  }
  return undefined
}

/** Fills the answer to one question; returns false when nothing must be sent. */
export function answerFromZones(zones: Zones, question: DNS.Packet.Question, answer: DNS.Packet): boolean {
  let name = question.name.toLowerCase()
  for (let hops = 0; hops < 8; hops++) {
    const records = findRecords(zones, name)
    if (records === undefined) {
      answer.header.rcode = Packet.RCODE.NXDOMAIN
      return true
    }
    if (records.silent === true) return false
    answer.header.rcode = records.rcode ?? 0
    if (records.rcode !== undefined) return true
    const base = { name: hops === 0 ? question.name : name, class: Packet.CLASS.IN, ttl: records.ttl ?? 60 }
    const add = (type: number, fields: object): void => void answer.answers.push({ ...base, type, ...fields } as DNS.Packet.Resource)
    if (records.cname === undefined) {
      if (question.type === Packet.TYPE.A) for (const address of records.a ?? []) add(Packet.TYPE.A, { address })
      if (question.type === Packet.TYPE.AAAA) for (const address of records.aaaa ?? []) add(Packet.TYPE.AAAA, { address })
      if (question.type === Packet.TYPE.TXT) for (const data of records.txt ?? []) add(Packet.TYPE.TXT, { data })
      if (question.type === Packet.TYPE.PTR && records.ptr !== undefined) add(Packet.TYPE.PTR, { domain: records.ptr })
      return true
    }
    add(Packet.TYPE.CNAME, { domain: records.cname })
    name = records.cname.toLowerCase()
  }
  answer.header.rcode = Packet.RCODE.SERVFAIL
  return true
}
