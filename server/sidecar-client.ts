/** Talks to an egress sidecar: are the rules in the kernel, what is the policy, change it. */
import { setTimeout as delay } from 'node:timers/promises'
import { Agent, request } from 'undici'
import type { NetworkPolicy, NetworkRule } from '#policies/document.ts'
import { headerNames, wellKnownPorts } from '#policies/wire.ts'
import { ApiError } from './api-error.ts'

/**
 * Asks a sidecar; a seam for tests. Rejects when its rules are not in the kernel in time.
 * @param late a policy too large to start with: handed over as soon as the sidecar denies everything, and read back
 */
export type ConfirmRules = (address: string, token: string, late: NetworkPolicy | null, signal: AbortSignal) => Promise<void>
/** `rules` null: only read. @returns what the sidecar enforces now, which was started with the configuration of its day */
export type AskPolicy = (address: string, token: string, rules: readonly NetworkRule[] | null) => Promise<PolicyAnswer>
export type PolicyAnswer = {
  readonly mode: string
  readonly enforcementMode: string
  readonly policy: { readonly defaultAction: string; readonly egress: readonly NetworkRule[] }
  /** Addresses that no rule opens. */
  readonly floor: readonly string[]
}

const askPause = 15
const askTimeout = 1000
/** A change waits for the kernel. */
const changeTimeout = 30_000
const mostAnswer = 4 * 1024 * 1024

export class SidecarClient {
  readonly #port: number
  readonly #budget: number
  /** No connection is kept: an address may belong to another sandbox a moment later. */
  readonly #agent = new Agent({ connect: { timeout: askTimeout }, headersTimeout: changeTimeout, bodyTimeout: changeTimeout, pipelining: 0, maxResponseSize: mostAnswer })

  /** @param budget ms a sidecar may take until its rules are in the kernel */
  constructor(budget: number, port: number = wellKnownPorts.egressApi) {
    this.#budget = budget
    this.#port = port
  }

  readonly confirm: ConfirmRules = async (address, token, late, signal) => {
    await this.#ready(address, token, signal)
    if (late !== null) await this.#handOver(address, token, late, signal)
  }

  /** Polls `/healthz`, which says 200 only when the rules are in the kernel. */
  async #ready(address: string, token: string, signal: AbortSignal): Promise<void> {
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(this.#budget)])
    let last = 'no answer'
    while (!deadline.aborted) {
      try {
        const { status } = await this.#ask(address, token, 'GET', '/healthz', null, AbortSignal.any([deadline, AbortSignal.timeout(askTimeout)]))
        if (status >= 200 && status < 300) return
        last = `status ${status}`
      } catch (error) {
        last = (error as { code?: string }).code ?? (error as Error).name
      }
      await delay(askPause, undefined, { signal: deadline }).catch(() => undefined)
    }
    signal.throwIfAborted()
    throw new ApiError('DOCKER::SANDBOX_START_FAILED', `Egress sidecar did not become ready within ${this.#budget / 1000}s (${last}).`)
  }

  async #handOver(address: string, token: string, policy: NetworkPolicy, stop: AbortSignal): Promise<void> {
    try {
      const signal = AbortSignal.any([stop, AbortSignal.timeout(changeTimeout)])
      const change = await this.#ask(address, token, 'POST', '/policy', JSON.stringify(policy), signal)
      if (change.status !== 200) throw new Error(`status ${change.status}: ${shortened(change.text)}`)
      const now = await this.#ask(address, token, 'GET', '/policy', null, signal)
      if (now.status !== 200 || !samePolicy((JSON.parse(now.text) as PolicyAnswer).policy, policy)) throw new Error('it reads back another policy')
    } catch (error) {
      stop.throwIfAborted()
      throw new ApiError('DOCKER::SANDBOX_START_FAILED', 'The egress sidecar did not take the policy.', { cause: error })
    }
  }

  readonly policy: AskPolicy = async (address, token, rules) => {
    // A change that was sent may still happen when nobody waits for it any more: a sidecar that is paused reads it later.
    let outcome = rules === null ? '' : ' The change may or may not have been made, or may still be: read the policy.'
    try {
      const signal = AbortSignal.timeout(changeTimeout)
      if (rules !== null) {
        refuseUnless200(await this.#ask(address, token, 'PATCH', '/policy', JSON.stringify(rules), signal))
        outcome = ' The change was made, but could not be read back.'
      }
      const [now, effective] = await Promise.all([this.#ask(address, token, 'GET', '/policy', null, signal), this.#ask(address, token, 'GET', '/policy/effective', null, signal)])
      if (now.status !== 200) throw new Error(`status ${now.status}: ${shortened(now.text)}`)
      return { ...(JSON.parse(now.text) as Omit<PolicyAnswer, 'floor'>), floor: readFloor(effective) }
    } catch (error) {
      if (error instanceof ApiError) throw error
      throw new ApiError('SANDBOX::EGRESS_UNAVAILABLE', `The egress sidecar of this sandbox did not answer.${outcome}`, { cause: error })
    }
  }

  async close(): Promise<void> {
    await this.#agent.close()
  }

  async #ask(address: string, token: string, method: 'GET' | 'PATCH' | 'POST', path: string, body: string | null, signal: AbortSignal): Promise<{ status: number; text: string }> {
    const answer = await request(`http://${address}:${this.#port}${path}`, { dispatcher: this.#agent, method, body, headers: { [headerNames.egressAuth]: token, ...(body === null ? {} : { 'content-type': 'application/json' }) }, signal })
    return { status: answer.statusCode, text: await answer.body.text() }
  }
}

/** Of a change. @throws ApiError with the sidecar's own words: it knows best what became of it */
function refuseUnless200({ status, text }: { status: number; text: string }): void {
  if (status === 200) return
  if (status === 400 || status === 413) throw new ApiError('SANDBOX::INVALID_PARAMETER', `The sidecar refuses the rules: ${shortened(text)}`)
  throw new ApiError('SANDBOX::EGRESS_UNAVAILABLE', `The egress sidecar of this sandbox could not make the change (status ${status}): ${shortened(text)}. Read the policy to see what holds.`)
}

/** Sidecars without this route, as the original's, have no floor. */
function readFloor({ status, text }: { status: number; text: string }): readonly string[] {
  if (status === 404) return []
  if (status !== 200) throw new Error(`status ${status}: ${shortened(text)}`)
  // Absent in sidecars of ours from before.
  return (JSON.parse(text) as Partial<PolicyAnswer>).floor ?? []
}

function shortened(text: string): string {
  return text.trim().slice(0, 300)
}

/** Names are the same in any case; sidecars may write them in lower case. */
function samePolicy(enforced: PolicyAnswer['policy'], wanted: NetworkPolicy): boolean {
  return enforced.defaultAction === wanted.defaultAction && enforced.egress.length === wanted.egress.length
    && enforced.egress.every((rule, index) => rule.action === wanted.egress[index]?.action && rule.target.toLowerCase() === wanted.egress[index]?.target.toLowerCase())
}
