/**
 * Whose a container is. Ours carry the label of our instance. With `docker.adopt`, sandboxes of the original server, which carry its labels
 * and nobody's instance, become ours as well: a container takes no label later, so the store says which ones, by container id.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { labels } from '#policies/wire.ts'
import type { Found } from './docker.ts'
import type { SandboxRecord } from './group.ts'
import { groupHash } from './ids.ts'
import { metadataProblems } from './metadata.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type Finder = {
  list(wanted: readonly string[]): Promise<Found[]>
  examine(wanted: readonly string[]): Promise<Found[]>
}

/** In one log line. */
const mostNames = 10

export class Ownership {
  readonly #engine: Finder
  readonly #instance: string
  readonly #adopt: boolean

  constructor(engine: Finder, { instance, adopt }: { readonly instance: string; readonly adopt: boolean }) {
    this.#engine = engine
    this.#instance = instance
    this.#adopt = adopt
  }

  /** The containers of a sandbox as they are now. @param adopted those that were taken over, by container id; none when we made it */
  async of(id: string, adopted: readonly string[] | undefined): Promise<Found[]> {
    if (adopted === undefined) return this.#engine.examine([`${labels.instance}=${this.#instance}`, `${labels.group}=${groupHash(id)}`])
    const found = await Promise.all([labels.id, labels.egressSidecarFor].map((label) => this.#engine.examine([`${label}=${id}`])))
    return found.flat().filter((container) => adopted.includes(container.containerId))
  }

  /**
   * Everything of ours by sandbox, as the engine's list has it, and what there is to be taken over; `''` for containers that name none.
   * @param records of the sandboxes that are known
   */
  async all(records: readonly SandboxRecord[]): Promise<ReadonlyMap<string, readonly Found[]>> {
    const known = new Map(records.map((record) => [record.id, record.adopted]))
    const wanted = [[`${labels.instance}=${this.#instance}`]]
    if (this.#adopt || records.some((record) => record.adopted !== undefined)) wanted.push([labels.id], [labels.egressSidecarFor])
    const sandboxes = new Map<string, Found[]>()
    for (const container of (await Promise.all(wanted.map((label) => this.#engine.list(label)))).flat()) {
      const id = container.labels[labels.id] ?? container.labels[labels.egressSidecarFor] ?? ''
      const containers = sandboxes.get(id) ?? []
      if (containers.some((other) => other.containerId === container.containerId) || !this.#counts(container, id, known)) continue
      sandboxes.set(id, [...containers, container])
    }
    return sandboxes
  }

  #counts(container: Found, id: string, known: ReadonlyMap<string, readonly string[] | undefined>): boolean {
    if (!isUnlabelled(container)) return container.labels[labels.instance] === this.#instance
    return known.has(id) ? known.get(id)?.includes(container.containerId) === true : this.#adopt
  }
}

/** Containers with our labels of instances that are not this one, and a few of their names. */
export async function othersOn(engine: Pick<Finder, 'list'>, instance: string): Promise<{ containers: number; instances: readonly string[] }> {
  const names = (await engine.list([labels.instance])).map((container) => container.labels[labels.instance] ?? '').filter((name) => name !== instance)
  return { containers: names.length, instances: [...new Set(names)].slice(0, mostNames) }
}

/** Nobody's: no server of ours made it. */
export function isUnlabelled(container: Found): boolean {
  return container.labels[labels.instance] === undefined
}

/** Where the original keeps metadata that was patched: the whole map, which then holds instead of the labels. null: it was not. */
export function readOldMetadata(home: string, id: string): Readonly<Record<string, string>> | null {
  if (!/^[\w-]{1,128}$/.test(id)) return null
  try {
    const read: unknown = JSON.parse(readFileSync(join(home, '.opensandbox', 'metadata', `${id}.json`), 'utf8'))
    if (typeof read !== 'object' || read === null || Array.isArray(read) || Object.values(read).some((value) => typeof value !== 'string')) return null
    const metadata = read as Record<string, string>
    return metadataProblems(metadata).length === 0 ? metadata : null
  } catch {
    return null
  }
}
