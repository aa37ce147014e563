/** Carries out one step of a plan on one group and says what is there afterwards. */
import { setTimeout as delay } from 'node:timers/promises'
import { ApiError } from './api-error.ts'
import type { Config } from './config.ts'
import { mainSpec, type ContainerSpec } from './container-spec.ts'
import { invalid, type CreateRequest } from './create-request.ts'
import { EngineError, type Found } from './docker.ts'
import type { EgressProbe } from './egress-probe.ts'
import type { Execd } from './execd.ts'
import { egressMember, mainMember, type Fact, type SandboxRecord } from './group.ts'
import type { Images } from './images.ts'
import type { LastWords } from './last-words.ts'
import { machineProblems, type Machine } from './machine.ts'
import type { SandboxNetwork } from './network.ts'
import type { Step } from './plan.ts'
import { bootPolicy, fromImage, sidecarSpec } from './sidecar.ts'
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
  lastWords(containerId: string): Promise<LastWords>
  remove(containerId: string): Promise<void>
  pause(containerId: string): Promise<void>
  resume(containerId: string): Promise<void>
}

/** What must be there before a group can be made, and the question only a sidecar can answer. */
export type Workshop = {
  readonly confirm: ConfirmRules
  readonly network: { readonly name: string }
  /** The image sidecars are made from: the one proved last, else what the configuration names. */
  readonly sidecarImage: () => string
  /** null: sandboxes have no execd. */
  readonly execd: Pick<Execd, 'install'> | null
  /** Before anything is written or made. @throws ApiError 400 for what this machine can never give */
  admit(request: CreateRequest): Promise<void>
  prepare(record: SandboxRecord, request: CreateRequest, progress: (line: string) => void, signal: AbortSignal): Promise<void>
}

export type Made = { readonly record: SandboxRecord; readonly request: CreateRequest | null; readonly facts: readonly Fact[]; readonly signal: AbortSignal }
type Deps = { readonly config: Config; readonly instance: string; readonly engine: Containers; readonly workshop: Workshop }
type Act = Extract<Step, { do: 'create' | 'start' | 'confirm' | 'remove' }>

export type Tools = { readonly machine: () => Promise<Machine>; readonly images: Images; readonly network: SandboxNetwork; readonly confirm: ConfirmRules; readonly execd: Execd | null; /** null: what the egress image promises is believed. */ readonly probe: Pick<EgressProbe, 'ensure'> | null }

/** ms a create waits to hear what the machine has. */
const machineWait = 2000

/** Images, network and execd. @param progress gets what is being waited for */
export function createWorkshop(config: Config, { machine, images, network, confirm, execd, probe }: Tools): Workshop {
  let known: Machine | null = null
  let proved: string | null = null
  return {
    confirm,
    network,
    sidecarImage: () => proved ?? config.egress.image ?? '',
    execd,
    async admit(request) {
      // An engine that does not answer is found out by the create itself.
      known ??= await Promise.race([machine().catch(() => null), delay(machineWait, null, { ref: false })])
      const problems = known === null ? [] : machineProblems(request, known)
      if (problems.length > 0) throw invalid(problems)
    },
    async prepare(record, request, progress, signal) {
      const wanted = [{ reference: request.image, platform: request.platform, auth: request.auth, called: request.image }]
      if (record.egress !== null && config.egress.image !== undefined) wanted.push({ reference: config.egress.image, platform: null, auth: null, called: 'of the egress sidecar' })
      const pulling = (called: string) => (said: string) => progress(`Pulling image ${called}: ${said}.`)
      const ready = Promise.all([
        network.ensure(),
        execd?.prepare(record.platform, pulling('of execd')),
        ...wanted.map((image) => images.ensure(image, pulling(image.called), image.called)),
      ]).then(async () => {
        if (record.egress !== null && probe !== null) proved = await probe.ensure()
      })
      // A pull is shared and goes on; only this sandbox stops waiting for it.
      await unlessAborted(ready, signal)
    },
  }
}

export async function carryOut(step: Act, made: Made, deps: Deps): Promise<readonly Fact[]> {
  const { facts } = made
  switch (step.do) {
    case 'create': {
      const containerId = await deps.engine.create(specOf(step.member, made, deps)).catch((error: unknown) => blame(step.member, error))
      if (step.member === mainMember) await deps.workshop.execd?.install(containerId, made.record.platform)
      return [...facts, { containerId, member: step.member, state: 'created', exitCode: null, address: '', startedAt: null }]
    }
    case 'start': {
      const fact = factOf(step.member, facts)
      // A start that hangs must not keep the sandbox from being removed: the container is known, and goes as it is.
      await unlessAborted(deps.engine.start(fact.containerId), made.signal).catch((error: unknown) => blame(step.member, error))
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
  if (member === egressMember) return sidecarSpec(fromImage(deps.config, deps.workshop.sidecarImage()), deps.instance, network, made.record)
  // Read from what exists, not from the record: main never starts outside the guarded namespace.
  const owner = made.record.egress === null ? null : factOf(egressMember, made.facts).containerId
  return mainSpec(deps.config, deps.instance, network, made.record, made.request, owner)
}

/** What the engine has against the sidecar no client can mend; a host port that is taken is tried again elsewhere. */
function blame(member: string, error: unknown): never {
  if (member !== egressMember || !(error instanceof EngineError) || error.status !== 400) throw error
  throw new ApiError('DOCKER::SANDBOX_START_FAILED', 'The egress sidecar could not be started.', { cause: error })
}

/** Stops waiting for `work` when the sandbox is given up; the work itself goes on. */
async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  const stop = Promise.withResolvers<never>()
  const onAbort = (): void => stop.reject(signal.reason)
  signal.addEventListener('abort', onAbort, { once: true })
  if (signal.aborted) onAbort()
  try {
    const done = await Promise.race([work, stop.promise])
    signal.throwIfAborted()
    return done
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

function factOf(member: string, facts: readonly Fact[]): Fact {
  const fact = facts.find((candidate) => candidate.member === member)
  if (fact === undefined) throw new Error(`container "${member}" does not exist`)
  return fact
}
