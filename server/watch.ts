/** Keeps the table of sandboxes true: events of the engine as they come, a full comparison after every gap. */
import { setTimeout as delay } from 'node:timers/promises'
import { labels } from '#policies/wire.ts'
import type { EngineEvent } from './docker.ts'
import { egressMember } from './group.ts'

/** What is asked of the engine; implemented by `Docker`. */
export type EventEngine = {
  events(onEvent: (event: EngineEvent) => void, ended: () => void): Promise<{ close(): void }>
}
/** What happened to a container of a sandbox: its sidecar ended, it was started, or anything else. */
export type Touch = 'gate died' | 'started' | 'changed'
export type WatchDeps = {
  readonly engine: EventEngine
  readonly instance: string
  readonly network: string
  readonly touch: (id: string, what: Touch) => void
  readonly networkGone: () => void
  /** Compares everything; rejects when the engine cannot be asked. @param missed events may have been missed */
  readonly sweep: (missed: boolean) => Promise<void>
  readonly report: (event: string, detail: Record<string, unknown>) => void
}

const sweepEvery = 30_000
const firstPause = 100
const longestPause = 5000
const interesting = new Set(['die', 'destroy', 'pause', 'unpause', 'start', 'oom'])

export class Watch {
  readonly #deps: WatchDeps
  readonly #stop = new AbortController()
  #done: Promise<void> = Promise.resolve()
  #connected = false

  constructor(deps: WatchDeps) {
    this.#deps = deps
  }

  /** Whether events arrive and the last comparison went well. */
  get connected(): boolean {
    return this.#connected
  }

  /**
   * Resolves after the first comparison, or the first failed attempt at one, or `patience` ms: an engine that hangs
   * must not keep the server from saying so. Goes on behind.
   */
  async start(patience: number): Promise<void> {
    const first = Promise.withResolvers<void>()
    this.#done = this.#run(first.resolve)
    const timer = setTimeout(first.resolve, patience)
    await first.promise
    clearTimeout(timer)
  }

  async close(): Promise<void> {
    this.#stop.abort()
    await this.#done
  }

  async #run(tried: () => void): Promise<void> {
    let pause = firstPause
    while (!this.#stop.signal.aborted) {
      const ended = Promise.withResolvers<void>()
      this.#stop.signal.addEventListener('abort', () => ended.resolve(), { once: true })
      let stream: { close(): void } | null = null
      try {
        // Events first, comparison second: nothing falls between.
        stream = await this.#deps.engine.events((event) => this.#take(event), ended.resolve)
        await this.#deps.sweep(true)
        this.#connected = true
        pause = firstPause
        tried()
        await this.#sweepUntil(ended.promise)
        if (!this.#stop.signal.aborted) this.#deps.report('engine-events-ended', {})
      } catch (error) {
        this.#deps.report('engine-unreachable', { error: (error as Error).message })
      }
      this.#connected = false
      this.#deps.networkGone()
      stream?.close()
      tried()
      await delay(pause, undefined, { signal: this.#stop.signal }).catch(() => undefined)
      pause = Math.min(longestPause, pause * 2)
    }
  }

  async #sweepUntil(ended: Promise<void>): Promise<void> {
    let over = false
    const end = ended.then(() => { over = true })
    while (!over) {
      const stop = new AbortController()
      await Promise.race([end, delay(sweepEvery, undefined, { signal: stop.signal }).catch(() => undefined)])
      stop.abort()
      if (!over) await this.#deps.sweep(false)
    }
  }

  #take(event: EngineEvent): void {
    if (event.kind === 'network') {
      if (event.action === 'destroy' && event.name === this.#deps.network) this.#deps.networkGone()
      return
    }
    const owner = event.labels[labels.instance]
    // Nobody's may be one that was taken over: a look tells.
    if ((owner !== undefined && owner !== this.#deps.instance) || !interesting.has(event.action)) return
    const id = event.labels[labels.id] ?? event.labels[labels.egressSidecarFor]
    if (id === undefined) return
    const gateDied = owner !== undefined && event.action === 'die' && event.labels[labels.role] === egressMember
    this.#deps.touch(id, gateDied ? 'gate died' : event.action === 'start' ? 'started' : 'changed')
  }
}
