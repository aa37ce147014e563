/**
 * By which names an address was reached: it stays open while one of them is allowed. The sandbox decides how many there are and how long, so
 * there is a bound for all of them; an address without a remembered way is shut by the next policy, whatever that says.
 */
import { decideName } from '#policies/decide.ts'
import type { Rules } from '#policies/compile.ts'
import { deniedAlias } from './judge.ts'

/** A name that led to an address, and the names in between. */
export type Lead = { readonly name: string; readonly aliases: readonly (string | null)[] }

export type LeadBook = {
  /** Remembers a way to an address in the address's own list; the last one of a name counts. */
  note(leads: Lead[], name: string, aliases: Lead['aliases']): void
  /** The address is not remembered any longer. */
  strike(leads: readonly Lead[]): void
}

/** Names of one address. */
const maxNames = 16
/** Of all addresses: a new policy looks at each. */
const maxLeads = 131_072
const maxBytes = 32 << 20

export function createLeadBook(limits = { leads: maxLeads, bytes: maxBytes }): LeadBook {
  let count = 0
  let bytes = 0
  /** How many leads share them: the addresses of one answer do. */
  const shared = new Map<Lead['aliases'], number>()

  function add({ name, aliases }: Lead): void {
    count++
    bytes += leadSize + name.length
    if (aliases.length === 0) return
    const users = shared.get(aliases) ?? 0
    if (users === 0) bytes += sizeOf(aliases)
    shared.set(aliases, users + 1)
  }

  function remove({ name, aliases }: Lead): void {
    count--
    bytes -= leadSize + name.length
    if (aliases.length === 0) return
    const users = (shared.get(aliases) as number) - 1
    if (users > 0) shared.set(aliases, users)
    else {
      shared.delete(aliases)
      bytes -= sizeOf(aliases)
    }
  }

  return {
    note(leads, name, aliases) {
      // Nearly always: the name that it was learned by, and no alias.
      if (leads[0]?.name === name && leads[0].aliases === aliases) return
      const at = leads.findIndex((lead) => lead.name === name)
      const before = leads[at]
      if (before !== undefined) {
        if (before.aliases.length === aliases.length && before.aliases.every((alias, nth) => alias === aliases[nth])) return
        leads.splice(at, 1)
        remove(before)
      }
      if (leads.length >= maxNames) remove(leads.shift() as Lead)
      if (count >= limits.leads || bytes >= limits.bytes) return
      const lead = { name, aliases }
      leads.push(lead)
      add(lead)
    },
    strike(leads) {
      for (const lead of leads) remove(lead)
    },
  }
}

/** Bytes, about. */
const leadSize = 64
function sizeOf(aliases: Lead['aliases']): number {
  let size = 0
  for (const alias of aliases) size += 16 + (alias?.length ?? 0)
  return size
}

/** Is the way by which a name led to an address still allowed? Names come again, and the addresses of one answer share their aliases: each is judged once. */
export function leadJudge(rules: Rules): (lead: Lead) => boolean {
  const allowed = new Map<string, boolean>()
  const free = new Map<Lead['aliases'], boolean>()
  return ({ name, aliases }) => once(allowed, name, () => decideName(rules, name).action === 'allow') && once(free, aliases, () => deniedAlias(rules, aliases) === null)
}

function once<K>(known: Map<K, boolean>, key: K, judge: () => boolean): boolean {
  let verdict = known.get(key)
  if (verdict === undefined) known.set(key, (verdict = judge()))
  return verdict
}
