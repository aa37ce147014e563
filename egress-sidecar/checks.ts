/**
 * What the sidecar proves to itself before it says "ready": the rules are in the kernel, port 53 of any address ends at our
 * listener, our own way out is not open to everywhere, and our own questions do not come back to us.
 * That another process of the namespace is not exempt cannot be seen from in here; the server proves that with a probe container.
 */
import { randomBytes } from 'node:crypto'
import { createSocket } from 'node:dgram'
import { connect } from 'node:net'
import type { Rules } from '#policies/compile.ts'
import { decideAddress } from '#policies/decide.ts'
import type { Nft } from './nft.ts'
import { recordTypes } from './packet.ts'
import { writeQuestion } from './question.ts'
import { dnsPort, listStatements } from './ruleset.ts'

/** Questions seen by the listener while the checks run; answered with an empty reply. */
export type Probe = {
  /** Lower-case names that arrived. */
  readonly seen: ReadonlySet<string>
}

export type CheckInput = {
  readonly nft: Nft
  readonly filter: boolean
  readonly rules: Rules
  readonly probe: Probe
  /** Sends one question by the exempt sockets at once; its answer is not waited for. */
  readonly askUpstream: (query: Buffer, questionEnd: number) => Promise<unknown>
}

/** IPv4 dummy address (RFC 7600, 192.0.0.8): routed like any other, but nobody's. */
const nobody = '192.0.0.8'
const loopback = '127.0.0.53'
const waitMs = 1000

/** All reasons why the namespace is not protected; empty when it is. */
export async function failedChecks(input: CheckInput): Promise<string[]> {
  const [present, redirect, elsewhere, loop] = await Promise.all([rulesPresent(input), redirectAnswers(), refusedElsewhere(input), noLoop(input)])
  return [present, redirect, elsewhere, loop].filter((problem) => problem !== null)
}

/** Why the kernel does not hold our rules; null when it does. */
export async function rulesPresent({ nft, filter, rules }: Pick<CheckInput, 'nft' | 'filter' | 'rules'>): Promise<string | null> {
  const denyByDefault = rules.defaultAction === 'deny'
  const [nat = '', egress = ''] = (await Promise.all(listStatements.map((statement) => nft.apply([statement])))).map(chainOf)
  const policy = filter && denyByDefault ? 'drop' : 'accept'
  const redirects = nat.startsWith('type nat hook output priority -110;') && nat.endsWith(`redirect to :${dnsPort}`)
  const filters = egress.startsWith(`type filter hook output priority filter; policy ${policy};`) && (policy === 'accept' || egress.endsWith('goto denied'))
  return redirects && filters ? null : 'the rules are not in the kernel as they were written'
}

/** The lines of the one chain in nft's listing. */
function chainOf(listing: string): string {
  const start = listing.indexOf('\tchain ')
  return start === -1 ? '' : listing.slice(listing.indexOf('\n', start), listing.indexOf('\n\t}', start)).trim()
}

/** A question to an address that is not ours must be answered: by us. */
async function redirectAnswers(): Promise<string | null> {
  for (const address of [nobody, loopback]) {
    const outcome = await questionTo(address)
    if (outcome === 'answered') return null
    if (outcome === 'silence') break
  }
  return 'port 53 is not redirected to the sidecar'
}

function questionTo(address: string): Promise<'answered' | 'silence' | 'unroutable'> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4')
    const timer = setTimeout(() => end('silence'), waitMs)
    const end = (outcome: 'answered' | 'silence' | 'unroutable'): void => {
      clearTimeout(timer)
      socket.close()
      resolve(outcome)
    }
    socket.once('message', () => end('answered'))
    socket.once('error', () => end('unroutable'))
    socket.send(probeQuestion().query, 53, address, (error) => {
      if (error !== null) end('unroutable')
    })
  })
}

/** A place that this policy does not open; where it opens every address, a port that none opens (DNS over TLS). */
function refusedElsewhere({ filter, rules }: CheckInput): Promise<string | null> {
  if (!filter) return Promise.resolve(null)
  const port = decideAddress(rules, nobody).action === 'deny' ? 443 : 853
  return new Promise((resolve) => {
    const socket = connect({ host: nobody, port })
    const timer = setTimeout(() => end(`a connection to a place nobody allowed (port ${port}) was not refused`), waitMs)
    const end = (problem: string | null): void => {
      clearTimeout(timer)
      socket.destroy()
      resolve(problem)
    }
    socket.once('connect', () => end('the sidecar itself can connect to anywhere'))
    socket.once('error', () => end(null))
  })
}

async function noLoop({ probe, askUpstream }: CheckInput): Promise<string | null> {
  const { name, query } = probeQuestion()
  void askUpstream(query, query.length)
  // What is asked later is answered later: a question of ours that was redirected is here by then.
  await redirectAnswers()
  return probe.seen.has(name) ? "the sidecar's own questions come back to it: the exemption has no effect" : null
}

/** A question for a name that does not exist (RFC 6761 6.4), different each time. */
function probeQuestion(): { name: string; query: Buffer } {
  const name = `${randomBytes(8).toString('hex')}.invalid`
  return { name, query: writeQuestion(name, recordTypes.a) }
}
