/** What the engine says while it pulls, layer by layer, as one sentence for whoever waits. Pure. */

/** One line of the engine's answer to a pull, as far as it is of use. Sizes in bytes. */
export type PullLine = { readonly id?: string | undefined; readonly status?: string | undefined; readonly progressDetail?: { readonly current?: number; readonly total?: number } | undefined }

type Layer = { done: boolean; got: number; size: number }

const finished = new Set(['Pull complete', 'Already exists'])
/** All of a layer is here; what follows is unpacking, whose bytes are counted from 0 again. */
const arrived = new Set(['Verifying Checksum', 'Download complete', 'Extracting'])
const begun = new Set(['Pulling fs layer', 'Waiting', 'Downloading'])

export class PullProgress {
  readonly #layers = new Map<string, Layer>()

  /** @returns how far the pull has come, with this line: `2 of 5 layers are here, 12 of 40 MB` */
  take({ id, status = '', progressDetail }: PullLine): string {
    if (id !== undefined && (finished.has(status) || arrived.has(status) || begun.has(status))) this.#layer(id, status, progressDetail ?? {})
    const layers = [...this.#layers.values()]
    if (layers.length === 0) return 'asking the registry'
    const size = layers.reduce((sum, layer) => sum + layer.size, 0)
    const here = `${layers.filter((layer) => layer.done).length} of ${layers.length} layers are here`
    return size === 0 ? here : `${here}, ${megabytes(layers.reduce((sum, layer) => sum + layer.got, 0))} of ${megabytes(size)} MB`
  }

  #layer(id: string, status: string, { current = 0, total = 0 }: { current?: number; total?: number }): void {
    const layer = this.#layers.get(id) ?? { done: false, got: 0, size: 0 }
    this.#layers.set(id, layer)
    if (status === 'Downloading') Object.assign(layer, { got: current, size: Math.max(layer.size, total) })
    else if (!begun.has(status)) layer.got = layer.size
    if (finished.has(status)) layer.done = true
  }
}

function megabytes(bytes: number): number {
  return Math.ceil(bytes / 1_000_000)
}
