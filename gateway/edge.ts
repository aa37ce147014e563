/** What every request of one gateway meets: its table, its limits, its log. Made once, in `gateway.ts`. */
import type { AccessKeys } from '#policies/access.ts'
import type { NetworkTable } from '#policies/address.ts'
import type { InFlight } from './in-flight.ts'
import type { Locator } from './locate.ts'
import type { Metrics } from './metrics.ts'
import type { OpenRelay, Relay, Tunnels } from './relay.ts'
import type { Renewals } from './renewals.ts'
import type { RouteTable } from './routes.ts'
import type { FailureThrottle } from './throttle.ts'
import type { UpstreamGuard } from './upstream-guard.ts'
import type { VerifiedMemory } from './verified.ts'

export type Edge = {
  readonly table: RouteTable
  readonly locator: Locator
  readonly guard: UpstreamGuard
  /** Of what can be guessed: a client that guesses is not even asked. */
  readonly throttle: FailureThrottle
  /** Of all other refused proofs, which lock nobody out. */
  readonly proofs: FailureThrottle
  readonly metrics: Metrics
  readonly openRelay: OpenRelay
  readonly relays: InFlight<Relay>
  readonly tunnels: Tunnels
  /** null: nobody is told which sandboxes are used. */
  readonly renewals: Renewals | null
  readonly trustedProxies: NetworkTable
  readonly keys: () => AccessKeys
  readonly verified: VerifiedMemory
  /** Refuse unknown sandboxes and refused access alike, so that nobody learns which ids exist. */
  readonly hideMissing: boolean
  /** Browsers may enter by cookie in URI mode. */
  readonly uriCookies: boolean
  readonly draining: () => boolean
  readonly overloaded: () => boolean
  /** Takes one access line, newline included; null: none is wanted. */
  readonly access: ((line: string) => void) | null
  readonly nextRequestId: () => string
}
