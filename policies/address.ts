/**
 * IP addresses and networks: strict reading, canonical text, and tables that find the rule covering an address.
 * An IPv4 address written inside IPv6 (`::ffff:1.2.3.4`) leaves the machine as IPv4, so rules treat the two as one.
 */
import ipaddr from 'ipaddr.js'

/** An address read once and asked about often: 32 bits as a number, 128 as a bigint. `mapped`: it was IPv4 written inside IPv6. */
export type Address =
  | { readonly family: 4; readonly value: number; readonly mapped: boolean }
  | { readonly family: 6; readonly value: bigint; readonly mapped: false }
/** Host bits are zero. */
export type Network =
  | { readonly family: 4; readonly value: number; readonly prefix: number }
  | { readonly family: 6; readonly value: bigint; readonly prefix: number }

/** The 96 bits before an IPv4 address inside IPv6 (RFC 4291 2.5.5.2). */
const mappedPrefix = 0xffffn

/** Strict: four decimal parts without leading zeros, or RFC 4291 text without a zone. Null for anything else. */
export function readAddress(text: string): Address | null {
  const four = readFour(text)
  if (four !== -1) return { family: 4, value: four, mapped: false }
  if (!text.includes(':') || text.includes('%')) return null
  const six = readSix(text)
  if (six === null) return null
  return six >> 32n === mappedPrefix ? { family: 4, value: Number(six & 0xffffffffn), mapped: true } : { family: 6, value: six, mapped: false }
}

/** Hot: every IPv4 address of every DNS answer and every peer comes through here. -1 when the text is not one. */
function readFour(text: string): number {
  let value = 0
  let part = -1
  let dots = 0
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    if (code === 0x2e) {
      if (part === -1 || ++dots > 3) return -1
      value = value * 256 + part
      part = -1
    } else {
      // A part that is 0 so far takes no more digits: leading zeros read as octal elsewhere.
      if (code < 0x30 || code > 0x39 || part === 0) return -1
      part = (part === -1 ? 0 : part * 10) + code - 0x30
      if (part > 255) return -1
    }
  }
  return dots === 3 && part !== -1 ? value * 256 + part : -1
}

function readSix(text: string): bigint | null {
  try {
    let value = 0n
    for (const part of ipaddr.IPv6.parse(text).parts) value = (value << 16n) | BigInt(part)
    return value
  } catch {
    return null
  }
}

/** The one spelling of an address (RFC 5952 for IPv6, IPv4 for v4-mapped), or null when the text is not an address. */
export function canonicalAddress(text: string): string | null {
  const address = readAddress(text)
  if (address === null) return null
  return address.family === 4 && !address.mapped ? text : formatAddress(address)
}

/** The same of an address that was read before. Of a network: its first one. */
export function formatAddress(address: Address | Network): string {
  const { family, value } = address
  if (family === 4) return `${value >>> 24}.${(value >>> 16) & 255}.${(value >>> 8) & 255}.${value & 255}`
  const parts: number[] = []
  for (let shift = 112n; shift >= 0n; shift -= 16n) parts.push(Number((value >> shift) & 0xffffn))
  return new ipaddr.IPv6(parts).toRFC5952String()
}

function mask4(value: number, prefix: number): number {
  return prefix === 0 ? 0 : (value & (-1 << (32 - prefix))) >>> 0
}

function mask6(value: bigint, prefix: number): bigint {
  const drop = BigInt(128 - prefix)
  return (value >> drop) << drop
}

/** Reads `10.0.0.0/8`, `fd00::/8` or a single address. Host bits are masked away; a network inside ::ffff:0:0/96 is its IPv4 one. */
export function readNetwork(text: string): Network | null {
  const slash = text.indexOf('/')
  const address = readAddress(slash === -1 ? text : text.slice(0, slash))
  if (address === null) return null
  const widest = address.family === 6 || address.mapped ? 128 : 32
  let prefix = widest
  if (slash !== -1) {
    const digits = text.slice(slash + 1)
    if (!/^(0|[1-9]\d{0,2})$/.test(digits) || Number(digits) > widest) return null
    prefix = Number(digits)
  }
  if (address.family === 6) return { family: 6, value: mask6(address.value, prefix), prefix }
  if (!address.mapped) return { family: 4, value: mask4(address.value, prefix), prefix }
  if (prefix >= 96) return { family: 4, value: mask4(address.value, prefix - 96), prefix: prefix - 96 }
  return { family: 6, value: mask6((mappedPrefix << 32n) | BigInt(address.value), prefix), prefix }
}

/** Canonical text of a network; a network of one address is written without its prefix. */
export function formatNetwork(network: Network): string {
  const address = formatAddress(network)
  return network.prefix === (network.family === 4 ? 32 : 128) ? address : `${address}/${network.prefix}`
}

/** Networks, each with a value; the lookup finds the lowest value of those that cover an address. */
export class NetworkTable {
  // Per prefix length one map: a lookup costs as many steps as there are different lengths, not rules.
  readonly #four = new Map<number, Map<number, number>>()
  readonly #six = new Map<number, Map<bigint, number>>()

  add(network: Network, value: number): void {
    if (network.family === 4) put(this.#four, network.prefix, network.value, value)
    else put(this.#six, network.prefix, network.value, value)
  }

  /** Lowest value of the networks covering `address`. Text that is no address is covered by nothing. */
  find(address: string | Address): number | undefined {
    const read = typeof address === 'string' ? readAddress(address) : address
    if (read === null) return undefined
    let best: number | undefined
    if (read.family === 4) for (const [prefix, level] of this.#four) best = lower(best, level.get(mask4(read.value, prefix)))
    else for (const [prefix, level] of this.#six) best = lower(best, level.get(mask6(read.value, prefix)))
    return best
  }
}

function put<K>(levels: Map<number, Map<K, number>>, prefix: number, key: K, value: number): void {
  let level = levels.get(prefix)
  if (level === undefined) levels.set(prefix, (level = new Map()))
  level.set(key, Math.min(value, level.get(key) ?? Infinity))
}

function lower(a: number | undefined, b: number | undefined): number | undefined {
  return a === undefined || (b !== undefined && b < a) ? b : a
}

/**
 * Addresses that no public name should lead to (DNS rebinding): this host, private and shared space, link-local with cloud
 * metadata, multicast, reserved, and the IPv6 forms that carry an IPv4 address (mapped, NAT64, 6to4, Teredo).
 * Documentation and benchmark ranges are ordinary addresses.
 */
export const specialUseNetworks = [
  '0.0.0.0/8', '10.0.0.0/8', '100.64.0.0/10', '127.0.0.0/8', '169.254.0.0/16', '172.16.0.0/12', '192.168.0.0/16', '224.0.0.0/4', '240.0.0.0/4',
  '::', '::1', 'fe80::/10', 'fc00::/7', 'ff00::/8', '64:ff9b::/96', '64:ff9b:1::/48', '2002::/16', '2001::/32',
] as const

const specialUse = new NetworkTable()
for (const text of specialUseNetworks) specialUse.add(readNetwork(text) as Network, 0)

/** Is it one of the special-use addresses above, or v4-mapped, or no address at all? */
export function isSpecialUse(address: string | Address): boolean {
  const read = typeof address === 'string' ? readAddress(address) : address
  return read === null || read.mapped || specialUse.find(read) !== undefined
}
