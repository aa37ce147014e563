/**
 * One DNS question from start to end. The order is the security argument:
 *   1. judge the name       a denied name never leaves the machine
 *   2. ask upstream
 *   3. judge each address   an allowed name must not lead into a denied network
 *   4. open the firewall    and wait for the kernel
 *   5. answer               only now may the sandbox learn the address
 * A policy that changes in between sends the question back to 1; what was asked upstream is not asked again.
 * Callbacks, because promises would cost as much as all five steps: a question whose addresses are open already waits for nothing but upstream.
 */
import type { Rules } from '#policies/compile.ts'
import { decideName } from '#policies/decide.ts'
import type { DenyReason, Verdict } from '#policies/verdict.ts'
import { composeReply } from './compose.ts'
import type { Firewall, Opened } from './firewall.ts'
import { deniedAlias, type AddressJudge } from './judge.ts'
import { added, emptyReply, headerReply, isTruncated, rcodes, readAnswer, readQuestion, truncatedReply, type AddressRecord, type Answer, type Question } from './packet.ts'
import { leaseSeconds } from './ruleset.ts'

export type Transport = 'udp' | 'tcp'

/** Asks the upstream resolvers; null when none of them gave a usable answer in time. The query's id is overwritten on the way. */
export type Resolver = {
  ask(query: Buffer, questionEnd: number, transport: Transport, done: Done): void
}

/** Takes one message, or null for none; called once. */
export type Done = (message: Buffer | null) => void

/** `no-upstream`: none answered in time; `upstream-failed`: all that did said SERVFAIL, REFUSED or the like. */
export const results = ['answered', 'denied', 'no-upstream', 'upstream-failed', 'bad-answer', 'kernel-failed', 'policy-unsettled'] as const

/** What is told about each question, once, when its outcome is known. */
export type Outcome = {
  readonly question: Question
  readonly verdict: Verdict
  /** What the verdict was made by. */
  readonly rules: Rules
  /** The verdict is about this name, which the question's own led to; undefined: about that itself. */
  readonly alias?: string | null | undefined
  readonly result: (typeof results)[number]
  /** Opened for the sandbox. */
  readonly addresses: readonly string[]
  /** In the answer, and left out of what the sandbox got. */
  readonly shut: readonly ShutAddress[]
  /** What the sandbox was told (RFC 1035 4.1.1). */
  readonly rcode: number
  /** Milliseconds from the question to its outcome. */
  readonly took: number
}

export type ShutAddress = { readonly address: string; readonly reason: DenyReason }

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

/** Gives the reply to one message of the sandbox; null when it deserves none. */
export function answer(query: Buffer, transport: Transport, deps: AnswerDeps, done: Done): void {
  const question = readQuestion(query)
  if (question === null) return done(null)
  if (typeof question === 'number') return done(headerReply(query, question))
  new Course(query, question, transport, deps, done).judgeName()
}

const none: readonly never[] = []

/** One question on its way. */
class Course {
  readonly query: Buffer
  readonly question: Question
  readonly transport: Transport
  readonly deps: AnswerDeps
  readonly done: Done
  readonly id: number
  readonly started: number
  turn = 0
  /** What the name was judged by, and how. */
  rules: Rules
  verdict: Verdict
  /** Which name of the chain was denied. */
  alias: string | null | undefined = undefined
  /** What upstream said. */
  message: Buffer | null = null

  constructor(query: Buffer, question: Question, transport: Transport, deps: AnswerDeps, done: Done) {
    this.query = query
    this.question = question
    this.transport = transport
    this.deps = deps
    this.done = done
    this.id = query.readUInt16BE(0)
    this.started = deps.now()
    this.rules = deps.firewall.rules
    this.verdict = judgeName(this.rules, question)
  }

  /** 1. judge the name, 2. ask upstream */
  judgeName(): void {
    const { deps, query, question } = this
    if (this.turn++ > 0) {
      this.rules = deps.firewall.rules
      this.verdict = judgeName(this.rules, question)
    }
    if (this.verdict.action === 'deny') return this.refuse(rcodes.nxDomain, 'denied')
    if (this.turn > maxTurns) return this.refuse(rcodes.servFail, 'policy-unsettled')
    if (this.message !== null) return this.judgeAddresses(this.message)
    deps.resolver.ask(query, question.end, this.transport, (message) => {
      if (message === null) return this.refuse(rcodes.servFail, 'no-upstream')
      this.message = message
      this.judgeAddresses(message)
    })
  }

  /** 3. judge each address, 4. open the firewall */
  judgeAddresses(message: Buffer): void {
    const { deps, rules, question } = this
    // Whatever is in it may be cut anywhere, and is not to be used. RFC 2181 9
    if (isTruncated(message)) return this.settle(truncatedReply(this.query, question.end), 'answered')
    const found = readAnswer(message, question)
    if (found === null || contradicts(found)) return this.refuse(rcodes.servFail, 'bad-answer')
    if (found.rcode !== rcodes.noError && found.rcode !== rcodes.nxDomain) return this.refuse(rcodes.servFail, 'upstream-failed')
    if (rules !== deps.firewall.rules) return this.judgeName()
    const denied = deniedAlias(rules, found.aliases)
    if (denied !== null) {
      this.verdict = denied.verdict
      this.alias = denied.alias
      return this.refuse(rcodes.nxDomain, 'denied')
    }
    let allowed: AddressRecord[] | null = null
    let addresses: string[] | null = null
    let shut: ShutAddress[] | null = null
    for (const record of found.addresses) {
      const { opened, reason } = deps.mayOpen(rules, record.address)
      if (opened === null) shut = added(shut, { address: record.address, reason })
      else {
        allowed = added(allowed, record)
        addresses = added(addresses, opened)
      }
    }
    const seconds = leaseSeconds(found.ttl)
    const opening = addresses ?? none
    const tell = (opened: Opened): void => {
      // 5. answer
      if (opened === 'stale') return this.judgeName()
      if (opened === 'failed') return this.refuse(rcodes.servFail, 'kernel-failed')
      const reply = composeReply({ query: this.query, question, message, found, allowed: allowed ?? none, seconds, strict: rules.defaultAction === 'deny' })
      if (reply === null) return this.refuse(rcodes.servFail, 'bad-answer')
      this.settle(reply, 'answered', opening, shut ?? none)
    }
    const opened = opening.length === 0 ? 'open' : deps.firewall.open(question.name as string, found.aliases, opening, seconds, rules)
    if (typeof opened === 'string') tell(opened)
    else void opened.then(tell)
  }

  refuse(rcode: number, result: Outcome['result']): void {
    this.settle(emptyReply(this.query, this.question.end, rcode), result)
  }

  settle(reply: Buffer, result: Outcome['result'], addresses: readonly string[] = none, shut: readonly ShutAddress[] = none): void {
    const { deps, question, verdict, rules, alias } = this
    deps.report({ question, verdict, rules, alias, result, addresses, shut, rcode: (reply[3] as number) & 0xf, took: deps.now() - this.started })
    reply.writeUInt16BE(this.id, 0)
    this.done(reply)
  }
}

/** A name that does not exist has no addresses: nothing of such an answer may be used. */
function contradicts({ rcode, addresses }: Answer): boolean {
  return rcode === rcodes.nxDomain && addresses.length > 0
}

/** Counts policies: a remembered question must not keep the rules in memory that it was judged by. */
let counted: Rules | null = null
let count = 0

/** `decideName`, once for each policy: the same question comes again and again, and as the same object (`packet.ts`). */
function judgeName(rules: Rules, question: Question): Verdict {
  if (rules !== counted) {
    counted = rules
    count++
  }
  const { judged } = question
  if (judged.policy === count && judged.verdict !== null) return judged.verdict
  judged.policy = count
  return (judged.verdict = decideName(rules, question.name))
}
