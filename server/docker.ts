/** The Docker engine, as the rest of the server sees it. The only importer of dockerode. */
import { setTimeout as delay } from 'node:timers/promises'
import Dockerode from 'dockerode'
import type { ContainerSpec } from './container-spec.ts'
import { memberOf, type ContainerState, type Fact } from './group.ts'
import { readLastWords, type LastWords } from './last-words.ts'
import { archOf, type Machine } from './machine.ts'
import type { PullLine } from './pull-progress.ts'

/**
 * A container with all that a sweep needs to know. `published`: container port → host port, while it runs. `command`: empty in a list,
 * which does not tell.
 */
export type Found = Fact & { readonly labels: Readonly<Record<string, string>>; readonly image: string; readonly command: readonly string[]; readonly createdAt: number; readonly published: ReadonlyMap<number, number> }
export type NetworkFact = { readonly id: string; readonly name: string; readonly driver: string; readonly bridge: string; readonly subnets: readonly string[]; readonly labels: Readonly<Record<string, string>> }
type Info = { OSType: string; Architecture: string; NCPU: number; Runtimes: object; ServerVersion: string; DefaultRuntime: string; CgroupDriver: string; CgroupVersion?: string }
export type EngineEvent = { readonly kind: 'container' | 'network'; readonly action: string; readonly labels: Readonly<Record<string, string>>; readonly name: string }

/** An error of the engine. `status` is its HTTP status, 0 when the engine could not be asked. */
export class EngineError extends Error {
  readonly status: number
  constructor(message: string, status: number, options?: ErrorOptions) {
    super(message, options)
    this.name = 'EngineError'
    this.status = status
  }
}

/** What a container writes to its standard output and error, and nobody here reads: the engine keeps this much of it on the host's disk. */
const containerLog = { Type: 'json-file', Config: { 'max-size': '10m', 'max-file': '2' } }

/** Of what a container wrote. */
const lastLines = 5
const removeAttempts = 100
const removePause = 50
const pauseAttempts = 6
/** ms; grows with each attempt. */
const pauseWait = 20

export class Docker {
  readonly #docker: Dockerode
  /** For calls that last as long as they last: events and pulls. */
  readonly #streams = new Dockerode()

  /** Engine from DOCKER_HOST, else the default socket. @param timeout ms a call may take */
  constructor(timeout: number) {
    this.#docker = new Dockerode({ timeout })
  }

  async ping(): Promise<{ version: string; arch: string }> {
    return call(async () => {
      const version = await this.#docker.version()
      return { version: version.Version, arch: version.Arch }
    })
  }

  async machine(): Promise<Machine> {
    return call(async () => {
      const info = await this.#docker.info() as Info
      return {
        os: info.OSType, arch: archOf(info.Architecture), cpus: info.NCPU, runtimes: Object.keys(info.Runtimes),
        // An engine older than 20.10 does not tell the version of its cgroups.
        engine: { version: info.ServerVersion, runtime: info.DefaultRuntime, cgroups: `${info.CgroupDriver} v${info.CgroupVersion ?? ''}` },
      }
    })
  }

  /** Containers, running or not, that carry all of these labels (`key` or `key=value`). */
  async list(wanted: readonly string[]): Promise<Found[]> {
    return call(async () => (await this.#docker.listContainers({ all: true, filters: { label: [...wanted] } })).map(toFound))
  }

  /**
   * The same, each looked at on its own. The list lags behind: the engine tells of a container's end before the list
   * shows it, an inspection waits for the truth.
   */
  async examine(wanted: readonly string[]): Promise<Found[]> {
    const listed = await this.list(wanted)
    const examined = await Promise.all(listed.map((found) => this.#inspect(found)))
    return examined.filter((found) => found !== null)
  }

  async #inspect(found: Found): Promise<Found | null> {
    try {
      const { State, NetworkSettings, Config } = await call(() => this.#docker.getContainer(found.containerId).inspect())
      const state = State.Status as ContainerState
      return { ...found, state, command: Config.Cmd ?? [], exitCode: hasEnded(state) ? State.ExitCode : null, startedAt: Date.parse(State.StartedAt), address: Object.values(NetworkSettings.Networks)[0]?.IPAddress ?? '' }
    } catch (error) {
      if ((error as EngineError).status === 404) return null
      throw error
    }
  }

  /** Names of containers, running or not, on a network. */
  async users(network: string): Promise<string[]> {
    return call(async () => (await this.#docker.listContainers({ all: true, filters: { network: [network] } })).flatMap((c) => c.Names))
  }

  async create(spec: ContainerSpec): Promise<string> {
    const options = { name: spec.name, ...(spec.platform === null ? {} : { platform: `${spec.platform.os}/${spec.platform.arch}` }) }
    return call(async () => (await this.#docker.createContainer(apart(options, toBody(spec)))).id)
  }

  async start(containerId: string): Promise<void> {
    await call(() => this.#docker.getContainer(containerId).start())
  }

  /** A tar of one file of a container, running or not. */
  async read(containerId: string, path: string): Promise<Buffer> {
    return call(async () => {
      const chunks: Buffer[] = []
      for await (const chunk of await this.#docker.getContainer(containerId).getArchive({ path })) chunks.push(chunk as Buffer)
      return Buffer.concat(chunks)
    })
  }

  /** Unpacks a tar at the top of a container's file system. */
  async write(containerId: string, archive: Buffer): Promise<void> {
    await call(() => this.#docker.getContainer(containerId).putArchive(archive, { path: '/' }))
  }

  /** IPv4 address on its network, empty when it has none. */
  async address(containerId: string): Promise<string> {
    return call(async () => {
      const inspected = await this.#docker.getContainer(containerId).inspect()
      return Object.values(inspected.NetworkSettings.Networks)[0]?.IPAddress ?? ''
    })
  }

  /** How it is and what it wrote last, for the log of the server. */
  async lastWords(containerId: string): Promise<LastWords> {
    return call(async () => {
      const container = this.#docker.getContainer(containerId)
      const [{ State }, frames] = await Promise.all([container.inspect(), container.logs({ stdout: true, stderr: true, tail: lastLines })])
      return { exitCode: hasEnded(State.Status) ? State.ExitCode : null, log: readLastWords(frames) }
    })
  }

  /** Where processes come and go, freezing them all (cgroup v1) may fail: runc gives up, thaws them, and it is worth another try. */
  async pause(containerId: string): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        await call(() => this.#docker.getContainer(containerId).pause())
        return
      } catch (error) {
        if (attempt === pauseAttempts || !/unable to freeze/.test((error as EngineError).message)) throw error
        await delay(attempt * pauseWait)
      }
    }
  }

  async resume(containerId: string): Promise<void> {
    await call(() => this.#docker.getContainer(containerId).unpause())
  }

  /** Kills and removes, with its anonymous volumes. Gone already, or about to be, is fine. */
  async remove(containerId: string): Promise<void> {
    try {
      await call(() => this.#docker.getContainer(containerId).remove({ force: true, v: true }))
    } catch (error) {
      const status = (error as EngineError).status
      if (status !== 404 && status !== 409) throw error
      if (status === 409) await this.#waitRemoved(containerId)
    }
  }

  /** Somebody's removal is under way: asked again and again, because waiting for it may never end when it just did. */
  async #waitRemoved(containerId: string): Promise<void> {
    for (let attempt = 0; attempt < removeAttempts; attempt++) {
      await delay(removePause)
      try {
        const { State } = await call(() => this.#docker.getContainer(containerId).inspect())
        if (State.Status !== 'removing') await call(() => this.#docker.getContainer(containerId).remove({ force: true, v: true }))
      } catch (error) {
        const status = (error as EngineError).status
        if (status === 404) return
        if (status !== 409) throw error
      }
    }
    throw new EngineError('the removal of a container does not end', 409)
  }

  /** null when the engine has no such image. */
  async image(reference: string): Promise<{ id: string; os: string; arch: string } | null> {
    try {
      const image = await call(() => this.#docker.getImage(reference).inspect())
      return { id: image.Id, os: image.Os, arch: image.Architecture }
    } catch (error) {
      if ((error as EngineError).status === 404) return null
      throw error
    }
  }

  /** Pulls; errors that arrive inside the stream count too. `progress` gets what the engine says meanwhile. */
  async pull(reference: string, options: { platform: string | null; auth: { username: string; password: string } | null }, progress: (line: PullLine) => void): Promise<void> {
    await call(async () => {
      const stream = await this.#streams.pull(reference, {
        ...(options.platform === null ? {} : { platform: options.platform }),
        ...(options.auth === null ? {} : { authconfig: options.auth }),
      })
      await new Promise<void>((resolve, reject) => {
        this.#streams.modem.followProgress(stream, (error) => (error === null ? resolve() : reject(error)), progress)
      })
    })
  }

  async network(name: string): Promise<NetworkFact | null> {
    try {
      const found = await call(() => this.#docker.getNetwork(name).inspect()) as Dockerode.NetworkInspectInfo
      const bridge = found.Options?.['com.docker.network.bridge.name'] ?? `br-${found.Id.slice(0, 12)}`
      const subnets = (found.IPAM?.Config ?? []).flatMap((config) => (config.Subnet === undefined ? [] : [config.Subnet]))
      return { id: found.Id, name: found.Name, driver: found.Driver, bridge, subnets, labels: found.Labels ?? {} }
    } catch (error) {
      if ((error as EngineError).status === 404) return null
      throw error
    }
  }

  /** A bridge network of ours: IPv4, containers cannot talk to each other. */
  async createNetwork(name: string, bridge: string, ownLabels: Record<string, string>): Promise<void> {
    await call(() => this.#docker.createNetwork(apart({}, {
      Name: name,
      CheckDuplicate: true,
      Driver: 'bridge',
      EnableIPv6: false,
      Labels: ownLabels,
      Options: { 'com.docker.network.bridge.name': bridge, 'com.docker.network.bridge.enable_icc': 'false' },
    })))
  }

  async removeNetwork(name: string): Promise<void> {
    await call(() => this.#docker.getNetwork(name).remove())
  }

  /** Events from now on; `ended` is called once when the stream breaks. */
  async events(onEvent: (event: EngineEvent) => void, ended: () => void): Promise<{ close(): void }> {
    const stream = await call(() => this.#streams.getEvents({ filters: JSON.stringify({ type: ['container', 'network'] }) }))
    let rest = ''
    let closed = false
    const end = (): void => { if (!closed) { closed = true; ended() } }
    stream.setEncoding('utf8')
    stream.on('data', (chunk: string) => {
      const lines = (rest + chunk).split('\n')
      rest = lines.pop() ?? ''
      for (const line of lines) if (line !== '') onEvent(toEvent(JSON.parse(line)))
    })
    stream.on('end', end).on('error', end).on('close', end)
    return { close: () => { closed = true; (stream as unknown as { destroy(): void }).destroy() } }
  }
}

function hasEnded(state: string): boolean {
  return state === 'exited' || state === 'dead'
}

/** Foreign errors become EngineError, so that nobody else reads dockerode's. */
async function call<T>(work: () => Promise<T>): Promise<T> {
  try {
    return await work()
  } catch (error) {
    const { statusCode, json, message } = error as { statusCode?: number; json?: { message?: string }; message: string }
    throw new EngineError(json?.message ?? message, statusCode ?? 0, { cause: error })
  }
}

function toEvent(raw: { Type: string; Action: string; Actor?: { Attributes?: Record<string, string> } }): EngineEvent {
  const attributes = raw.Actor?.Attributes ?? {}
  return { kind: raw.Type === 'network' ? 'network' : 'container', action: raw.Action, labels: attributes, name: attributes.name ?? '' }
}

function toFound(info: Dockerode.ContainerInfo): Found {
  return {
    containerId: info.Id,
    member: memberOf(info.Labels),
    state: info.State as ContainerState,
    exitCode: exitCodeOf(info.Status),
    address: Object.values(info.NetworkSettings?.Networks ?? {})[0]?.IPAddress ?? '',
    startedAt: null,
    labels: info.Labels,
    image: info.Image,
    command: [],
    createdAt: info.Created * 1000,
    published: new Map((info.Ports ?? []).flatMap(({ PrivatePort, PublicPort }) => (PublicPort === undefined ? [] : [[PrivatePort, PublicPort]]))),
  }
}

/** The list tells an exit code only in words: `Exited (137) 2 minutes ago`. */
function exitCodeOf(status: string): number | null {
  const code = /^Exited \((\d+)\)/.exec(status)?.[1]
  return code === undefined ? null : Number(code)
}

/**
 * dockerode would write a body into the query as well, secrets and all: into the engine's debug log, and past the length a request
 * line may have. It knows these two keys; its type definitions do not.
 */
function apart<Body extends object>(query: Readonly<Record<string, string>>, body: Body): Body {
  return { _query: query, _body: body } as unknown as Body
}

function toBody(spec: ContainerSpec): Dockerode.ContainerCreateOptions {
  const ports = [...spec.publish]
  // Known to the engine since API 1.41, not to the type definitions.
  const cgroups: object = { CgroupnsMode: spec.cgroupns }
  return {
    Image: spec.image,
    Labels: { ...spec.labels },
    Env: [...spec.env],
    ...(spec.entrypoint === null ? {} : { Entrypoint: [...spec.entrypoint] }),
    ...(spec.cmd === null ? {} : { Cmd: [...spec.cmd] }),
    ExposedPorts: Object.fromEntries(ports.map(([port]) => [`${port}/tcp`, {}])),
    HostConfig: {
      NetworkMode: 'name' in spec.network ? spec.network.name : `container:${spec.network.join}`,
      PortBindings: Object.fromEntries(ports.map(([port, host]) => [`${port}/tcp`, [{ HostIp: spec.publishAddress, HostPort: String(host) }]])),
      CapAdd: [...spec.capAdd],
      CapDrop: [...spec.capDrop],
      SecurityOpt: [...spec.securityOpt],
      Sysctls: { ...spec.sysctls },
      Dns: [...spec.dns],
      ...cgroups,
      ReadonlyRootfs: spec.readOnly,
      ...(spec.readOnly ? { Tmpfs: { '/run': 'rw,nosuid,nodev,noexec,size=4m', '/tmp': 'rw,nosuid,nodev,noexec,size=16m' } } : {}),
      PidsLimit: spec.pids,
      ...(spec.runtime === null ? {} : { Runtime: spec.runtime }),
      LogConfig: containerLog,
      ...(spec.memory > 0 ? { Memory: spec.memory } : {}),
      ...(spec.nanoCpus > 0 ? { NanoCpus: spec.nanoCpus } : {}),
      ...(spec.gpus === 0 ? {} : { DeviceRequests: [{ Count: spec.gpus, Capabilities: [['gpu']] }] }),
    },
  }
}
