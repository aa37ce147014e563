/** The networkPolicy document: what may stand in a create request, in `OPENSANDBOX_EGRESS_RULES` and in a body of the policy API. */
import * as Type from 'typebox'
import { schemaProblems } from './config.ts'
import { parseTarget } from './host.ts'
import type { Problem } from './problem.ts'

const documentKeys = ['defaultAction', 'egress']
const ruleKeys = ['action', 'target']

export type Action = 'allow' | 'deny'
/** `target` is the trimmed text the caller wrote; `parseTarget` gives its normal form. */
export type NetworkRule = { readonly action: Action; readonly target: string }
export type NetworkPolicy = { readonly defaultAction: Action; readonly egress: readonly NetworkRule[] }

export type ReadPolicy = { readonly ok: true; readonly policy: NetworkPolicy } | { readonly ok: false; readonly problems: readonly Problem[] }
export type ReadRules = { readonly ok: true; readonly rules: readonly NetworkRule[] } | { readonly ok: false; readonly problems: readonly Problem[] }

const RuleSchema = Type.Object({
  action: Type.Optional(Type.String({ description: 'allow or deny; deny when absent' })),
  target: Type.Optional(Type.String({ description: 'host name, *.host name, IP address or CIDR network' })),
}, { additionalProperties: false })

/** The shape, for API descriptions. What the texts may hold is checked by `readNetworkPolicy`. */
export const NetworkPolicySchema = Type.Object({
  defaultAction: Type.Optional(Type.String({ description: 'what happens to places no rule names: deny (default) or allow' })),
  egress: Type.Optional(Type.Array(RuleSchema, { description: 'for names the first matching rule wins; for addresses a deny wins' })),
}, { additionalProperties: false })

/**
 * Reads a policy and reports every problem at once. An absent, null or empty document denies everything.
 * Keys match in any case, and a missing action means deny, as in the original. Unknown keys, which it passes over, are refused: a rule with
 * a port would open all of them, and `egres` none of what its author meant to deny.
 */
export function readNetworkPolicy(value: unknown, path = 'networkPolicy'): ReadPolicy {
  if (value === undefined || value === null) return { ok: true, policy: { defaultAction: 'deny', egress: [] } }
  const twice: Problem[] = []
  const document = foldKeys(value, documentKeys, path, twice) as { defaultAction?: string; egress?: { action?: string; target?: string }[] }
  if (Array.isArray(document.egress)) document.egress = foldRules(document.egress, below(path, 'egress'), twice) as typeof document.egress
  const problems = [...twice, ...schemaProblems(NetworkPolicySchema, document, path)]
  if (problems.length > 0) return { ok: false, problems }

  const defaultAction = readAction(document.defaultAction)
  if (defaultAction === null) problems.push({ path: below(path, 'defaultAction'), reason: `unsupported action ${JSON.stringify(document.defaultAction?.trim().toLowerCase())}` })
  const egress = readRules(document.egress ?? [], below(path, 'egress'), problems)
  return problems.length > 0 ? { ok: false, problems } : { ok: true, policy: { defaultAction: defaultAction as Action, egress } }
}

/**
 * Whether the original enforces this document: it passes over keys that it does not know, takes any text for a target or a default action, and of two
 * spellings of a key the last. What it does not take, `readNetworkPolicy` does not take either.
 */
export function isTakenByOriginal(value: unknown): boolean {
  const document = foldKeys(value ?? {}, documentKeys, '', []) as { defaultAction?: unknown; egress?: unknown }
  const { defaultAction = '', egress = [] } = document
  if (typeof document !== 'object' || Array.isArray(document) || typeof defaultAction !== 'string' || !Array.isArray(egress)) return false
  return (foldRules(egress, '', []) as { action?: unknown; target?: unknown }[]).every(({ action = '', target }) =>
    typeof action === 'string' && readAction(action) !== null && typeof target === 'string' && target.trim() !== '')
}

/** Reads a bare array of rules in the same way (the body of a PATCH). */
export function readNetworkRules(value: unknown, path = 'rules'): ReadRules {
  const twice: Problem[] = []
  const folded = Array.isArray(value) ? foldRules(value, path, twice) : value
  const problems = [...twice, ...schemaProblems(Type.Array(RuleSchema), folded, path)]
  if (problems.length > 0) return { ok: false, problems }
  const rules = readRules(folded as { action?: string; target?: string }[], path, problems)
  return problems.length > 0 ? { ok: false, problems } : { ok: true, rules }
}

function readRules(raw: readonly { action?: string; target?: string }[], path: string, problems: Problem[]): NetworkRule[] {
  const rules: NetworkRule[] = []
  for (const [index, rule] of raw.entries()) {
    const action = readAction(rule.action)
    const target = (rule.target ?? '').trim()
    const parsed = parseTarget(target)
    if (action === null) problems.push({ path: `${path}[${index}].action`, reason: `unsupported action ${JSON.stringify(rule.action?.trim().toLowerCase())}` })
    if ('problem' in parsed) problems.push({ path: `${path}[${index}].target`, reason: parsed.problem })
    if (action !== null) rules.push({ action, target })
  }
  return rules
}

function below(path: string, key: string): string {
  return path === '' ? key : `${path}.${key}`
}

function readAction(text: string | undefined): Action | null {
  const action = (text ?? '').trim().toLowerCase()
  if (action === '') return 'deny'
  return action === 'allow' || action === 'deny' ? action : null
}

/** A null rule is an empty one: it fails for its missing target, as it did in the original. */
function foldRules(rules: readonly unknown[], path: string, twice: Problem[]): unknown[] {
  return rules.map((rule, index) => foldKeys(rule ?? {}, ruleKeys, `${path}[${index}]`, twice))
}

/**
 * An object with its known keys whatever their case, nulls dropped. Anything else as it is. Two spellings of one key are told: whichever counted, what
 * stands under the other would be lost, a deny perhaps. (Of one spelling, JSON.parse has kept the last.)
 */
function foldKeys(value: unknown, known: readonly string[], path: string, twice: Problem[]): unknown {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return value
  const folded = new Map<string, unknown>()
  for (const [key, inner] of Object.entries(value)) {
    if (inner === null) continue
    const name = known.find((k) => k.toLowerCase() === key.toLowerCase()) ?? key
    if (folded.has(name)) twice.push({ path: below(path, key), reason: `${name} stands here in two spellings` })
    folded.set(name, inner)
  }
  return Object.fromEntries(folded)
}
