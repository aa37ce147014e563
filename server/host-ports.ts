/** Host ports for direct mode: picked at random, checked, and held back from other creates until the sandbox is gone. */
import { randomInt } from 'node:crypto'
import { createServer } from 'node:net'
import { ApiError } from './api-error.ts'

/** The original's range, so that firewalls opened for it still fit. */
const first = 40000
const last = 60000
const attempts = 50

export class HostPorts {
  readonly #address: string
  readonly #held = new Set<number>()

  /** @param address what the ports are published on */
  constructor(address: string) {
    this.#address = address
  }

  /** @throws ApiError DOCKER::SANDBOX_START_FAILED when none is free */
  async take(): Promise<number> {
    for (let attempt = 0; attempt < attempts; attempt++) {
      const port = randomInt(first, last + 1)
      if (this.#held.has(port)) continue
      this.#held.add(port)
      if (await isFree(this.#address, port)) return port
      this.#held.delete(port)
    }
    throw new ApiError('DOCKER::SANDBOX_START_FAILED', 'No free host port for the sandbox.')
  }

  /** Ports of a sandbox found at start. */
  hold(ports: Iterable<number>): void {
    for (const port of ports) this.#held.add(port)
  }

  release(ports: Iterable<number>): void {
    for (const port of ports) this.#held.delete(port)
  }
}

function isFree(host: string, port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = createServer()
    probe.once('error', () => resolve(false))
    probe.listen({ host, port, exclusive: true }, () => probe.close(() => resolve(true)))
  })
}
