/** A sandbox by dockerode and nothing else: what the server's own bookkeeping is measured against. */
import type Docker from 'dockerode'
import { setTimeout as delay } from 'node:timers/promises'
import { Agent, request } from 'undici'
import { labels, wellKnownPorts } from '#policies/wire.ts'

type Bare = { readonly sidecar: Docker.Container | null; readonly main: Docker.Container }

/** ms between two questions to the sidecar, and until one is given up; the server's own numbers. */
const pollPause = 15
const pollTimeout = 1000
const readyTimeout = 30_000
const noIpv6 = { 'net.ipv6.conf.all.disable_ipv6': '1', 'net.ipv6.conf.default.disable_ipv6': '1', 'net.ipv6.conf.lo.disable_ipv6': '1' }

export class BareSandboxes {
  readonly #docker: Docker
  readonly #network: string
  readonly #labels: Readonly<Record<string, string>>
  readonly #agent = new Agent({ connect: { timeout: pollTimeout }, headersTimeout: pollTimeout, bodyTimeout: pollTimeout, keepAliveTimeout: 1 })

  /** @param network its name, also the instance on the containers' label: not the server's, whose sweep would take them for its own */
  constructor(docker: Docker, network: string) {
    this.#docker = docker
    this.#network = network
    this.#labels = { [labels.instance]: network, [labels.role]: 'main' }
  }

  /** Makes the network, unless an earlier run left it: a bridge like the server's, neighbours kept apart, IPv4. */
  async open(): Promise<void> {
    const wanted = { Name: this.#network, Driver: 'bridge', EnableIPv6: false, CheckDuplicate: true, Options: { 'com.docker.network.bridge.name': 'sp-bench1', 'com.docker.network.bridge.enable_icc': 'false' } }
    await this.#docker.createNetwork(wanted).catch((error: { statusCode?: number }) => {
      if (error.statusCode !== 409) throw error
    })
  }

  async create(command: readonly string[], policy: object | null): Promise<Bare> {
    const sidecar = policy === null ? null : await this.#startSidecar(policy)
    const main = await this.#docker.createContainer({
      Image: 'sallyport/sandbox:local', Labels: this.#labels, Entrypoint: [], Cmd: [...command],
      HostConfig: {
        NetworkMode: sidecar === null ? this.#network : `container:${sidecar.id}`,
        CapDrop: ['AUDIT_WRITE', 'MKNOD', 'NET_ADMIN', 'NET_RAW', 'SYS_ADMIN', 'SYS_MODULE', 'SYS_PTRACE', 'SYS_TIME', 'SYS_TTY_CONFIG'],
        SecurityOpt: ['no-new-privileges:true'], PidsLimit: 4096,
        ...(sidecar === null ? { Sysctls: { 'net.ipv6.conf.default.disable_ipv6': '1' } } : {}),
      },
    })
    await main.start()
    return { sidecar, main }
  }

  async remove({ sidecar, main }: Bare): Promise<void> {
    await main.remove({ force: true, v: true })
    await sidecar?.remove({ force: true, v: true })
  }

  async #startSidecar(policy: object): Promise<Docker.Container> {
    // Known to the engine since API 1.41, not to the type definitions.
    const cgroups: object = { CgroupnsMode: 'host' }
    const sidecar = await this.#docker.createContainer({
      Image: 'sallyport/egress:local', Labels: this.#labels,
      Env: [`OPENSANDBOX_EGRESS_RULES=${JSON.stringify(policy)}`, 'OPENSANDBOX_EGRESS_MODE=dns+nft', 'OPENSANDBOX_EGRESS_EXEMPTION=auto', 'OPENSANDBOX_EGRESS_DNS_UPSTREAM=198.51.100.53:53'],
      HostConfig: {
        NetworkMode: this.#network, CapDrop: ['ALL'], CapAdd: ['NET_ADMIN'], SecurityOpt: ['no-new-privileges:true'], Sysctls: noIpv6,
        NanoCpus: 1e9, Memory: 268_435_456, PidsLimit: 128, ReadonlyRootfs: true, ...cgroups,
      },
    })
    await sidecar.start()
    const address = (await sidecar.inspect()).NetworkSettings.Networks[this.#network]?.IPAddress ?? ''
    await this.#confirm(address)
    return sidecar
  }

  async #confirm(address: string): Promise<void> {
    for (const deadline = Date.now() + readyTimeout; Date.now() < deadline; await delay(pollPause)) {
      try {
        const { statusCode, body } = await request(`http://${address}:${wellKnownPorts.egressApi}/healthz`, { dispatcher: this.#agent })
        await body.dump()
        if (statusCode === 200) return
      } catch {
        // Not listening yet.
      }
    }
    throw new Error(`the sidecar at ${address} was not ready after ${readyTimeout / 1000} s`)
  }
}
