/**
 * May an address that came back for an allowed name be opened? The policy's own verdict, and two kinds of places that a name must
 * not lead to by accident under default deny: our upstream resolvers and public resolvers that answer over HTTPS. Both open again by an address rule.
 */
import { formatAddress, NetworkTable, readAddress, readNetwork, type Network } from '#policies/address.ts'
import type { Rules } from '#policies/compile.ts'
import { decideAddress, decideLearned, decideName } from '#policies/decide.ts'
import type { DenyReason, Verdict } from '#policies/verdict.ts'

/** The address as the kernel gets it, or why it must stay shut. */
export type Judged = { readonly opened: string; readonly reason: null } | { readonly opened: null; readonly reason: DenyReason }
export type AddressJudge = (rules: Rules, address: string) => Judged

/** Verdicts remembered per policy; popular names come back with the same addresses again and again. */
const maxRemembered = 8192

/** @param resolvers addresses and networks of DNS resolvers, ours and others */
export function createAddressJudge(resolvers: readonly string[]): AddressJudge {
  const table = new NetworkTable()
  for (const text of resolvers) table.add(readNetwork(text) as Network, 0)
  let remembered = new Map<string, Judged>()
  let rememberedFor: Rules | null = null

  return (rules, address) => {
    if (rules !== rememberedFor || remembered.size >= maxRemembered) {
      remembered = new Map()
      rememberedFor = rules
    }
    const before = remembered.get(address)
    if (before !== undefined) return before
    const judged = judge(rules, address)
    remembered.set(address, judged)
    return judged
  }

  function judge(rules: Rules, text: string): Judged {
    // Read once: an answer may bring thousands of them.
    const address = readAddress(text)
    if (address === null) return { opened: null, reason: 'malformed-address' }
    const verdict = decideLearned(rules, address)
    if (verdict.action === 'deny') return { opened: null, reason: verdict.reason }
    if (rules.defaultAction === 'deny' && table.find(address) !== undefined && decideAddress(rules, address).reason !== 'rule-allows') return { opened: null, reason: 'resolver-address' }
    return { opened: formatAddress(address), reason: null }
  }
}

/**
 * Public resolvers that answer DNS over HTTPS (RFC 8484) at fixed addresses, from their operators' pages: Google, Cloudflare, Quad9,
 * OpenDNS, AdGuard, CleanBrowsing, ControlD, Mullvad, DNS.SB, AliDNS, DNSPod, NextDNS. Not complete and never can be: under default
 * deny it only closes the detour "allowed name that points at a resolver".
 */
export const knownResolvers: readonly string[] = [
  '8.8.8.8', '8.8.4.4', '2001:4860:4860::8888', '2001:4860:4860::8844',
  '1.1.1.1', '1.0.0.1', '1.1.1.2', '1.0.0.2', '1.1.1.3', '1.0.0.3', '2606:4700:4700::/48',
  '9.9.9.9', '9.9.9.10', '9.9.9.11', '149.112.112.112', '149.112.112.10', '149.112.112.11', '2620:fe::/48',
  '208.67.222.222', '208.67.220.220', '208.67.222.123', '208.67.220.123', '2620:119:35::35', '2620:119:53::53',
  '94.140.14.14', '94.140.15.15', '94.140.14.15', '94.140.15.16', '94.140.14.140', '94.140.14.141', '2a10:50c0::/32',
  '185.228.168.9', '185.228.169.9', '185.228.168.10', '185.228.169.11', '185.228.168.168', '185.228.169.168',
  '76.76.2.0/24', '76.76.10.0/24', '194.242.2.0/24',
  '185.222.222.222', '45.11.45.11', '223.5.5.5', '223.6.6.6', '120.53.53.53', '1.12.12.12', '45.90.28.0/24', '45.90.30.0/24',
]

/** The name of the chain that a rule (not the default) denies, and how: its author did not mean "unless reached by an alias". */
export function deniedAlias(rules: Rules, aliases: readonly (string | null)[]): { readonly alias: string | null; readonly verdict: Verdict } | null {
  for (const alias of aliases) {
    const verdict = decideName(rules, alias)
    if (verdict.reason === 'rule-denies' || verdict.reason === 'malformed-name') return { alias, verdict }
  }
  return null
}
