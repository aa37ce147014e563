/**
 * The door between deciding and relaying. What admits a request knows no more of the engines behind it than this; `gateway.ts` alone
 * chooses them. A faster relay implements these types and passes `test/gateway/smuggling/`.
 */
import type { Socket } from 'node:net'
import type { Fault } from '#policies/fault.ts'
import type { Placed } from './in-flight.ts'
import type { Sandbox } from './routes.ts'
import type { Visit } from './visit.ts'

/** One HTTP exchange on its way to a sandbox and back. */
export interface Relay extends Placed {
  /** Sends the request. The visit's head holds only what the sandbox may see. */
  send(): void
  /** The client is gone, or its response is complete. */
  clientClosed(): void
  /** Called about once a second. @param now ms since the process started */
  checkTimes(now: number): void
  /** The gateway goes: ends the exchange, with words where there is room for them. */
  leave(): void
}

/** Those that ask for no change (RFC 9110 §9.2.1): their requests may be answered beside each other, and sent again. */
export const safeMethods: ReadonlySet<string | undefined> = new Set(['GET', 'HEAD', 'OPTIONS', 'TRACE'])

/** Makes the relay of an admitted request; null: that port of the sandbox has as many as it may have. */
export type OpenRelay = (visit: Visit, sandbox: Sandbox) => Relay | null

/** All upgraded connections of one gateway. */
export interface Tunnels {
  readonly size: number
  /**
   * Dials the sandbox and joins the two connections.
   * @param socket the client's, taken over from node:http
   * @param early bytes the client sent behind its head
   */
  relay(visit: Visit, sandbox: Sandbox, socket: Socket, early: Buffer): void
  /** Called about once a second. @param now ms since the process started */
  checkTimes(now: number): void
  /** Says 1001 to every client, between frames. */
  leave(): void
  destroy(): void
}

/** How a relay tells that a request ended without a response of the sandbox. */
export type Refusal = (visit: Visit, fault: Fault) => void
