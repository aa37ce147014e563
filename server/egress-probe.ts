/**
 * Proves, once per boot, engine (its version, its runtime, its cgroups) and egress image, that a sidecar's exemption is its own: a second container in the same
 * namespace asks the sidecar's upstream directly. The upstream is an address of the sandbox network where nobody is, so
 * an answer can only come from the sidecar's proxy, to which the question was redirected; a question that was let
 * through is never answered. How the kernel tells the two apart depends on the host, so it is tried and not assumed. The probe runs as sandboxes do,
 * also under their OCI runtime: one that sends past the kernel's own network stack (gVisor) is held by no rule.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { labels } from '#policies/wire.ts'
import { ApiError } from './api-error.ts'
import type { Containers } from './carry-out.ts'
import { bootId } from './clock.ts'
import type { Config } from './config.ts'
import { groupLabels, securityOptions, type ContainerSpec } from './container-spec.ts'
import type { SandboxRecord } from './group.ts'
import { containerName, groupHash, newSandboxId, newToken } from './ids.ts'
import type { Machine } from './machine.ts'
import { fromImage, sidecarSpec } from './sidecar.ts'
import type { ConfirmRules } from './sidecar-client.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type ProbeEngine = Pick<Containers, 'create' | 'start' | 'address' | 'examine' | 'remove' | 'lastWords'> & {
  machine(): Promise<Pick<Machine, 'engine'>>
  image(reference: string): Promise<{ id: string } | null>
}
export type ProbeDeps = {
  readonly engine: ProbeEngine
  readonly instance: string
  readonly confirm: ConfirmRules
  /** What was proved last, for which boot, engine and image; kept in the store. */
  readonly proved: { get(): string | null; set(proof: string): void }
  readonly network: { readonly name: string; emptyAddress(): string }
  readonly report: (event: string, detail: Record<string, unknown>) => void
}

const role = 'probe'
/** ms for the probe, which gives up by itself before. */
const patience = 15_000
const pollPause = 50

export class EgressProbe {
  readonly #config: Config
  readonly #deps: ProbeDeps
  #proof: Promise<string> | null = null
  #tried: string | null = null

  constructor(config: Config, deps: ProbeDeps) {
    this.#config = config
    this.#deps = deps
  }

  /**
   * The image, the network and the host were proved together when this resolves.
   * @returns the image that was proved, by its id: its name may be another's a moment later @throws ApiError: then nobody may rely on them
   */
  async ensure(): Promise<string> {
    const { wanted, image } = await this.#wanted()
    if (this.#deps.proved.get() === wanted) return image
    // One that is under way may be of an image that had the name before: then it is that one.
    this.#proof ??= this.#prove(wanted, image).finally(() => { this.#proof = null })
    return this.#proof
  }

  /** Whether the containers of this id are those of a proof under way: of no sandbox, and not left behind either. */
  tries(id: string): boolean {
    return id === this.#tried
  }

  async #wanted(): Promise<{ wanted: string; image: string }> {
    const name = this.#config.egress.image ?? ''
    const [{ engine: { version, runtime, cgroups } }, found] = await Promise.all([this.#deps.engine.machine(), this.#deps.engine.image(name)])
    // Removed a moment ago: the engine says so itself when a container is to be made of it.
    const image = found?.id ?? name
    return { image, wanted: [bootId(), version, runtime, cgroups, image, this.#config.egress.mode, this.#deps.network.name, this.#config.secureRuntime ?? ''].join(' ') }
  }

  #refusal(): string {
    const { secureRuntime } = this.#config
    const where = secureRuntime === null ? 'On this host' : `On this host, under secure_runtime "${secureRuntime}",`
    return `${where} the egress sidecar does not hold a sandbox back: a policy would be worth nothing, so none is offered.`
  }

  async #prove(wanted: string, image: string): Promise<string> {
    const exitCode = await this.#try(image)
    if (exitCode !== 0) {
      this.#deps.report('egress-probe-failed', { exitCode })
      throw new ApiError('DOCKER::SANDBOX_START_FAILED', this.#refusal())
    }
    this.#deps.proved.set(wanted)
    this.#deps.report('egress-proved', { proof: wanted })
    return image
  }

  async #try(image: string): Promise<number> {
    const { engine, instance, network } = this.#deps
    const address = network.emptyAddress()
    const record = probeRecord()
    const made: string[] = []
    const run = async (spec: ContainerSpec): Promise<string> => {
      const id = await engine.create(spec)
      made.unshift(id)
      await engine.start(id)
      return id
    }
    this.#tried = record.id
    try {
      const sidecar = await run(sidecarSpec({ ...fromImage(this.#config, image), upstreams: [{ address, port: 53 }] }, instance, network.name, record))
      await this.#ready(record, sidecar)
      const probe = await run(this.#spec(record.id, { sidecar, image, address }))
      return await this.#exitCode(record.id, probe, AbortSignal.timeout(patience))
    } catch (error) {
      const words = await engine.lastWords(made.at(-1) ?? '').catch(() => null)
      this.#deps.report('egress-probe-failed', { error: (error as Error).message, ...(words === null ? {} : { sidecar_exit_code: words.exitCode, sidecar_log: words.log }) })
      throw error
    } finally {
      for (const id of made) await engine.remove(id).catch(() => undefined)
      this.#tried = null
    }
  }

  /** As long as every sidecar may take; one that has ended is not waited for. */
  async #ready({ id, egress }: SandboxRecord, sidecar: string): Promise<void> {
    const over = new AbortController()
    const ended = this.#exitCode(id, sidecar, over.signal).then(
      (exitCode) => over.abort(new ApiError('DOCKER::SANDBOX_START_FAILED', `The egress sidecar ended with exit code ${exitCode} when it was tried.`)),
      (error: unknown) => over.abort(error))
    try {
      await this.#deps.confirm(await this.#deps.engine.address(sidecar), egress?.token ?? '', null, over.signal)
    } finally {
      over.abort()
      await ended
    }
  }

  /** -1 when it has not ended by then. */
  async #exitCode(id: string, containerId: string, until: AbortSignal): Promise<number> {
    while (!until.aborted) {
      const found = await this.#deps.engine.examine([`${labels.instance}=${this.#deps.instance}`, `${labels.group}=${groupHash(id)}`])
      const container = found.find((candidate) => candidate.containerId === containerId)
      if (container === undefined) throw new Error('a container of the proof was removed')
      if (container.exitCode !== null) return container.exitCode
      await delay(pollPause, undefined, { signal: until }).catch(() => undefined)
    }
    return -1
  }

  /** With the rights of a sandbox, from the one image that is sure to be there and to hold node. */
  #spec(id: string, { sidecar, image, address }: { sidecar: string; image: string; address: string }): ContainerSpec {
    const { docker, egress } = this.#config
    return {
      name: containerName(id, role), image, labels: { ...groupLabels(this.#deps.instance, id, role), [labels.egressSidecarFor]: id },
      env: [], entrypoint: ['node'], cmd: ['-e', probeScript(address)],
      network: { join: sidecar }, publish: new Map(), publishAddress: '', dns: [], sysctls: {},
      capAdd: [], capDrop: [...new Set([...docker.drop_capabilities, 'NET_ADMIN', 'NET_RAW'])], securityOpt: securityOptions(docker), cgroupns: 'private',
      memory: egress.memory_bytes, nanoCpus: 0, pids: egress.pids_limit, gpus: 0, readOnly: true, platform: null, runtime: this.#config.secureRuntime,
    }
  }
}

/** Asks for the root's name servers over UDP and TCP. Exit code 0: both answered. */
export function probeScript(address: string): string {
  return `
    const question = Buffer.from('5a5a010000010000000000000000020001', 'hex')
    const fits = (message) => { if (message.length < 12 || message.readUInt16BE(0) !== 0x5a5a || message[2] < 128) throw new Error('no answer to the question') }
    const udp = new Promise((resolve, reject) => {
      const socket = require('node:dgram').createSocket('udp4').on('error', reject).on('message', (message) => { fits(message); socket.close(resolve) })
      socket.send(question, 53, ${JSON.stringify(address)})
    })
    const tcp = new Promise((resolve, reject) => {
      const socket = require('node:net').connect(53, ${JSON.stringify(address)}).on('error', reject).on('data', (data) => { fits(data.subarray(2)); socket.destroy(); resolve() })
      socket.write(Buffer.concat([Buffer.from([0, question.length]), question]))
    })
    setTimeout(() => process.exit(4), 5000)
    Promise.all([udp, tcp]).then(() => process.exit(0), () => process.exit(3))`
}

function probeRecord(): SandboxRecord {
  return {
    id: newSandboxId(), phase: 'creating', announced: false, reason: null, message: null, createdAt: 0, changedAt: 0, expiresAt: null, keepUntil: null,
    image: '', entrypoint: [], metadata: null, platform: null, egress: { token: newToken(), policy: { defaultAction: 'deny', egress: [] } },
    secureAccessToken: null, hostPorts: {}, renewExtendSeconds: null,
  }
}
