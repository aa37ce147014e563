/** Rules and a place to a verdict. Hot: no parsing of rules, no regular expression, cost by labels and prefix lengths, not by rules. */
import { isSpecialUse, readAddress, type Address } from './address.ts'
import type { CompiledRule, Rules } from './compile.ts'
import type { Verdict } from './verdict.ts'

/**
 * May this name be looked up? First match wins among the domain rules; `*.example.com` covers any depth below, not the apex.
 * @param name as `normaliseName` gives it; null (malformed) is denied under every policy, '' is the root
 */
export function decideName(rules: Rules, name: string | null): Verdict {
  if (name === null) return { action: 'deny', reason: 'malformed-name' }
  let best = rules.exact.get(name) ?? Infinity
  // From the end, and no longer than the longest rule: whoever asks may write 127 labels.
  for (let dot = name.lastIndexOf('.'), labels = 0; dot > 0 && labels < rules.suffixLabels; dot = name.lastIndexOf('.', dot - 1), labels++) {
    const position = rules.suffix.get(name.slice(dot + 1))
    if (position !== undefined && position < best) best = position
  }
  const rule = rules.nameRules[best]
  return rule === undefined ? byDefault(rules) : byRule(rule)
}

/** May this address be reached directly? The floor and every deny rule win, then allow rules, then the default. */
export function decideAddress(rules: Rules, place: string | Address): Verdict {
  const address = typeof place === 'string' ? readAddress(place) : place
  if (address === null) return malformed
  return deniedAddress(rules, address) ?? allowedAddress(rules, address) ?? byDefault(rules)
}

/**
 * May an address that came back for an allowed name be opened? Floor and deny rules refuse it; a special-use address (rebinding)
 * needs an allow rule that covers it.
 */
export function decideLearned(rules: Rules, place: string | Address): Verdict {
  const address = typeof place === 'string' ? readAddress(place) : place
  if (address === null) return malformed
  const ruled = deniedAddress(rules, address) ?? allowedAddress(rules, address)
  if (ruled !== null) return ruled
  return isSpecialUse(address) ? { action: 'deny', reason: 'special-use-address' } : { action: 'allow', reason: 'name-was-allowed' }
}

const malformed: Verdict = { action: 'deny', reason: 'malformed-address' }

function deniedAddress(rules: Rules, address: Address): Verdict | null {
  if (rules.floorTable.find(address) !== undefined) return { action: 'deny', reason: 'floor' }
  const index = rules.denyTable.find(address)
  return index === undefined ? null : byRule({ action: 'deny', index })
}

function allowedAddress(rules: Rules, address: Address): Verdict | null {
  const index = rules.allowTable.find(address)
  return index === undefined ? null : byRule({ action: 'allow', index })
}

function byDefault(rules: Rules): Verdict {
  return rules.defaultAction === 'allow' ? { action: 'allow', reason: 'default-allows' } : { action: 'deny', reason: 'default-denies' }
}

function byRule({ action, index }: CompiledRule): Verdict {
  const rule = index >= 0 ? { rule: index } : {}
  return action === 'allow' ? { action, reason: 'rule-allows', ...rule } : { action, reason: 'rule-denies', ...rule }
}
