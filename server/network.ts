/** The Docker network sandboxes are on: our own, made on demand and guarded, or the one the operator named. */
import ipaddr from 'ipaddr.js'
import { labels } from '#policies/wire.ts'
import { ApiError } from './api-error.ts'
import type { Config } from './config.ts'
import { EngineError, type NetworkFact } from './docker.ts'
import type { Guarded, HostGuard } from './host-guard.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type Networks = {
  network(name: string): Promise<NetworkFact | null>
  createNetwork(name: string, bridge: string, labels: Record<string, string>): Promise<void>
  removeNetwork(name: string): Promise<void>
  users(network: string): Promise<string[]>
}
export type NetworkDeps = { readonly engine: Networks; readonly guard: HostGuard | null }

/** How sandboxes are kept apart; shown by readiness. */
export type Isolation = 'isolated' | 'host guard off' | 'default bridge: neighbours are not isolated' | 'named network: neighbours are not isolated'

/** RFC 7600: assigned so that nobody ever has it. */
const dummyAddress = '192.0.0.8'

export class SandboxNetwork {
  readonly name: string
  readonly isolation: Isolation
  readonly #config: Config
  readonly #deps: NetworkDeps
  readonly #own: boolean
  #subnets: readonly string[] = []
  #ready: Promise<NetworkFact> | null = null

  constructor(config: Config, deps: NetworkDeps) {
    this.#config = config
    this.#deps = deps
    const { network_mode, default_bridge, network_name } = config.docker
    this.#own = network_mode === 'bridge' && !default_bridge
    this.name = network_mode !== 'bridge' ? network_mode : default_bridge ? 'bridge' : network_name
    if (this.#own) this.isolation = deps.guard === null ? 'host guard off' : 'isolated'
    else this.isolation = network_mode === 'bridge' ? 'default bridge: neighbours are not isolated' : 'named network: neighbours are not isolated'
  }

  /** The network exists and is guarded when this resolves. Shared by creates that come together. */
  async ensure(): Promise<string> {
    this.#ready ??= this.#make().catch((error: unknown) => {
      this.#ready = null
      throw error
    })
    return (await this.#ready).name
  }

  /** An address of the network that nobody has: Docker hands addresses out from the other end. */
  emptyAddress(): string {
    const subnet = this.#subnets.find((candidate) => !candidate.includes(':'))
    if (subnet === undefined) return dummyAddress
    const [base, prefix] = ipaddr.IPv4.parseCIDR(subnet)
    const [a = 0, b = 0, c = 0, d = 0] = ipaddr.IPv4.broadcastAddressFromCIDR(`${base.toString()}/${prefix}`).octets
    return `${a}.${b}.${c}.${d - 1}`
  }

  /** Somebody removed the network, or the engine was away: look again before the next create. */
  forget(): void {
    this.#ready = null
  }

  /** Rules of the host, also before the network exists: shows at start whether we may. */
  async guard(): Promise<void> {
    if (this.#deps.guard === null) return
    const network = await this.#deps.engine.network(this.name).catch(() => null)
    await this.#deps.guard.apply(this.#guarded(network))
  }

  /** At the end of the server: our network and the rules go when nobody's sandbox needs them. */
  async release(): Promise<void> {
    const users = await this.#deps.engine.users(this.name)
    if (users.length > 0) return
    if (this.#own) {
      const network = await this.#deps.engine.network(this.name)
      // Another server on this engine may just be making a sandbox: then Docker refuses, and we leave everything.
      if (network !== null && network.labels[labels.role] === 'network') {
        await this.#deps.engine.removeNetwork(this.name)
      }
    }
    await this.#deps.guard?.release()
  }

  async #make(): Promise<NetworkFact> {
    let network = await this.#deps.engine.network(this.name)
    if (network === null && !this.#own) throw new ApiError('SANDBOX::INVALID_PARAMETER', `The Docker network "${this.name}" of docker.network_mode does not exist.`)
    if (network === null) {
      await this.#deps.engine.createNetwork(this.name, this.#config.docker.bridge_name, { [labels.role]: 'network' }).catch((error: EngineError) => {
        // Another server was faster.
        if (error.status !== 409) throw error
      })
      network = await this.#deps.engine.network(this.name)
    }
    if (network === null) throw new ApiError('DOCKER::SANDBOX_START_FAILED', 'The sandbox network could not be made.')
    if (this.#own && network.bridge !== this.#config.docker.bridge_name) {
      throw new ApiError('DOCKER::SANDBOX_START_FAILED', `The Docker network "${this.name}" exists with another bridge than docker.bridge_name; remove it or name another.`)
    }
    this.#subnets = network.subnets
    await this.#deps.guard?.apply(this.#guarded(network))
    return network
  }

  #guarded(network: NetworkFact | null): Guarded {
    // docker0 is not ours to guard: other people's containers hang on it.
    const named = network !== null && network.driver === 'bridge' && network.name !== 'bridge' ? network.bridge : null
    return {
      bridge: this.#own ? this.#config.docker.bridge_name : named,
      isolated: this.#own,
      subnets: (network?.subnets ?? []).filter((subnet) => !subnet.includes(':')),
      resolvers: this.#config.upstreams,
      floor: this.#config.docker.floor,
    }
  }
}
