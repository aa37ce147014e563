/** Who is at the other end of a client connection; found out once per connection. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { canonicalAddress, type NetworkTable } from '#policies/address.ts'

export type Peer = {
  /** IPv4 in plain form, also on a dual-stack listener. */
  readonly address: string
  /** A proxy of ours: its X-Forwarded headers are believed. */
  readonly trusted: boolean
  /** The port the client reached. */
  readonly localPort: string
  /** The connection ends with the answer under way: whatever the client sent behind that request is not a request. */
  closing: boolean
  /** Requests behind the one it ends with. node:http keeps each of them, and a place for its answer, until that end. */
  ignored: number
  /** Answers of this connection that have not ended. A list: one as a rule, and a Set that is filled and emptied for good is made anew every few requests. */
  readonly open: ServerResponse[]
  /** The last request that was answered before its body had come; null: none was. */
  unread: IncomingMessage | null
}

const peerKey = Symbol('peer')
type KnownSocket = Socket & { [peerKey]?: Peer }

export function peerOf(socket: KnownSocket, trusted: NetworkTable): Peer {
  return (socket[peerKey] ??= readPeer(socket, trusted))
}

function readPeer(socket: Socket, trusted: NetworkTable): Peer {
  const address = plainAddress(socket.remoteAddress ?? '')
  return { address, trusted: trusted.find(address) !== undefined, localPort: String(socket.localPort ?? ''), closing: false, ignored: 0, open: [], unread: null }
}

/** IPv4 as it is written everywhere else, where a dual-stack listener says it the IPv6 way. */
export function plainAddress(address: string): string {
  return address.startsWith('::ffff:') && address.includes('.') ? address.slice(7) : address
}

/** The client a chain of trusted proxies speaks for: the last address in X-Forwarded-For that is not a proxy of ours. */
export function clientOf(peer: Peer, forwardedFor: string, trusted: NetworkTable): string {
  let client = peer.address
  if (!peer.trusted || forwardedFor === '') return client
  const hops = forwardedFor.split(',')
  for (let i = hops.length - 1; i >= 0; i--) {
    const address = hopAddress((hops[i] as string).trim())
    // Nobody is counted under a name of their own choice, and what stands before one is anybody's claim.
    if (address === null) return client
    client = address
    if (trusted.find(address) === undefined) return client
  }
  return client
}

/** The address in a hop, in its one spelling. Some proxies write the port, too, which differs from connection to connection, and brackets. */
function hopAddress(hop: string): string | null {
  const bare = canonicalAddress(hop)
  if (bare !== null) return bare
  const withPort = /^(?:\[([^\]]*)\]|([\d.]*))(?::\d*)?$/.exec(hop)
  return withPort === null ? null : canonicalAddress(withPort[1] ?? withPort[2] ?? '')
}
