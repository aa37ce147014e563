/** Rules and a place to a verdict. Hot: no parsing of rules, no regular expression, cost by labels and prefix lengths, not by rules. */
import { canonicalAddress, isSpecialUse } from './address.ts'
import type { CompiledRule, Rules } from './compile.ts'
import type { Verdict } from './verdict.ts'

/**
 * May this name be looked up? First match wins among the domain rules; `*.example.com` covers any depth below, not the apex.
 * @param name as `normaliseName` gives it; null (malformed) is denied under every policy, '' is the root
 */
export function decideName(rules: Rules, name: string | null): Verdict {
  if (name === null) return { action: 'deny', reason: 'malformed-name' }
  let best = rules.exact.get(name) ?? Infinity
  for (let dot = name.indexOf('.'); dot !== -1; dot = name.indexOf('.', dot + 1)) {
    const position = rules.suffix.get(name.slice(dot + 1))
    if (position !== undefined && position < best) best = position
  }
  const rule = rules.nameRules[best]
  return rule === undefined ? byDefault(rules) : byRule(rule)
}

/** May this address be reached directly? The floor and every deny rule win, then allow rules, then the default. */
export function decideAddress(rules: Rules, address: string): Verdict {
  const denial = deniedAddress(rules, address)
  if (denial !== null) return denial
  const allow = rules.allowTable.find(address)
  return allow === undefined ? byDefault(rules) : byRule({ action: 'allow', index: allow })
}

/**
 * May an address that came back for an allowed name be opened? Floor and deny rules refuse it; a special-use address (rebinding)
 * needs an allow rule that covers it.
 */
export function decideLearned(rules: Rules, address: string): Verdict {
  const denial = deniedAddress(rules, address)
  if (denial !== null) return denial
  const allow = rules.allowTable.find(address)
  if (allow !== undefined) return byRule({ action: 'allow', index: allow })
  return isSpecialUse(address) ? { action: 'deny', reason: 'special-use-address' } : { action: 'allow', reason: 'name-was-allowed' }
}

function deniedAddress(rules: Rules, address: string): Verdict | null {
  if (canonicalAddress(address) === null) return { action: 'deny', reason: 'malformed-address' }
  if (rules.floorTable.find(address) !== undefined) return { action: 'deny', reason: 'floor' }
  const deny = rules.denyTable.find(address)
  return deny === undefined ? null : byRule({ action: 'deny', index: deny })
}

function byDefault(rules: Rules): Verdict {
  return rules.defaultAction === 'allow' ? { action: 'allow', reason: 'default-allows' } : { action: 'deny', reason: 'default-denies' }
}

function byRule({ action, index }: CompiledRule): Verdict {
  const rule = index >= 0 ? { rule: index } : {}
  return action === 'allow' ? { action, reason: 'rule-allows', ...rule } : { action, reason: 'rule-denies', ...rule }
}
