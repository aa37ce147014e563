/**
 * What the kernel lets out. Two operations: replace the policy, open the addresses of an answer.
 *
 * Why open() also waits for somebody else's update (the race between a name and the kernel):
 *
 *   question 1:  open(1.2.3.4) ──── nft runs ────────────► kernel has it ─► answer
 *   question 2:        open(1.2.3.4): "already known" ─► answer ─► connect ─► REFUSED
 *                                                        ▲ must wait here, too
 *
 * So the table remembers for every address the batch that carries it. While nft works on one batch, everything else that comes
 * in is put into the next: however many questions wait, one transaction opens their addresses.
 */
import type { Rules } from '#policies/compile.ts'
import type { AddressJudge } from './judge.ts'
import { createLeadBook, leadJudge, type Lead } from './leads.ts'
import { NftError, type Nft } from './nft.ts'
import { chooseGivenUp, readLeases } from './full-table.ts'
import { banStatements, forgetStatements, learnedSets, openStatements, policyStatements, unbanStatements, type RulesetInput } from './ruleset.ts'

/** `stale`: the policy changed meanwhile, judge again. `failed`: the kernel did not confirm, the address must not be told. */
export type Opened = 'open' | 'stale' | 'failed'

export type Firewall = {
  /** The policy the kernel enforces now. */
  readonly rules: Rules
  /** Addresses remembered from answers. */
  readonly learned: number
  /** Transactions that the kernel confirmed. */
  readonly updates: number
  /** Kernel first: when it resolves, addresses that only the old policy allowed are shut and `rules` is the new one. */
  replace(rules: Rules): Promise<void>
  /**
   * Opens addresses that `name` led to, by way of `aliases`, for `seconds`, as judged under `rules`. At once when all of them are open;
   * `failed` also where there are more than the kernel is to hold.
   */
  open(name: string, aliases: readonly (string | null)[], addresses: readonly string[], seconds: number, rules: Rules): Opened | Promise<Opened>
}

/** Addresses kept at a time; beyond that those that nobody uses are given up, down to the second number. The kernel's sets hold more. */
const maxLearned = 32768
const keptWhenFull = maxLearned - 4096
/** No further ones at all: room is made slower than answers with thousands of addresses come in. */
const mostLearned = 40960
/** As many as the kernel's sets hold; beyond that those that it has not are forgotten. */
const mostStrays = 65536
/** Addresses of one transaction: nft needs memory for all of it at once. */
const mostAtOnce = 8192
/** A lease that covers the client's TTL and this many ms is not extended again. */
const slackMs = 30_000

type Learned = { until: number; readonly leads: Lead[]; batch: Batch | null }

class Batch {
  readonly elements = new Map<string, number>()
  readonly known = new Set<string>()
  readonly done: Promise<Opened>
  settle: (result: Opened) => void = () => undefined

  constructor() {
    this.done = new Promise((resolve) => (this.settle = resolve))
  }
}

export type FirewallDeps = {
  readonly nft: Nft
  /** Everything of a ruleset but its rules and generation. */
  readonly setting: Omit<RulesetInput, 'rules' | 'generation'>
  readonly mayOpen: AddressJudge
  readonly now: () => number
  /** Not the same after a restart: the kernel remembers the connections of the generations before. */
  readonly firstGeneration: number
  /** Nobody knows any longer which policy the kernel enforces. */
  readonly lost: (reason: string) => void
}

/** The boot rules must be in place; `initial` is loaded when the promise resolves. */
export async function createFirewall(initial: Rules, { nft, setting, mayOpen, now, firstGeneration, lost: lose }: FirewallDeps): Promise<Firewall> {
  const learned = new Map<string, Learned>()
  const book = createLeadBook()
  /** Shut with the next transaction. */
  const unwanted = new Set<string>()
  /**
   * Given up under a policy that still allows them: a packet that comes by while they are deleted puts them back. So the kernel may have them, and
   * the next policy shuts them, whatever it says.
   */
  const strays = new Set<string>()
  /** Addresses that a policy took away are still banned by name in the kernel. */
  let banned = false
  let makingRoom = false
  let rules = initial
  let generation = firstGeneration
  let updates = 0
  let next: Batch | null = null
  let working = false
  let sending: Promise<unknown> = Promise.resolve()
  let replacements: Promise<unknown> = Promise.resolve()
  let replacing = 0

  await nft.apply(policyStatements({ ...setting, rules, generation }), replaceTimeoutMs)
  updates++

  async function pump(): Promise<void> {
    if (working) return
    working = true
    while (next !== null && replacing === 0) {
      const batch: Batch = next
      next = null
      const sent = send(batch)
      sending = sent
      batch.settle(await sent)
    }
    working = false
  }

  async function send(batch: Batch): Promise<Opened> {
    let result: Opened = 'open'
    try {
      await forgetUnwanted(openStatements(batch.elements, batch.known), openTimeoutMs)
    } catch {
      result = 'failed'
    }
    release(batch, result === 'open')
    return result
  }

  /** Deletes what is unwanted, and lifts the ban on it; `more` comes with the last transaction. */
  async function forgetUnwanted(more: readonly string[], timeoutMs: number): Promise<void> {
    for (let last = false; !last; updates++) {
      last = unwanted.size <= mostAtOnce
      const part = [...unwanted].slice(0, mostAtOnce)
      await nft.apply([...forgetStatements(part), ...(last && banned ? unbanStatements() : []), ...(last ? more : [])], timeoutMs)
      for (const address of part) unwanted.delete(address)
      if (last) banned = false
    }
  }

  // An address that may not have reached the kernel stays in the table, so that a later policy shuts it if it did.
  function release(batch: Batch, confirmed: boolean): void {
    for (const address of batch.elements.keys()) {
      const entry = learned.get(address)
      if (entry?.batch !== batch) continue
      entry.batch = null
      if (!confirmed) entry.until = 0
    }
  }

  function enqueue(address: string, name: string, aliases: readonly (string | null)[], wanted: number, seconds: number): Batch | null {
    const before = learned.get(address)
    const entry: Learned = before ?? { until: 0, leads: [], batch: null }
    book.note(entry.leads, name, aliases)
    if (entry.until >= wanted - slackMs) return entry.batch
    next ??= new Batch()
    if ((before !== undefined && before.batch !== next) || unwanted.has(address)) next.known.add(address)
    strays.delete(address)
    entry.until = wanted
    entry.batch = next
    next.elements.set(address, seconds)
    unwanted.delete(address)
    learned.delete(address)
    learned.set(address, entry)
    if (learned.size > maxLearned && !makingRoom) void makeRoom()
    return next
  }

  function forget(address: string): void {
    book.strike(learned.get(address)?.leads ?? [])
    learned.delete(address)
  }

  function tooMany(addresses: readonly string[]): boolean {
    if (learned.size + addresses.length > mostLearned && addresses.some((address) => !learned.has(address))) return true
    return (next === null ? 0 : next.elements.size) + addresses.length > mostAtOnce
  }

  // Meanwhile the table grows on, up to the number that nothing passes.
  async function makeRoom(): Promise<void> {
    makingRoom = true
    const leases = await Promise.all(learnedSets.map((set) => nft.list(set))).then((listings) => readLeases(listings.join('')), () => null)
    const { over, shut } = chooseGivenUp(learned, leases, now(), keptWhenFull)
    if (leases !== null && strays.size > mostStrays) for (const address of strays) if (!leases.has(address)) strays.delete(address)
    for (const address of over) forget(address)
    for (const address of shut) {
      forget(address)
      unwanted.add(address)
      strays.add(address)
    }
    makingRoom = false
  }

  async function commit(wanted: Rules): Promise<void> {
    // What is on its way was judged under the policy that still holds.
    await sending
    const lost = [...new Set([...unwanted, ...strays])]
    const allows = leadJudge(wanted)
    for (const [address, { leads }] of learned) if (mayOpen(wanted, address).opened === null || !leads.some(allows)) lost.push(address)
    generation = nextGeneration(generation)
    // A packet that is inside the old chain at that moment may renew its address just behind its deletion, and its connection would then be
    // taken for one of the new policy. Hence addresses are banned by name first, and deleted when no packet is in the old chain any more.
    let named = 0
    try {
      for (; lost.length - named > mostAtOnce; named += mostAtOnce) await nft.apply(banStatements(lost.slice(named, named + mostAtOnce)), replaceTimeoutMs)
      await nft.apply([...banStatements(lost.slice(named)), ...policyStatements({ ...setting, rules: wanted, generation }, lost)], replaceTimeoutMs)
    } catch (error) {
      // The old policy holds. Whether the kernel has these addresses, and bans them, is asked anew with the next answer that needs one.
      for (const address of lost) {
        const entry = learned.get(address)
        if (entry !== undefined) entry.until = 0
      }
      const unknown = error instanceof NftError && error.outcome === 'unknown'
      if (unknown) await enforceAgain()
      // Of those that were named already some may be in use, and be refused.
      if (named > 0 || unknown) {
        banned = true
        await forgetUnwanted([], replaceTimeoutMs).catch(() => undefined)
      }
      throw error
    }
    updates++
    rules = wanted
    for (const address of lost) {
      forget(address)
      unwanted.add(address)
    }
    strays.clear()
    // What waits was judged under the old policy and has not reached the kernel; an address that nobody opened before is as if never heard of.
    if (next !== null) {
      release(next, false)
      for (const address of next.elements.keys()) if (!next.known.has(address)) forget(address)
      next.settle('stale')
      next = null
    }
    banned ||= lost.length > 0
  }

  /** Behind a policy that is enforced already. Where it fails, the addresses stay banned until the next transaction. */
  async function forgetBanned(): Promise<void> {
    if (banned) await forgetUnwanted([], replaceTimeoutMs).catch(() => undefined)
  }

  /** The kernel may have a policy that its owner is told it has not. */
  async function enforceAgain(): Promise<void> {
    generation = nextGeneration(generation)
    // With the bans of the change before it, which may not be lifted yet.
    const shut = [...unwanted]
    try {
      for (let at = 0; at < shut.length; at += mostAtOnce) await nft.apply(banStatements(shut.slice(at, at + mostAtOnce)), replaceTimeoutMs)
      await nft.apply(policyStatements({ ...setting, rules, generation }, shut), replaceTimeoutMs)
    } catch (error) {
      lose((error as Error).message)
    }
  }

  async function confirmed(batches: readonly Batch[], judgedBy: Rules): Promise<Opened> {
    void pump()
    for (const batch of batches) {
      const result = await batch.done
      if (result !== 'open') return result
    }
    return judgedBy === rules ? 'open' : 'stale'
  }

  return {
    get rules() {
      return rules
    },
    get learned() {
      return learned.size
    },
    get updates() {
      return updates
    },
    replace(wanted) {
      replacing++
      const enforced = replacements.then(() => commit(wanted))
      replacements = enforced.then(forgetBanned, () => undefined).then(() => {
        replacing--
        void pump()
      })
      return enforced
    },
    open(name, aliases, addresses, seconds, judgedBy) {
      if (judgedBy !== rules) return 'stale'
      if (tooMany(addresses)) return 'failed'
      const wanted = now() + seconds * 1000
      let batches: Batch[] | null = null
      for (const address of addresses) {
        const batch = enqueue(address, name, aliases, wanted, seconds)
        if (batch !== null && !batches?.includes(batch)) (batches ??= []).push(batch)
      }
      return batches === null ? 'open' : confirmed(batches, judgedBy)
    },
  }
}

/** Clients' resolvers give up after 5 s: they are told in time that there is no answer. */
const openTimeoutMs = 3000
/** Thousands of rules take a tenth of a second; a machine under load may need much longer. */
const replaceTimeoutMs = 30_000

function nextGeneration(generation: number): number {
  return (generation % 0x7fffffff) + 1
}
