/**
 * Desired + actual → steps. Pure: every decision about what to make, end or remove in a group is taken here, for a
 * create, after an event, in a sweep and at start alike. Carrying the steps out from any state leads to `want`.
 */
import type { Fact, Member } from './group.ts'

/**
 * `built`: make what is missing, in order. `kept`: it was ready, change nothing but notice what has ended.
 * `ended`: no container may be left, the record stays. `gone`: no container and no record may be left.
 */
export type Want = 'built' | 'kept' | 'ended' | 'gone'

export type Step =
  | { readonly do: 'create' | 'start' | 'confirm'; readonly member: string }
  | { readonly do: 'remove'; readonly containerId: string; readonly member: string }
  | { readonly do: 'settle' }
  | { readonly do: 'fail'; readonly reason: 'EGRESS_GONE' | 'CREATE_INTERRUPTED'; readonly message: string }
  | { readonly do: 'forget' }

const alive = new Set(['running', 'paused', 'restarting'])

export function plan(want: Want, members: readonly Member[], facts: readonly Fact[]): Step[] {
  switch (want) {
    case 'built': return build(members, facts)
    case 'kept': return keep(members, facts)
    case 'ended': return removeAll(members, facts)
    case 'gone': return [...removeAll(members, facts), { do: 'forget' }]
  }
}

/** The order is the security argument: a gate is created, started and confirmed before the next member even starts. */
function build(members: readonly Member[], facts: readonly Fact[]): Step[] {
  const steps: Step[] = []
  const dead = facts.find((fact) => fact.state !== 'created' && !alive.has(fact.state))
  if (dead !== undefined) return interrupted(members, facts, `container "${dead.member}" ended before the sandbox was complete`)
  for (const member of members) {
    const fact = facts.find((candidate) => candidate.member === member.name)
    if (fact === undefined) steps.push({ do: 'create', member: member.name })
    if (fact === undefined || fact.state === 'created') steps.push({ do: 'start', member: member.name })
    if (member.gate) steps.push({ do: 'confirm', member: member.name })
  }
  return [...steps, { do: 'settle' }]
}

/** Ready groups: a lost gate ends the group, a lost member too; a member that ended by itself needs no gate any more. */
function keep(members: readonly Member[], facts: readonly Fact[]): Step[] {
  const state = (member: Member): string => facts.find((fact) => fact.member === member.name)?.state ?? 'missing'
  const gates = members.filter((member) => member.gate)
  const inner = members.filter((member) => !member.gate)
  if (inner.some((member) => state(member) === 'missing')) return plan('gone', members, facts)
  if (inner.every((member) => !alive.has(state(member)))) return removeOnly(gates, facts)
  // A paused gate filters nothing new but lets nothing new out either; it is still there.
  if (gates.some((gate) => !alive.has(state(gate)) || outlived(gate, inner, facts))) {
    const code = gates.map((gate) => facts.find((fact) => fact.member === gate.name)?.exitCode).find((exitCode) => exitCode != null)
    const how = code === undefined ? 'ended' : `ended with exit code ${code}`
    return [...removeAll(members, facts), { do: 'fail', reason: 'EGRESS_GONE', message: `The egress sidecar of this sandbox ${how}, so the sandbox was ended.` }]
  }
  return []
}

/**
 * A gate that was started again has a new namespace, and the rest of the group is still in the old one, without a network. Only
 * when it started tells that from a gate that never ended.
 */
function outlived(gate: Member, inner: readonly Member[], facts: readonly Fact[]): boolean {
  const fact = (member: Member): Fact | undefined => facts.find((candidate) => candidate.member === member.name)
  const started = fact(gate)?.startedAt ?? null
  return started !== null && inner.some((member) => {
    const other = fact(member)
    return other !== undefined && alive.has(other.state) && other.startedAt !== null && other.startedAt < started
  })
}

function interrupted(members: readonly Member[], facts: readonly Fact[], message: string): Step[] {
  return [...removeAll(members, facts), { do: 'fail', reason: 'CREATE_INTERRUPTED', message }]
}

/** Reverse order of making: what runs foreign code goes first. Containers that are no member (any more) go at once. */
function removeAll(members: readonly Member[], facts: readonly Fact[]): Step[] {
  const order = (fact: Fact): number => members.findIndex((member) => member.name === fact.member) + 1 || Number.MAX_SAFE_INTEGER
  return [...facts].sort((a, b) => order(b) - order(a)).map(removal)
}

function removeOnly(members: readonly Member[], facts: readonly Fact[]): Step[] {
  return facts.filter((fact) => members.some((member) => member.name === fact.member)).map(removal)
}

function removal(fact: Fact): Step {
  return { do: 'remove', containerId: fact.containerId, member: fact.member }
}
