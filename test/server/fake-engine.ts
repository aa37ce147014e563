/** An engine in memory: containers, networks, images. Calls can be made to fail, or never to return (a killed server). */
import { labels } from '#policies/wire.ts'
import type { ContainerSpec } from '../../server/container-spec.ts'
import { memberOf } from '../../server/group.ts'
import { EngineError, type Found, type NetworkFact } from '../../server/docker.ts'
import type { LastWords } from '../../server/last-words.ts'
import type { Machine } from '../../server/machine.ts'
import type { PullLine } from '../../server/pull-progress.ts'
import { writeTar } from '../../server/tar.ts'

type Kept = { spec: ContainerSpec; state: Found['state']; exitCode: number | null; address: string; startedAt: number }

export class FakeEngine {
  readonly kept = new Map<string, Kept>()
  readonly calls: string[] = []
  readonly images = new Set(['image:1', 'egress:1'])
  /** Image name → id, where they differ. */
  readonly imageIds = new Map<string, string>()
  engine = { version: '20.10', runtime: 'runc', cgroups: 'cgroupfs v1' }
  /** What every container wrote last. */
  log = ''
  /** Tells the server how far its last pull is. */
  pulling: (line: PullLine) => void = () => undefined
  /** In every image. */
  readonly files = new Map<string, string>()
  readonly written = new Map<string, Buffer>()
  networkFact: NetworkFact | null = null
  /** Called before each call takes effect; throw, or return a promise that never settles. */
  before: (call: string) => void | Promise<void> = () => undefined
  /** The same after it took effect. */
  after: (call: string) => void | Promise<void> = () => undefined
  #next = 0
  #starts = 0

  async #do<T>(call: string, work: () => T): Promise<T> {
    this.calls.push(call)
    await this.before(call)
    const result = work()
    await this.after(call)
    return result
  }

  #get(id: string): Kept {
    const kept = this.kept.get(id)
    if (kept === undefined) throw new EngineError(`No such container: ${id}`, 404)
    return kept
  }

  list(wanted: readonly string[]): Promise<Found[]> {
    return this.#do('list', () => [...this.kept].filter(([, { spec }]) => wanted.every((label) => label.includes('=') ? spec.labels[label.split('=')[0] ?? ''] === label.slice(label.indexOf('=') + 1) : label in spec.labels))
      .map(([containerId, { spec, state, exitCode, address }]) => ({ containerId, member: memberOf(spec.labels), state, exitCode, address, startedAt: null, labels: spec.labels, image: spec.image, command: spec.cmd ?? [], createdAt: 1000, published: state === 'running' ? spec.publish : new Map() })))
  }

  async examine(wanted: readonly string[]): Promise<Found[]> {
    return (await this.list(wanted)).map((found) => ({ ...found, startedAt: this.#get(found.containerId).startedAt }))
  }

  create(spec: ContainerSpec): Promise<string> {
    return this.#do(`create ${spec.labels[labels.role]}`, () => {
      const id = `c${++this.#next}`
      this.kept.set(id, { spec, state: 'created', exitCode: null, address: '', startedAt: 0 })
      return id
    })
  }

  start(id: string): Promise<void> {
    return this.#do(`start ${this.kept.get(id)?.spec.labels[labels.role]}`, () => {
      const kept = this.#get(id)
      kept.state = 'running'
      kept.startedAt = ++this.#starts
      if ('name' in kept.spec.network) kept.address = `172.30.0.${this.#next + 1}`
    })
  }

  address(id: string): Promise<string> {
    return this.#do('address', () => this.#get(id).address)
  }

  remove(id: string): Promise<void> {
    return this.#do(`remove ${this.kept.get(id)?.spec.labels[labels.role]}`, () => void this.kept.delete(id))
  }

  lastWords(id: string): Promise<LastWords> {
    return this.#do('last words', () => ({ exitCode: this.#get(id).exitCode, log: this.log }))
  }

  /** A tar, as the engine gives it: what `files` holds for that path. */
  read(_id: string, path: string): Promise<Buffer> {
    return this.#do(`read ${path}`, () => {
      const content = this.files.get(path)
      if (content === undefined) throw new EngineError(`Could not find the file ${path}`, 404)
      return writeTar({ [path.slice(1)]: { mode: 0o644, content: Buffer.from(content) } })
    })
  }

  write(id: string, archive: Buffer): Promise<void> {
    return this.#do(`write ${this.kept.get(id)?.spec.labels[labels.role]}`, () => void this.written.set(id, archive))
  }

  pause(id: string): Promise<void> {
    return this.#do('pause', () => void (this.#get(id).state = 'paused'))
  }

  resume(id: string): Promise<void> {
    return this.#do('resume', () => void (this.#get(id).state = 'running'))
  }

  /** Somebody starts it again; nothing the list tells is different. */
  restarted(id: string): void {
    this.#get(id).startedAt = ++this.#starts
  }

  /** The process inside ends. */
  end(id: string, exitCode: number): void {
    Object.assign(this.#get(id), { state: 'exited', exitCode, address: '' })
  }

  find(role: string): string {
    return [...this.kept].find(([, { spec }]) => spec.labels[labels.role] === role)?.[0] ?? ''
  }

  image(reference: string): Promise<{ id: string; os: string; arch: string } | null> {
    return this.#do('image', () => (this.images.has(reference) ? { id: this.imageIds.get(reference) ?? reference, os: 'linux', arch: 'amd64' } : null))
  }

  pull(reference: string, _options: unknown, progress: (line: PullLine) => void): Promise<void> {
    this.pulling = progress
    return this.#do(`pull ${reference}`, () => void this.images.add(reference))
  }

  machine(): Promise<Machine> {
    return this.#do('machine', () => ({ os: 'linux', arch: 'amd64', cpus: 2, runtimes: ['runc'], engine: this.engine }))
  }

  network(): Promise<NetworkFact | null> {
    return this.#do('network', () => this.networkFact)
  }

  createNetwork(name: string, bridge: string, ownLabels: Record<string, string>): Promise<void> {
    return this.#do('create network', () => void (this.networkFact = { id: 'n1', name, driver: 'bridge', bridge, subnets: ['172.30.0.0/16'], labels: ownLabels }))
  }

  removeNetwork(): Promise<void> {
    return this.#do('remove network', () => void (this.networkFact = null))
  }

  users(): Promise<string[]> {
    return this.#do('users', () => [...this.kept.keys()])
  }
}
