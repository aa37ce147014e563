/** Policy document to rules that can be asked: all parsing happens here, once. */
import { formatNetwork, NetworkTable, readNetwork, type Network } from './address.ts'
import type { Action, NetworkPolicy, NetworkRule } from './document.ts'
import { parseTarget } from './host.ts'

/** What an operator lays over a user's policy. `floor` holds addresses and networks nobody may reach, whatever a rule says. */
export type Layers = {
  readonly alwaysDeny?: readonly NetworkRule[]
  readonly alwaysAllow?: readonly NetworkRule[]
  readonly floor?: readonly string[]
}

/** `index` counts from the user's first rule; an operator's rule has a negative one. */
export type CompiledRule = { readonly action: Action; readonly index: number }

export type Rules = {
  readonly defaultAction: Action
  /** The user's, as written; a verdict's `rule` is a place in this list. */
  readonly written: readonly NetworkRule[]
  /** Domain rules in order of precedence; the maps hold positions in this list. */
  readonly nameRules: readonly CompiledRule[]
  readonly exact: ReadonlyMap<string, number>
  /** Keyed by what stands behind `*.`. */
  readonly suffix: ReadonlyMap<string, number>
  /** The most labels of a key of `suffix`. */
  readonly suffixLabels: number
  readonly allowTable: NetworkTable
  readonly denyTable: NetworkTable
  readonly floorTable: NetworkTable
  /** Canonical addresses and networks for the kernel's sets; the deny lists include the floor. */
  readonly allow4: readonly string[]
  readonly allow6: readonly string[]
  readonly deny4: readonly string[]
  readonly deny6: readonly string[]
}

/**
 * Compiles a policy that `readNetworkPolicy` accepted. Names: always-deny, always-allow, then the user's rules, first match wins.
 * Addresses: a deny of anybody wins over every allow.
 * @throws TypeError for a target that was never validated
 */
export function compilePolicy(policy: NetworkPolicy, layers: Layers = {}): Rules {
  const operator = [...(layers.alwaysDeny ?? []), ...(layers.alwaysAllow ?? [])]
  const nameRules: CompiledRule[] = []
  const exact = new Map<string, number>()
  const suffix = new Map<string, number>()
  const tables = { allow: new NetworkTable(), deny: new NetworkTable() }
  const floorTable = new NetworkTable()
  const sets = { allow: new Map<string, Network>(), deny: new Map<string, Network>() }

  for (const [position, rule] of [...operator, ...policy.egress].entries()) {
    const index = position - operator.length
    const target = parseTarget(rule.target)
    if ('problem' in target) throw new TypeError(target.problem)
    if (target.kind === 'name' || target.kind === 'wildcard') {
      const map = target.kind === 'name' ? exact : suffix
      if (!map.has(target.value)) map.set(target.value, nameRules.push({ action: rule.action, index }) - 1)
    } else {
      const network = readNetwork(target.value) as Network
      tables[rule.action].add(network, index)
      sets[rule.action].set(target.value, network)
    }
  }
  for (const text of layers.floor ?? []) {
    const network = readNetwork(text)
    if (network === null) throw new TypeError(`floor: ${JSON.stringify(text)} is not an IP address or CIDR network`)
    floorTable.add(network, 0)
    sets.deny.set(formatNetwork(network), network)
  }

  let suffixLabels = 0
  for (const key of suffix.keys()) suffixLabels = Math.max(suffixLabels, key.split('.').length)
  const pick = (action: Action, family: 4 | 6): string[] => [...sets[action]].filter(([, network]) => network.family === family).map(([text]) => text)
  return {
    defaultAction: policy.defaultAction, written: policy.egress, nameRules, exact, suffix, suffixLabels,
    allowTable: tables.allow, denyTable: tables.deny, floorTable,
    allow4: pick('allow', 4), allow6: pick('allow', 6), deny4: pick('deny', 4), deny6: pick('deny', 6),
  }
}
