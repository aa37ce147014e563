/** Makes sure an image is there. Pulls of the same reference are shared. */
import { ApiError } from './api-error.ts'
import { pullFaultText } from './engine-words.ts'
import type { Platform } from './group.ts'
import { PullProgress, type PullLine } from './pull-progress.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type ImageEngine = {
  image(reference: string): Promise<{ id: string; os: string; arch: string } | null>
  pull(reference: string, options: { platform: string | null; auth: Auth | null }, progress: (line: PullLine) => void): Promise<void>
}
export type Auth = { readonly username: string; readonly password: string }
export type Wanted = { readonly reference: string; readonly platform: Platform | null; readonly auth: Auth | null }

type Pull = { readonly done: Promise<void>; readonly watchers: Set<(said: string) => void>; said: string }

export class Images {
  readonly #engine: ImageEngine
  readonly #pulls = new Map<string, Pull>()

  constructor(engine: ImageEngine) {
    this.#engine = engine
  }

  /**
   * @param progress gets how far it is while a pull runs, also one that somebody else began @param called what a client is told it is
   * @throws ApiError DOCKER::SANDBOX_IMAGE_PULL_FAILED
   */
  async ensure(wanted: Wanted, progress: (said: string) => void, called: string): Promise<void> {
    const found = await this.#engine.image(wanted.reference)
    if (found !== null && (wanted.platform === null || (found.os === wanted.platform.os && found.arch === wanted.platform.arch))) return
    // Credentials are part of the key: nobody gets an image through another's password.
    const key = JSON.stringify([wanted.reference, wanted.platform, wanted.auth])
    let pull = this.#pulls.get(key)
    if (pull === undefined) {
      pull = this.#begin(wanted)
      this.#pulls.set(key, pull)
      void pull.done.catch(() => undefined).finally(() => this.#pulls.delete(key))
    }
    pull.watchers.add(progress)
    progress(pull.said)
    try {
      await pull.done
    } catch (error) {
      throw new ApiError('DOCKER::SANDBOX_IMAGE_PULL_FAILED', `Failed to pull image ${called}: ${pullFaultText((error as Error).message)}.`, { cause: error })
    } finally {
      pull.watchers.delete(progress)
    }
  }

  #begin(wanted: Wanted): Pull {
    const [layers, watchers] = [new PullProgress(), new Set<(said: string) => void>()]
    const platform = wanted.platform === null ? null : `${wanted.platform.os}/${wanted.platform.arch}`
    const take = (line: PullLine): void => {
      const said = layers.take(line)
      if (said === pull.said) return
      pull.said = said
      for (const watcher of watchers) watcher(said)
    }
    const pull: Pull = { watchers, said: layers.take({}), done: this.#engine.pull(withTag(wanted.reference), { platform, auth: wanted.auth }, take) }
    return pull
  }
}

/** Without a tag the engine would pull every tag there is. */
function withTag(reference: string): string {
  return reference.includes('@') || reference.slice(reference.lastIndexOf('/') + 1).includes(':') ? reference : `${reference}:latest`
}
