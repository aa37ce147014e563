/**
 * execd, the program inside a sandbox that SDKs talk to. It comes in an image of its own: `/execd` and `/bootstrap.sh` are taken
 * out of that once, and put into every sandbox between its creation and its start. The bootstrap script then is what the
 * container runs; it starts execd and, beside it, the command of the sandbox.
 */
import { randomBytes } from 'node:crypto'
import { labels } from '#policies/wire.ts'
import { ApiError } from './api-error.ts'
import type { ContainerSpec } from './container-spec.ts'
import { EngineError } from './docker.ts'
import type { Platform } from './group.ts'
import type { Images } from './images.ts'
import { readFirstFile, writeTar } from './tar.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type Shelves = {
  image(reference: string): Promise<{ id: string } | null>
  create(spec: ContainerSpec): Promise<string>
  /** A tar of that file. */
  read(containerId: string, path: string): Promise<Buffer>
  /** Unpacks a tar at the top of the container's file system. */
  write(containerId: string, archive: Buffer): Promise<void>
  remove(containerId: string): Promise<void>
}
export type ExecdDeps = { readonly engine: Shelves; readonly images: Images; readonly instance: string }

type Staged = { readonly imageId: string; readonly archive: Promise<Buffer> }

export class Execd {
  readonly #reference: string
  readonly #deps: ExecdDeps
  /** By platform. The image's id is remembered, so that a newer image under the same name is noticed. */
  readonly #staged = new Map<string, Staged>()

  /** @param reference of the execd image */
  constructor(reference: string, deps: ExecdDeps) {
    this.#reference = reference
    this.#deps = deps
  }

  /** execd is at hand when this resolves. Shared by creates that come together. @throws ApiError */
  async prepare(platform: Platform | null, progress: (line: string) => void): Promise<void> {
    await this.#deps.images.ensure({ reference: this.#reference, platform, auth: null }, progress, 'of execd')
    const image = await this.#deps.engine.image(this.#reference)
    if (image === null) throw new ApiError('DOCKER::SANDBOX_EXECD_START_FAILED', 'The execd image is not there.')
    const key = keyOf(platform)
    let staged = this.#staged.get(key)
    if (staged?.imageId !== image.id) {
      staged = { imageId: image.id, archive: this.#stage(image.id) }
      this.#staged.set(key, staged)
    }
    try {
      await staged.archive
    } catch (error) {
      // The next create tries again.
      if (this.#staged.get(key) === staged) this.#staged.delete(key)
      throw error
    }
  }

  /** Into a container that has not been started. @throws ApiError */
  async install(containerId: string, platform: Platform | null): Promise<void> {
    try {
      const staged = this.#staged.get(keyOf(platform))
      if (staged === undefined) throw new Error('execd was not prepared')
      await this.#deps.engine.write(containerId, await staged.archive)
    } catch (error) {
      throw new ApiError('DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED', 'execd could not be put into the sandbox.', { cause: error })
    }
  }

  /** Twice: a sweep removes containers of ours that belong to no sandbox, and may find this one. */
  async #stage(imageId: string): Promise<Buffer> {
    try {
      return await this.#unpack(imageId)
    } catch (error) {
      if (!((error as ApiError).cause instanceof EngineError)) throw error
      return await this.#unpack(imageId)
    }
  }

  /** A container that never runs is enough to read files out of an image. */
  async #unpack(imageId: string): Promise<Buffer> {
    const { engine, instance } = this.#deps
    const containerId = await engine.create(stagingSpec(instance, imageId)).catch((error: unknown) => {
      throw new ApiError('DOCKER::SANDBOX_EXECD_START_FAILED', 'The execd image could not be opened.', { cause: error })
    })
    try {
      const [execd, bootstrap] = await Promise.all([engine.read(containerId, '/execd'), engine.read(containerId, '/bootstrap.sh')])
      return layOut(execd, bootstrap)
    } catch (error) {
      throw new ApiError('DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED', 'The execd image could not be read; it must hold /execd and /bootstrap.sh.', { cause: error })
    } finally {
      // What stays is removed by the next sweep.
      await engine.remove(containerId).catch(() => undefined)
    }
  }
}

/** Where the original puts them; both must be executable, whatever the image says. */
function layOut(execd: Buffer, bootstrap: Buffer): Buffer {
  const program = (archive: Buffer): { mode: number; content: Uint8Array } => {
    const { mode, content } = readFirstFile(archive)
    return { mode: mode | 0o555, content }
  }
  return writeTar({ 'opt/opensandbox': { mode: 0o755, content: null }, 'opt/opensandbox/execd': program(execd), 'opt/opensandbox/bootstrap.sh': program(bootstrap) })
}

/** Labelled as ours and as nobody's, so that a sweep removes what a killed server leaves. */
function stagingSpec(instance: string, image: string): ContainerSpec {
  return {
    name: `sallyport-staging-${randomBytes(8).toString('hex')}`, image,
    labels: { [labels.instance]: instance, [labels.role]: 'staging' },
    env: [], entrypoint: null, cmd: ['tail', '-f', '/dev/null'], network: { name: 'none' },
    capAdd: [], capDrop: ['ALL'], securityOpt: ['no-new-privileges:true'], sysctls: {}, publish: new Map(), publishAddress: '', dns: [],
    memory: 0, nanoCpus: 0, pids: 16, gpus: 0, readOnly: true, platform: null, runtime: null, cgroupns: 'private',
  }
}

function keyOf(platform: Platform | null): string {
  return platform === null ? '' : `${platform.os}/${platform.arch}`
}
