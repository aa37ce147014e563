/**
 * IP addresses and networks: strict reading, canonical text, and tables that find the rule covering an address.
 * An IPv4 address written inside IPv6 (`::ffff:1.2.3.4`) leaves the machine as IPv4, so rules treat the two as one.
 */
import ipaddr from 'ipaddr.js'

/** An address as a number: 32 bits for family 4, 128 for family 6. */
type Bits = { readonly family: 4 | 6; readonly value: bigint }
export type Network = { readonly family: 4 | 6; readonly value: bigint; readonly prefix: number }

const width = { 4: 32, 6: 128 } as const

/** Strict: four decimal parts without leading zeros, or RFC 4291 text without a zone. */
function readBits(text: string): Bits | null {
  if (ipaddr.IPv4.isValidFourPartDecimal(text)) return { family: 4, value: toBigInt(ipaddr.IPv4.parse(text).toByteArray()) }
  if (text.includes(':') && !text.includes('%') && ipaddr.IPv6.isValid(text)) return { family: 6, value: toBigInt(ipaddr.IPv6.parse(text).toByteArray()) }
  return null
}

function toBigInt(bytes: readonly number[]): bigint {
  let value = 0n
  for (const byte of bytes) value = (value << 8n) | BigInt(byte)
  return value
}

const mappedPrefix = 0xffffn

function unmap(bits: Bits): Bits {
  return bits.family === 6 && bits.value >> 32n === mappedPrefix ? { family: 4, value: bits.value & 0xffffffffn } : bits
}

function mask(value: bigint, prefix: number, family: 4 | 6): bigint {
  const drop = BigInt(width[family] - prefix)
  return (value >> drop) << drop
}

function formatBits(bits: Bits): string {
  const bytes: number[] = []
  for (let shift = width[bits.family] - 8; shift >= 0; shift -= 8) bytes.push(Number((bits.value >> BigInt(shift)) & 0xffn))
  // RFC 5952 writes an IPv6 address; a plain IPv4 one is four decimal parts.
  return bits.family === 4 ? bytes.join('.') : new ipaddr.IPv6(bytes).toRFC5952String()
}

/** The one spelling of an address (RFC 5952 for IPv6, IPv4 for v4-mapped), or null when the text is not an address. */
export function canonicalAddress(text: string): string | null {
  const bits = readBits(text)
  return bits === null ? null : formatBits(unmap(bits))
}

/** Reads `10.0.0.0/8`, `fd00::/8` or a single address. Host bits are masked away; a network inside ::ffff:0:0/96 is its IPv4 one. */
export function readNetwork(text: string): Network | null {
  const slash = text.indexOf('/')
  const bits = readBits(slash === -1 ? text : text.slice(0, slash))
  if (bits === null) return null
  let prefix: number = width[bits.family]
  if (slash !== -1) {
    const digits = text.slice(slash + 1)
    if (!/^(0|[1-9]\d{0,2})$/.test(digits) || Number(digits) > prefix) return null
    prefix = Number(digits)
  }
  if (prefix >= 96 && unmap(bits) !== bits) return { family: 4, value: mask(unmap(bits).value, prefix - 96, 4), prefix: prefix - 96 }
  return { family: bits.family, value: mask(bits.value, prefix, bits.family), prefix }
}

/** Canonical text of a network; a network of one address is written without its prefix. */
export function formatNetwork(network: Network): string {
  const address = formatBits(network)
  return network.prefix === width[network.family] ? address : `${address}/${network.prefix}`
}

/** Networks, each with a value; the lookup finds the lowest value of those that cover an address. */
export class NetworkTable {
  // Per prefix length one map: a lookup costs as many steps as there are different lengths, not rules.
  readonly #levels = { 4: new Map<number, Map<bigint, number>>(), 6: new Map<number, Map<bigint, number>>() }

  add(network: Network, value: number): void {
    const levels = this.#levels[network.family]
    let level = levels.get(network.prefix)
    if (level === undefined) levels.set(network.prefix, (level = new Map()))
    if (value < (level.get(network.value) ?? Infinity)) level.set(network.value, value)
  }

  /** Lowest value of the networks covering `address`. Text that is no address is covered by nothing. */
  find(address: string): number | undefined {
    const read = readBits(address)
    if (read === null) return undefined
    const bits = unmap(read)
    let best: number | undefined
    for (const [prefix, level] of this.#levels[bits.family]) {
      const value = level.get(mask(bits.value, prefix, bits.family))
      if (value !== undefined && (best === undefined || value < best)) best = value
    }
    return best
  }
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
export function isSpecialUse(address: string): boolean {
  const bits = readBits(address)
  return bits === null || unmap(bits) !== bits || specialUse.find(address) !== undefined
}
