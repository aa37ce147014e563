/**
 * The one owner of the policy: user's document, operator's layers, what is enforced. Changes run one after the other, each as a
 * whole: new file written, kernel and names switched, file renamed. A change that fails leaves the old policy everywhere.
 */
import { compilePolicy } from '#policies/compile.ts'
import { readNetworkPolicy, readNetworkRules, type NetworkPolicy, type NetworkRule } from '#policies/document.ts'
import { targetKey } from '#policies/host.ts'
import { formatProblems, type Problem } from '#policies/problem.ts'
import type { AlwaysFiles, AlwaysRules } from './always-files.ts'
import type { Firewall } from './firewall.ts'
import { preparePolicyFile } from './policy-file.ts'

/** A refusal with the status and text that the API answers. */
export class PolicyRefusal extends Error {
  readonly status: number
  constructor(status: number, message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'PolicyRefusal'
    this.status = status
  }
}

/** The original's words. */
export const reasons = { reset: 'policy reset to default deny-all', nothingRemoved: 'no matching targets found' } as const

/** `reason`: why nothing, or nothing special, was done. `rules`: what this request named, for the log. */
export type Change = { readonly policy: NetworkPolicy; readonly reason?: string; readonly rules: readonly NetworkRule[] }

export type PolicyKeeper = {
  readonly policy: NetworkPolicy
  readonly always: AlwaysRules
  /** Replaces the document by the body; a blank body denies everything. @throws PolicyRefusal */
  put(body: string): Promise<Change>
  /** Puts the body's rules before the others; a rule for a target takes the place of an older one. @throws PolicyRefusal */
  patch(body: string): Promise<Change>
  /** Removes the rules of the targets that the body lists. @throws PolicyRefusal */
  remove(body: string): Promise<Change>
  /** Reads the operator's files again if they changed. Resolves with true when new rules are enforced. @throws when they cannot be read */
  reload(): Promise<boolean>
}

export type PolicyKeeperDeps = {
  readonly firewall: Firewall
  readonly files: AlwaysFiles
  readonly policyFile: string
  /** 0: no limit. */
  readonly maxRules: number
  readonly floor: readonly string[]
}

export function createPolicyKeeper(initial: NetworkPolicy, initialAlways: AlwaysRules, deps: PolicyKeeperDeps): PolicyKeeper {
  let policy = initial
  let always = initialAlways
  /** The operator's files changed, and what they say is not enforced yet. */
  let behind = false
  let last: Promise<unknown> = Promise.resolve()

  const inTurn = <T>(work: () => Promise<T>): Promise<T> => {
    const result = last.then(work)
    last = result.catch(() => undefined)
    return result
  }
  const enforce = (document: NetworkPolicy, layers: AlwaysRules): Promise<void> =>
    deps.firewall.replace(compilePolicy(document, { alwaysDeny: layers.deny, alwaysAllow: layers.allow, floor: deps.floor }))

  async function change(wanted: NetworkPolicy): Promise<void> {
    const file = await preparePolicyFile(deps.policyFile, wanted).catch((error: Error) => {
      throw new PolicyRefusal(500, `failed to persist policy: ${error.message}`, { cause: error })
    })
    try {
      await enforce(wanted, always)
    } catch (error) {
      await file.abandon()
      throw new PolicyRefusal(500, `failed to apply nftables policy: ${(error as Error).message}`, { cause: error })
    }
    try {
      await file.commit()
    } catch (error) {
      // Where the kernel does not take the old one back, it goes on with the new one, and that is what is told.
      await enforce(policy, always).catch(() => {
        policy = wanted
      })
      throw new PolicyRefusal(500, `failed to persist policy: ${(error as Error).message}`, { cause: error })
    }
    policy = wanted
  }

  function checkCount(rules: readonly NetworkRule[]): void {
    if (deps.maxRules > 0 && rules.length > deps.maxRules) throw new PolicyRefusal(413, `egress rule total count ${rules.length} exceeds limit ${deps.maxRules}`)
  }

  return {
    get policy() {
      return policy
    },
    get always() {
      return always
    },
    put: (body) => inTurn(async () => {
      if (body.trim() === '') {
        await change({ defaultAction: 'deny', egress: [] })
        return { policy, reason: reasons.reset, rules: [] }
      }
      const read = readNetworkPolicy(parse(body, 'invalid policy'), '')
      if (!read.ok) throw new PolicyRefusal(400, `invalid policy: ${say(read.problems)}`)
      checkCount(read.policy.egress)
      await change(read.policy)
      return { policy, rules: read.policy.egress }
    }),
    patch: (body) => inTurn(async () => {
      const patched = parseArray(body, 'invalid patch rules')
      const read = readNetworkRules(patched, '')
      if (!read.ok) throw new PolicyRefusal(400, `invalid ${patched.every((rule) => typeof rule === 'object') ? 'merged policy' : 'patch rules'}: ${say(read.problems)}`)
      const egress = mergeRules(read.rules, policy.egress)
      checkCount(egress)
      await change({ defaultAction: policy.defaultAction, egress })
      return { policy, rules: read.rules }
    }),
    remove: (body) => inTurn(async () => {
      const targets = parseArray(body, 'invalid delete targets')
      if (!targets.every((target) => typeof target === 'string')) throw new PolicyRefusal(400, 'invalid delete targets: every target must be a string')
      const unwanted = new Set(targets.map(targetKey))
      const named = ({ target }: NetworkRule): boolean => unwanted.has(targetKey(target))
      const removed = policy.egress.filter(named)
      if (removed.length === 0) return { policy, reason: reasons.nothingRemoved, rules: [] }
      const egress = policy.egress.filter((rule) => !named(rule))
      await change({ defaultAction: policy.defaultAction, egress })
      return { policy, rules: removed }
    }),
    reload: () => inTurn(async () => {
      if (!behind && !(await deps.files.changed())) return false
      behind = true
      const wanted = await deps.files.read()
      await enforce(policy, wanted)
      always = wanted
      behind = false
      return true
    }),
  }
}

/**
 * Patch rules first, in order, the first of several for one text; then the old rules for other targets. Two spellings of an old target are one here, where
 * the original compares texts: of two rules the older one would hold again when the newer is deleted. In one patch both stay: for addresses the deny wins.
 */
function mergeRules(patch: readonly NetworkRule[], base: readonly NetworkRule[]): NetworkRule[] {
  const first = new Map<string, NetworkRule>()
  for (const rule of patch) if (!first.has(rule.target.toLowerCase())) first.set(rule.target.toLowerCase(), rule)
  const named = new Set(patch.map(({ target }) => targetKey(target)))
  return [...first.values(), ...base.filter(({ target }) => !named.has(targetKey(target)))]
}

function parse(body: string, label: string): unknown {
  try {
    return JSON.parse(body)
  } catch (error) {
    throw new PolicyRefusal(400, `${label}: ${(error as Error).message}`)
  }
}

function parseArray(body: string, label: string): unknown[] {
  if (body.trim() === '') throw new PolicyRefusal(400, 'empty body')
  const value = parse(body, label) ?? []
  if (!Array.isArray(value)) throw new PolicyRefusal(400, `${label}: the body must be an array`)
  if (value.length === 0) throw new PolicyRefusal(400, `${label}: empty array`)
  return value
}

/** Two texts are shared with the original and stand alone; clients compare them. */
function say(problems: readonly Problem[]): string {
  const first = problems[0]
  const shared = first !== undefined && (first.reason.startsWith('unsupported action') || first.reason === 'egress target cannot be empty')
  return shared ? first.reason : formatProblems(problems)
}
