/** Sockets towards one upstream. */
import { createSocket, type RemoteInfo, type Socket } from 'node:dgram'
import { canonicalAddress } from '#policies/address.ts'
import { noLookup } from './listen.ts'
import type { Upstream } from './ruleset.ts'

export function typeOf({ address }: Upstream): 'udp4' | 'udp6' {
  return address.includes(':') ? 'udp6' : 'udp4'
}

export function openSocket(upstream: Upstream): Socket {
  return createSocket({ type: typeOf(upstream), lookup: noLookup })
}

/** @throws when no route leads there */
export function connectSocket(socket: Socket, { address, port }: Upstream): Promise<void> {
  return new Promise((resolve, reject) => {
    // With a callback, an error goes there and nowhere else; @types/node does not know.
    socket.connect(port, address, ((error?: Error) => (error === undefined ? resolve() : reject(error))) as () => void)
  })
}

export async function proveRoute(upstream: Upstream): Promise<void> {
  const socket = openSocket(upstream)
  try {
    await connectSocket(socket, upstream)
  } finally {
    socket.close()
  }
}

export function isFrom({ address, port }: Upstream, from: RemoteInfo): boolean {
  return from.port === port && canonicalAddress(from.address) === address
}
