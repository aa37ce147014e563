/**
 * Which addresses the gateway dials. A route that leads to the gateway's own host would turn it into a door to every service there
 * (SSRF), so loopback, unspecified, link-local (cloud metadata), multicast and the host's own addresses are refused.
 */
import { lookup as dnsLookup, type LookupAddress, type LookupOptions } from 'node:dns'
import { isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import { canonicalAddress, NetworkTable, readNetwork, type Network } from '#policies/address.ts'
import { Fault, toFault } from '#policies/fault.ts'
import { isHostName } from '#policies/host.ts'

const loopback = 0
const never = 1
const refused = new NetworkTable()
for (const text of ['0.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '255.255.255.255', '::', 'fe80::/10', 'ff00::/8']) refused.add(readNetwork(text) as Network, never)
for (const text of ['127.0.0.0/8', '::1']) refused.add(readNetwork(text) as Network, loopback)

export type LookupCallback = (error: Error | null, address?: string | LookupAddress[], family?: number) => void

export class UpstreamGuard {
  readonly #allowLoopback: boolean
  readonly #addresses: () => readonly string[]
  #own: ReadonlySet<string>
  /** Verdicts since the last `refresh`: every request asks, and addresses seldom change. */
  readonly #verdicts = new Map<string, boolean>()

  /**
   * @param allowLoopback dial loopback and own addresses all the same (link-local and multicast never)
   * @param addresses this host's addresses; asked again at every `refresh`
   */
  constructor(allowLoopback: boolean, addresses: () => readonly string[] = interfaceAddresses) {
    this.#allowLoopback = allowLoopback
    this.#addresses = addresses
    this.#own = this.#readOwn()
  }

  /** Asking takes a descriptor. When none is left, what was known holds until it is asked again. */
  refresh(): void {
    try {
      this.#own = this.#readOwn()
    } catch {
      return
    }
    this.#verdicts.clear()
  }

  #readOwn(): ReadonlySet<string> {
    return new Set(this.#addresses().map((address) => canonicalAddress(address) ?? address))
  }

  /** May the gateway dial this host? A name is judged by its form here and by its addresses when it is dialled. */
  allows(host: string): boolean {
    let verdict = this.#verdicts.get(host)
    if (verdict === undefined) {
      verdict = isIP(host) === 0 ? this.#allowsName(host) : this.#allowsAddress(host)
      this.#verdicts.set(host, verdict)
    }
    return verdict
  }

  /** Loopback or one of our own addresses: several sandboxes may share such a one. */
  isOwn(host: string): boolean {
    const address = canonicalAddress(host)
    return address === null ? host === 'localhost' : this.#own.has(address) || refused.find(address) === loopback
  }

  /** A `lookup` for net.connect that refuses a name as soon as one of its addresses is refused. */
  readonly lookup = (name: string, options: LookupOptions, callback: LookupCallback): void => {
    dnsLookup(name, { ...options, all: true }, (error, found) => {
      // No descriptor left to ask with: that is not the name's fault.
      if (error !== null) return callback(toFault(error).code === 'EDGE_OVERLOADED' ? toFault(error) : new Fault('EDGE_UPSTREAM_REFUSED', 'the name of the sandbox does not resolve', { cause: error }))
      const first = found[0]
      if (first === undefined || found.some(({ address }) => !this.#allowsAddress(address))) return callback(new Fault('EDGE_UPSTREAM_FORBIDDEN'))
      return options.all === true ? callback(null, found) : callback(null, first.address, first.family)
    })
  }

  #allowsName(host: string): boolean {
    return isHostName(host) && (host !== 'localhost' || this.#allowLoopback)
  }

  #allowsAddress(text: string): boolean {
    const address = canonicalAddress(text)
    if (address === null) return false
    const why = refused.find(address)
    if (why === never) return false
    return this.#allowLoopback || (why !== loopback && !this.#own.has(address))
  }
}

function interfaceAddresses(): string[] {
  return Object.values(networkInterfaces()).flatMap((list) => (list ?? []).map(({ address }) => address))
}
