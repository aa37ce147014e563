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
import { decideName } from '#policies/decide.ts'
import type { Rules } from '#policies/compile.ts'
import type { AddressJudge } from './judge.ts'
import type { Nft } from './nft.ts'
import { chooseGivenUp, readLeases } from './full-table.ts'
import { forgetStatements, learnedSets, openStatements, policyStatements, type RulesetInput } from './ruleset.ts'

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
  /** Opens addresses that `name` led to, for `seconds`, as judged under `rules`. At once when all of them are open. */
  open(name: string, addresses: readonly string[], seconds: number, rules: Rules): Opened | Promise<Opened>
}

/** Addresses kept at a time; beyond that those that nobody uses are given up, down to the second number. The kernel's sets hold more. */
const maxLearned = 32768
const keptWhenFull = maxLearned - 4096
/** Names remembered per address: it stays open while one of them is allowed. */
const maxNames = 16
/** A lease that covers the client's TTL and this many ms is not extended again. */
const slackMs = 30_000

type Learned = { until: number; names: string[]; batch: Batch | null }

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
}

/** The boot rules must be in place; `initial` is loaded when the promise resolves. */
export async function createFirewall(initial: Rules, { nft, setting, mayOpen, now }: FirewallDeps): Promise<Firewall> {
  const learned = new Map<string, Learned>()
  /** Shut with the next transaction. */
  const unwanted = new Set<string>()
  /** Addresses that a policy took away are still banned by name in the kernel. */
  let banned = false
  let makingRoom = false
  let rules = initial
  let generation = 1
  let updates = 0
  let next: Batch | null = null
  let working = false
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
      batch.settle(await send(batch))
    }
    working = false
  }

  async function send(batch: Batch): Promise<Opened> {
    const shut = [...unwanted]
    let result: Opened = 'open'
    try {
      await nft.apply([...(shut.length > 0 || banned ? forgetStatements(shut) : []), ...openStatements(batch.elements, batch.known)], openTimeoutMs)
      updates++
      banned = false
      for (const address of shut) unwanted.delete(address)
    } catch {
      result = 'failed'
    }
    release(batch, result === 'open')
    return result
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

  function enqueue(address: string, name: string, wanted: number, seconds: number): Batch | null {
    const before = learned.get(address)
    const entry: Learned = before ?? { until: 0, names: [], batch: null }
    if (entry.names[0] !== name && !entry.names.includes(name)) {
      if (entry.names.length >= maxNames) entry.names.shift()
      entry.names.push(name)
    }
    if (entry.until >= wanted - slackMs) return entry.batch
    next ??= new Batch()
    if (before !== undefined || unwanted.has(address)) next.known.add(address)
    entry.until = wanted
    entry.batch = next
    next.elements.set(address, seconds)
    unwanted.delete(address)
    learned.delete(address)
    learned.set(address, entry)
    if (learned.size > maxLearned && !makingRoom) void makeRoom()
    return next
  }

  // Meanwhile the table grows on; a flood of answers ends at the size of the kernel's sets.
  async function makeRoom(): Promise<void> {
    makingRoom = true
    const leases = await Promise.all(learnedSets.map((set) => nft.list(set))).then((listings) => readLeases(listings.join('')), () => null)
    const { over, shut } = chooseGivenUp(learned, leases, now(), keptWhenFull)
    for (const address of over) learned.delete(address)
    for (const address of shut) {
      learned.delete(address)
      unwanted.add(address)
    }
    makingRoom = false
  }

  async function commit(wanted: Rules): Promise<void> {
    for (const [address, entry] of learned) if (!stillAllowed(wanted, address, entry, mayOpen)) unwanted.add(address)
    const lost = [...unwanted]
    generation = (generation % 0x7fffffff) + 1
    await nft.apply(policyStatements({ ...setting, rules: wanted, generation }, lost), replaceTimeoutMs)
    updates++
    rules = wanted
    for (const address of lost) learned.delete(address)
    // What waits was judged under the old policy and has not reached the kernel.
    if (next !== null) {
      release(next, false)
      next.settle('stale')
      next = null
    }
    // A packet that was inside the old chain at that moment may have renewed its address just behind the deletion, and its connection
    // would then be taken for one of the new policy. Hence the ban. The packet has left the chain by now. Should this fail, the next
    // transaction does it.
    if (lost.length === 0) return
    banned = true
    try {
      await nft.apply(forgetStatements(lost), replaceTimeoutMs)
      banned = false
      for (const address of lost) unwanted.delete(address)
    } catch {
      // Fails closed: the addresses stay banned until then.
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
      const result = replacements.then(() => commit(wanted)).finally(() => {
        replacing--
        void pump()
      })
      replacements = result.catch(() => undefined)
      return result
    },
    open(name, addresses, seconds, judgedBy) {
      if (judgedBy !== rules) return 'stale'
      const wanted = now() + seconds * 1000
      let batches: Batch[] | null = null
      for (const address of addresses) {
        const batch = enqueue(address, name, wanted, seconds)
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

function stillAllowed(rules: Rules, address: string, { names }: Learned, mayOpen: AddressJudge): boolean {
  return mayOpen(rules, address) !== null && names.some((name) => decideName(rules, name).action === 'allow')
}
