/** Host names: one normal form before anything is compared, and the targets a policy rule may name. */
import { formatNetwork, readNetwork } from './address.ts'

const maxName = 253
const label = /^[a-z0-9_-]{1,63}$/

/**
 * Lower case, one trailing dot stripped; '' for the root. Null when a label has bytes other than letters, digits, `-` and `_`:
 * such a name (a dot or NUL inside a label, percent signs, raw UTF-8) could read as another one after decoding.
 */
export function normaliseName(text: string): string | null {
  const name = (text.endsWith('.') ? text.slice(0, -1) : text).toLowerCase()
  if (name === '') return ''
  if (name.length > maxName) return null
  for (const part of name.split('.')) if (!label.test(part)) return null
  return name
}

/** Can this name a host? Digits at the end would be read as an old-style IPv4 address by some resolvers (RFC 6943 §3.1.1). */
export function isHostName(text: string): boolean {
  const name = normaliseName(text)
  return name !== null && name !== '' && !/(^|\.)(0x[0-9a-f]*|\d+)$/.test(name)
}

export type Target =
  | { readonly kind: 'name' | 'wildcard' | 'address' | 'network'; readonly value: string }
  | { readonly problem: string }

/**
 * A rule's target: `example.com`, `*.example.com` (any depth below, not the apex itself), an IP address or a CIDR network.
 * `value` is the normal form: for a wildcard the part behind `*.`, for international names the A-labels (RFC 5891).
 */
export function parseTarget(text: string): Target {
  const target = text.trim()
  if (target === '') return { problem: 'egress target cannot be empty' }
  const network = readNetwork(target)
  if (network !== null) {
    const value = formatNetwork(network)
    return { kind: value.includes('/') ? 'network' : 'address', value }
  }
  if (/^[^:]+:\d+$/.test(target)) return { problem: `${quote(target)} has a port, which is not part of a target` }
  if (/^[0-9.]+(\/.*)?$/.test(target) || target.includes(':') && !target.includes('://')) return { problem: `${quote(target)} is not an IP address or CIDR network` }
  if (target === '*') return { problem: '"*" is not a target; set defaultAction instead' }
  const wildcard = target.startsWith('*.')
  const name = toAsciiName(wildcard ? target.slice(2) : target)
  // `*.51.100.40` and `1.2.3.4-1.2.3.9` are no names: such a deny would hold nobody.
  if (name === null || !isHostName(name)) {
    const hint = /[^\0-\x7f]/.test(target) ? ' (an international name can be written in A-labels, xn--…)' : ''
    return { problem: `${quote(target)} is not a host name, *.host name, IP address or CIDR network${hint}` }
  }
  return { kind: wildcard ? 'wildcard' : 'name', value: name }
}

/** What rules for one place have in common, however it is spelt: a name, an address, which is also a network of its own, or a network. */
export function targetKey(text: string): string {
  const target = parseTarget(text)
  return 'problem' in target ? text.trim().toLowerCase() : `${target.kind} ${target.value}`
}

function toAsciiName(text: string): string | null {
  const plain = normaliseName(text)
  if (plain !== null) return plain
  // The URL parser brings IDNA; anything that is not purely a host would change its shape, so only letters beyond ASCII may pass.
  if (!/^[\p{L}\p{M}\p{N}._-]+$/u.test(text)) return null
  const host = URL.parse(`http://${text}/`)?.hostname ?? ''
  // Other scripts' digits can turn into an address: that is not the name somebody wrote.
  return readNetwork(host) === null ? normaliseName(host) : null
}

function quote(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text)
}
