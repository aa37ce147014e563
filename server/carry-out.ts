/** Carries out one step of a plan on one group and says what is there afterwards. */
import type { Config } from './config.ts'
import { mainSpec, type ContainerSpec } from './container-spec.ts'
import type { CreateRequest } from './create-request.ts'
import type { Found } from './docker.ts'
import type { EgressProbe } from './egress-probe.ts'
import type { Execd } from './execd.ts'
import { egressMember, mainMember, type Fact, type SandboxRecord } from './group.ts'
import type { Images } from './images.ts'
import type { SandboxNetwork } from './network.ts'
import type { Step } from './plan.ts'
import { bootPolicy, sidecarSpec } from './sidecar.ts'
import type { ConfirmRules } from './sidecar-client.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type Containers = {
  /** Quick, and perhaps a moment old. */
  list(labels: readonly string[]): Promise<Found[]>
  /** As it is now. */
  examine(labels: readonly string[]): Promise<Found[]>
  create(spec: ContainerSpec): Promise<string>
  start(containerId: string): Promise<void>
  address(containerId: string): Promise<string>
  remove(containerId: string): Promise<void>
  pause(containerId: string): Promise<void>
  resume(containerId: string): Promise<void>
}

/** What must be there before a group can be made, and the question only a sidecar can answer. */
export type Workshop = {
  readonly confirm: ConfirmRules
  readonly network: { readonly name: string }
  /** null: sandboxes have no execd. */
  readonly execd: Pick<Execd, 'install'> | null
  prepare(record: SandboxRecord, request: CreateRequest, progress: (line: string) => void, signal: AbortSignal): Promise<void>
}

export type Made = { readonly record: SandboxRecord; readonly request: CreateRequest | null; readonly facts: readonly Fact[]; readonly signal: AbortSignal }
type Deps = { readonly config: Config; readonly instance: string; readonly engine: Containers; readonly workshop: Workshop }
type Act = Extract<Step, { do: 'create' | 'start' | 'confirm' | 'remove' }>

export type Tools = { readonly images: Images; readonly network: SandboxNetwork; readonly confirm: ConfirmRules; readonly execd: Execd | null; /** null: what the egress image promises is believed. */ readonly probe: Pick<EgressProbe, 'ensure'> | null }

/** Images, network and execd. @param progress gets what is being waited for */
export function createWorkshop(config: Config, { images, network, confirm, execd, probe }: Tools): Workshop {
  return {
    confirm,
    network,
    execd,
    async prepare(record, request, progress, signal) {
      const wanted = [{ reference: request.image, platform: request.platform, auth: request.auth }]
      if (record.egress !== null && config.egress.image !== undefined) wanted.push({ reference: config.egress.image, platform: null, auth: null })
      const pulling = (reference: string) => (line: string) => progress(`Pulling image ${reference}: ${line}`)
      const ready = Promise.all([
        network.ensure(),
        execd?.prepare(record.platform, pulling('of execd')),
        ...wanted.map((image) => images.ensure(image, pulling(image.reference))),
      ]).then(() => (record.egress === null ? undefined : probe?.ensure()))
      // A pull is shared and goes on; only this sandbox stops waiting for it.
      const stop = Promise.withResolvers<never>()
      const onAbort = (): void => stop.reject(signal.reason)
      signal.addEventListener('abort', onAbort, { once: true })
      await Promise.race([ready, stop.promise]).finally(() => signal.removeEventListener('abort', onAbort))
      signal.throwIfAborted()
    },
  }
}

export async function carryOut(step: Act, made: Made, deps: Deps): Promise<readonly Fact[]> {
  const { facts } = made
  switch (step.do) {
    case 'create': {
      const containerId = await deps.engine.create(specOf(step.member, made, deps))
      if (step.member === mainMember) await deps.workshop.execd?.install(containerId, made.record.platform)
      return [...facts, { containerId, member: step.member, state: 'created', exitCode: null, address: '', startedAt: null }]
    }
    case 'start': {
      const fact = factOf(step.member, facts)
      await deps.engine.start(fact.containerId)
      const owns = facts[0] === fact
      const address = owns ? await deps.engine.address(fact.containerId) : ''
      return facts.map((other) => (other === fact ? { ...fact, state: 'running', address } : other))
    }
    case 'confirm': {
      const { egress } = made.record
      if (egress === null) throw new Error('a gate is only made for a policy')
      const late = bootPolicy(egress.policy) === egress.policy ? null : egress.policy
      await deps.workshop.confirm(factOf(step.member, facts).address, egress.token, late, made.signal)
      return facts
    }
    case 'remove': {
      await deps.engine.remove(step.containerId)
      return facts.filter((fact) => fact.containerId !== step.containerId)
    }
  }
}

function specOf(member: string, made: Made, deps: Deps): ContainerSpec {
  if (made.request === null) throw new Error('a container is only made for a request')
  const network = deps.workshop.network.name
  if (member === egressMember) return sidecarSpec(deps.config, deps.instance, network, made.record)
  // Read from what exists, not from the record: main never starts outside the guarded namespace.
  const owner = made.record.egress === null ? null : factOf(egressMember, made.facts).containerId
  return mainSpec(deps.config, deps.instance, network, made.record, made.request, owner)
}

function factOf(member: string, facts: readonly Fact[]): Fact {
  const fact = facts.find((candidate) => candidate.member === member)
  if (fact === undefined) throw new Error(`container "${member}" does not exist`)
  return fact
}
