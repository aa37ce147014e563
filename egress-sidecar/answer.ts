/**
 * One DNS question from start to end. The order is the security argument:
 *   1. judge the name       a denied name never leaves the machine
 *   2. ask upstream
 *   3. judge each address   an allowed name must not lead into a denied network
 *   4. open the firewall    and wait for the kernel
 *   5. answer               only now may the sandbox learn the address
 * A policy that changes in between sends the question back to 1; what was asked upstream is not asked again.
 */
import type { Rules } from '#policies/compile.ts'
import { decideName } from '#policies/decide.ts'
import type { Verdict } from '#policies/verdict.ts'
import { composeReply } from './compose.ts'
import type { Firewall } from './firewall.ts'
import type { AddressJudge } from './judge.ts'
import { emptyReply, headerReply, rcodes, readAnswer, readQuestion, truncatedReply, type AddressRecord, type Answer, type Question } from './packet.ts'
import { leaseSeconds } from './ruleset.ts'

export type Transport = 'udp' | 'tcp'

/** Asks the upstream resolvers; null when none of them gave a usable answer in time. The query's id is overwritten on the way. */
export type Resolver = {
  ask(query: Buffer, questionEnd: number, transport: Transport): Promise<Buffer | null>
}

export const results = ['answered', 'denied', 'no-upstream', 'bad-answer', 'kernel-failed', 'policy-unsettled'] as const

/** What is told about each question, once, when its outcome is known. */
export type Outcome = {
  readonly question: Question
  readonly verdict: Verdict
  readonly result: (typeof results)[number]
  /** Opened for the sandbox. */
  readonly addresses: readonly string[]
  /** Milliseconds from the question to its outcome. */
  readonly took: number
}

export type AnswerDeps = {
  readonly resolver: Resolver
  readonly firewall: Firewall
  readonly mayOpen: AddressJudge
  /** Milliseconds, monotonic. */
  readonly now: () => number
  readonly report: (outcome: Outcome) => void
}

/** Policy changes that one question may live through before it is given up. */
const maxTurns = 4

/** The reply to one message of the sandbox; null when it deserves none. */
export async function answer(query: Buffer, transport: Transport, deps: AnswerDeps): Promise<Buffer | null> {
  const question = readQuestion(query)
  if (question === null) return null
  if (typeof question === 'number') return headerReply(query, question)
  const id = query.readUInt16BE(0)
  const started = deps.now()
  const { reply, verdict, result, addresses } = await settle(query, question, transport, deps)
  deps.report({ question, verdict, result, addresses, took: deps.now() - started })
  reply.writeUInt16BE(id, 0)
  return reply
}

type Settled = { reply: Buffer; verdict: Verdict; result: Outcome['result']; addresses: readonly string[] }

async function settle(query: Buffer, question: Question, transport: Transport, { resolver, firewall, mayOpen }: AnswerDeps): Promise<Settled> {
  let message: Buffer | null | undefined
  for (let turn = 1; ; turn++) {
    // 1. judge the name
    const rules = firewall.rules
    const verdict = decideName(rules, question.name)
    if (verdict.action === 'deny') return refuse(query, question, rcodes.nxDomain, 'denied', verdict)
    if (turn > maxTurns) return refuse(query, question, rcodes.servFail, 'policy-unsettled', verdict)

    // 2. ask upstream
    message ??= await resolver.ask(query, question.end, transport)
    if (message === null) return refuse(query, question, rcodes.servFail, 'no-upstream', verdict)
    const found = readAnswer(message, question)
    if (found === null || contradicts(found)) return refuse(query, question, rcodes.servFail, 'bad-answer', verdict)
    if (found.rcode !== rcodes.noError && found.rcode !== rcodes.nxDomain) return refuse(query, question, rcodes.servFail, 'no-upstream', verdict)
    if (found.truncated) return { reply: truncatedReply(query, question.end), verdict, result: 'answered', addresses: [] }

    // 3. judge each address
    if (rules !== firewall.rules) continue
    const denied = deniedAlias(rules, found)
    if (denied !== null) return refuse(query, question, rcodes.nxDomain, 'denied', denied)
    const allowed: AddressRecord[] = []
    const addresses: string[] = []
    for (const record of found.addresses) {
      const address = mayOpen(rules, record.address)
      if (address === null) continue
      allowed.push(record)
      addresses.push(address)
    }

    // 4. open the firewall and wait for the kernel
    const seconds = leaseSeconds(found.ttl)
    const opened = addresses.length === 0 ? 'open' : await firewall.open(question.name as string, addresses, seconds, rules)
    if (opened === 'stale') continue
    if (opened === 'failed') return refuse(query, question, rcodes.servFail, 'kernel-failed', verdict)

    // 5. answer
    const reply = composeReply({ query, question, message, found, allowed, seconds, strict: rules.defaultAction === 'deny' })
    return { reply, verdict, result: 'answered', addresses }
  }
}

function refuse(query: Buffer, question: Question, rcode: number, result: Outcome['result'], verdict: Verdict): Settled {
  return { reply: emptyReply(query, question.end, rcode), verdict, result, addresses: [] }
}

/** A name that does not exist has no addresses: nothing of such an answer may be used. */
function contradicts({ rcode, addresses }: Answer): boolean {
  return rcode === rcodes.nxDomain && addresses.length > 0
}

/** The verdict of a rule (not of the default) that denies a name of the chain: its author did not mean "unless reached by an alias". */
function deniedAlias(rules: Rules, found: Answer): Verdict | null {
  for (const alias of found.aliases) {
    const verdict = decideName(rules, alias)
    if (verdict.reason === 'rule-denies' || verdict.reason === 'malformed-name') return verdict
  }
  return null
}
