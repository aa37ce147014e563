/** What is wrong with what the clients of a storm have seen, and with what the gateway says of it. */
import { readAnswers, type SeenAnswer } from '../strict-parser.ts'
import type { Line } from './clients.ts'
import { filler, idPattern, never, type Asked, type Ledger } from './ledger.ts'

/** The sandbox whose own answers may be in disorder. */
export const liar = 'liar'

/** A whole answer and the request that it is for. */
export type Pair = { readonly asked: Asked; readonly answer: SeenAnswer }

/** @param brokenOff it was still open when the gateway was closed */
export function judgeLine(line: Line, ledger: Ledger, brokenOff: boolean): { problems: string[]; pairs: Pair[] } {
  const { received, ended, reset } = line.client
  const problems: string[] = []
  const own = new Set(line.asked.map(({ id }) => id))
  const asksLiar = line.asked.some(({ sandbox }) => sandbox === liar)
  for (const [id] of received.matchAll(idPattern)) {
    if (!own.has(id) && !(asksLiar && ledger.asked.get(id)?.sandbox === liar)) problems.push(`it sees ${id}`)
  }
  if (received.includes(never)) problems.push('it sees what is part of no answer')

  const seen = readAnswers(received, line.asked.map(({ method }) => method))
  const next = line.asked[seen.complete.length]
  const unframed = next?.version === '1.0' && seen.problems[0] === '0 framings of an answer' && seen.problems.length === 1
  if (seen.problems.length > 0 && !unframed) problems.push(...seen.problems)
  const pairs: Pair[] = []
  for (const [index, answer] of seen.complete.entries()) {
    const asked = line.asked[index]
    if (asked === undefined) problems.push(`answer ${answer.status} to nothing`)
    else {
      problems.push(...judgeAnswer(asked, answer))
      pairs.push({ asked, answer })
    }
  }
  if (seen.complete.slice(0, -1).some(({ closes }) => closes)) problems.push('an answer behind the last one')
  const last = pairs.at(-1)
  if (last?.answer.status === 101) problems.push(...judgeTunnel(last, seen.rest, line, ledger, brokenOff))
  else if (last?.answer.closes === true && seen.rest !== '') problems.push('bytes behind the last answer')
  // Where only the end of the connection says that this was all, it must not say so too early.
  if (unframed && ended && !reset) {
    const end = seen.rest.indexOf('\r\n\r\n')
    const { complete: [answer] } = readAnswers(`${seen.rest.slice(0, end)}\r\ncontent-length: ${seen.rest.length - end - 4}${seen.rest.slice(end)}`, [])
    if (answer === undefined) problems.push('cannot read an answer without a length')
    else problems.push(...judgeAnswer(next as Asked, answer))
  }
  return { pairs, problems: problems.map((problem) => `client: ${problem}; asked ${JSON.stringify(line.asked.slice(Math.max(0, seen.complete.length - 2), seen.complete.length + 2).map(({ method, version, kind, id, sandbox, sent, ends, deliveries }) => ({ method, version, kind, id, sandbox, sent, ends, deliveries: deliveries.map(({ script: { text, tail, late, ...script }, ...rest }) => ({ ...script, text: text.slice(0, 150), size: text.length, ...rest, tunnelSent: rest.tunnelSent.length, tunnelGot: rest.tunnelGot.length })) })))}; received ${JSON.stringify(received.slice(-600))}`) }
}

function judgeAnswer(asked: Asked, { status, interim, headers, body }: SeenAnswer): string[] {
  const all = (name: string): string => headers.filter(([key]) => key === name).map(([, value]) => value).join()
  const problems: string[] = []
  const echo = all('x-echo')
  if (asked.sandbox === liar && echo !== '') return []
  const about = `${asked.kind} ${asked.id} got ${status}`
  if (echo === '') {
    // Ours: the gateway's own, or a refusal that names the request unless nothing could be read of it.
    if (asked.kind === 'own') return status === 200 || status >= 400 ? [] : [about]
    if (status < 400) problems.push(`${about} of nobody`)
    // README, --header-timeout: a head that is sent may not have come yet where all share one busy process. Nothing is known of it then.
    if (status === 408) return problems
    const named = all('x-request-id')
    if (named !== asked.id && !(named === '' && (asked.kind === 'bad' || !asked.headSent))) problems.push(`${about} for ${named}`)
    if (interim.some((one) => one !== 100 && !asked.deliveries.some(({ script }) => script.interim.includes(one)))) problems.push(`${about} after ${interim.join()}`)
    return problems
  }
  const [id, nth] = echo.split('.')
  const script = asked.deliveries[Number(nth)]?.script
  if (id !== asked.id || script === undefined) return [`${about} for ${echo}`]
  if (status !== script.status) problems.push(`${about} instead of ${script.status}`)
  if (script.length === -1) problems.push(`${about}: half an answer looks like a whole one`)
  else if (body !== (asked.method === 'HEAD' ? '' : filler(id, script.length))) problems.push(`${about}: body of ${body.length} instead of ${script.length}`)
  if ((status === 101) !== (asked.kind === 'upgrade' && script.status === 101)) problems.push(`${about}, which is no upgrade`)
  const informed = interim.filter((one) => one !== 100)
  if (interim.length - informed.length > (asked.expects ? 1 : 0)) problems.push(`${about}, and 100 unasked`)
  if (informed.join() !== (asked.version === '1.0' ? '' : script.interim.join()) && asked.deliveries.length === 1) problems.push(`${about} after ${informed.join()} instead of ${script.interim.join()}`)
  return problems
}

/** Each side of a tunnel gets what the other sent, in order and up to some place; to its end, if it ended in order. */
function judgeTunnel({ asked, answer }: Pair, got: string, line: Line, ledger: Ledger, brokenOff: boolean): string[] {
  const echo = answer.headers.find(([name]) => name === 'x-echo')?.[1] ?? ''
  const delivery = asked.deliveries[Number(echo.split('.')[1])]
  if (delivery === undefined) return ['a tunnel to nobody']
  const problems: string[] = []
  const { tunnelSent, tunnelGot, tunnelEnded } = delivery
  // The gateway may have put a Close frame behind it.
  const parting = /\x88\x02\x03[\xe9\xf1]$/.test(got) && !tunnelSent.startsWith(got)
  const sent = parting ? got.slice(0, -4) : got
  if (!tunnelSent.startsWith(sent)) problems.push(`tunnel ${asked.id} does not bring what its sandbox sent`)
  if (!asked.tunnel.startsWith(tunnelGot)) problems.push(`tunnel ${asked.id} does not bring what its client sent`)
  // Who is told to go, or loses his sandbox, gets no more of it (README: drain, `--max-message-bytes`, lives of a sandbox).
  const quiet = !brokenOff && !parting && !ledger.disturbed(asked.sandbox)
  if (tunnelEnded && quiet && line.client.ended && !line.client.reset && sent !== tunnelSent) problems.push(`tunnel ${asked.id} ends after ${sent.length} of ${tunnelSent.length}`)
  return problems
}

type AccessLine = { readonly msg: string; readonly request_id: string; readonly status: number; readonly code: string; readonly bytes_out: number; readonly sandbox_id: string }

/** One line for each request that anybody noticed, and the truth in it. */
export function judgeAccess(texts: readonly string[], ledger: Ledger, pairs: readonly Pair[]): string[] {
  const problems: string[] = []
  const lines = new Map<string, AccessLine>()
  for (const text of texts) {
    const line = JSON.parse(text) as AccessLine
    if (line.code === 'EDGE_BUG') problems.push(text)
    if (line.msg === 'malformed') continue
    if (lines.has(line.request_id)) problems.push(`two lines of ${text}`)
    lines.set(line.request_id, line)
    const asked = ledger.asked.get(line.request_id)
    if (asked === undefined) problems.push(`line of nobody: ${text}`)
    else if (line.sandbox_id !== '' && line.sandbox_id !== asked.sandbox) problems.push(`line of another sandbox: ${text}`)
  }
  for (const { asked, answer } of pairs) {
    const line = lines.get(asked.id)
    if (line === undefined) {
      if (!(asked.kind === 'bad' && answer.status >= 400) && answer.status !== 408) problems.push(`no line of ${asked.kind} ${asked.id}, answered ${answer.status}`)
      continue
    }
    if (line.status !== answer.status) problems.push(`${answer.status} was answered: ${JSON.stringify(line)}`)
    const relayed = answer.headers.some(([name]) => name === 'x-echo')
    if (relayed && answer.status !== 101 && line.bytes_out !== answer.body.length) problems.push(`${answer.body.length} bytes were answered: ${JSON.stringify(line)}`)
  }
  for (const { id, kind, deliveries } of ledger.asked.values()) if (deliveries.length > 0 && !lines.has(id)) problems.push(`no line of ${kind} ${id}, which was at its sandbox`)
  return problems
}
