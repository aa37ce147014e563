/** The sandbox's side of DNS: UDP and TCP on the loopback addresses, where port 53 of the namespace is redirected to. */
import { createSocket, type Socket, type SocketOptions } from 'node:dgram'
import { once } from 'node:events'
import { createServer, type Server, type Socket as TcpSocket } from 'node:net'
import type { Done, Transport } from './answer.ts'

/** Gives the reply to one message, or null for none. */
export type Handler = (message: Buffer, transport: Transport, done: Done) => void

export type DnsListener = {
  readonly port: number
  close(): Promise<void>
}

/** The sandbox is the only client: a flood harms nobody but itself as long as these hold. */
export const listenLimits = {
  /** Datagrams being answered at a time; more are dropped, as by any full socket. */
  udpPending: 4096,
  tcpConnections: 64,
  tcpMessages: 128,
  /** RFC 7766 6.2.3 leaves the value open; the original waited 8 s. */
  tcpIdleMs: 8000,
}

/** For sockets that send to IP addresses only: node:dgram would look each of them up. */
export const noLookup: SocketOptions['lookup'] = (address, _options, callback) => callback(null, address, address.includes(':') ? 6 : 4)

/** Listens on every address at one port (0: the first one's choice). @throws when one is taken */
export async function listenDns(addresses: readonly string[], wantedPort: number, handler: Handler, limits = listenLimits): Promise<DnsListener> {
  const open: { close(): unknown }[] = []
  let port = wantedPort
  try {
    for (const address of addresses) {
      const udp = await listenUdp(address, port, handler, limits)
      open.push(udp)
      port = udp.port
      open.push(await listenTcp(address, port, handler, limits))
    }
  } catch (error) {
    for (const listener of open) listener.close()
    throw error
  }
  return {
    port,
    async close() {
      for (const listener of open) listener.close()
    },
  }
}

type Limits = typeof listenLimits

async function listenUdp(address: string, port: number, handler: Handler, limits: Limits): Promise<{ readonly port: number; close(): void }> {
  const socket: Socket = createSocket({ type: address.includes(':') ? 'udp6' : 'udp4', lookup: noLookup, recvBufferSize: 1 << 20 })
  let pending = 0
  let closed = false
  socket.on('message', (message, peer) => {
    // Nobody can be answered at port 0, which only a raw socket sends from.
    if (pending >= limits.udpPending || peer.port === 0) return
    pending++
    handler(message, 'udp', (reply) => {
      pending--
      // Without a callback: a client that has gone is not our error.
      if (reply !== null && !closed) socket.send(reply, peer.port, peer.address)
    })
  })
  const listening = once(socket, 'listening')
  socket.bind({ address, port, exclusive: true })
  await listening
  socket.on('error', () => undefined)
  return {
    port: socket.address().port,
    close() {
      closed = true
      socket.close()
    },
  }
}

async function listenTcp(address: string, port: number, handler: Handler, limits: Limits): Promise<{ close(): void }> {
  const sockets = new Set<TcpSocket>()
  // Who has asked may close his side, and still waits for the answer.
  const server: Server = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.add(socket)
    socket.on('close', () => sockets.delete(socket))
    serveTcp(socket, handler, limits)
  })
  server.maxConnections = limits.tcpConnections
  server.listen({ host: address, port, exclusive: true })
  await once(server, 'listening')
  return {
    close() {
      server.close()
      for (const socket of sockets) socket.destroy()
    },
  }
}

/** Two bytes of length before each message (RFC 1035 4.2.2). One message at a time: the next is read when its reply is written. */
function serveTcp(socket: TcpSocket, handler: Handler, limits: Limits): void {
  let received = Buffer.alloc(0)
  let served = 0
  let busy = false
  let asked = false
  socket.setTimeout(limits.tcpIdleMs, () => socket.destroy())
  socket.on('error', () => socket.destroy())
  socket.on('data', (chunk) => {
    received = received.length === 0 ? chunk : Buffer.concat([received, chunk])
    void work()
  })
  socket.on('end', () => {
    asked = true
    if (!busy) socket.end()
  })

  async function work(): Promise<void> {
    if (busy) return
    busy = true
    while (!socket.destroyed && received.length >= 2 && received.length >= 2 + received.readUInt16BE(0)) {
      socket.pause()
      const end = 2 + received.readUInt16BE(0)
      const message = Buffer.from(received.subarray(2, end))
      // Whoever waits for us is not idle.
      socket.setTimeout(0)
      const reply = await new Promise<Buffer | null>((resolve) => handler(message, 'tcp', resolve))
      socket.setTimeout(limits.tcpIdleMs)
      received = received.subarray(end)
      if (reply === null || ++served > limits.tcpMessages) socket.destroy()
      else if (!socket.write(Buffer.concat([lengthOf(reply), reply]))) await taken(socket)
    }
    busy = false
    if (asked) socket.end()
    else if (!socket.destroyed) socket.resume()
  }
}

/** A client that does not read gets no further answers, or they would gather here. */
function taken(socket: TcpSocket): Promise<void> {
  return new Promise((resolve) => {
    const over = (): void => {
      socket.off('drain', over).off('close', over)
      resolve()
    }
    socket.on('drain', over).on('close', over)
  })
}

function lengthOf(reply: Buffer): Buffer {
  const length = Buffer.alloc(2)
  length.writeUInt16BE(reply.length, 0)
  return length
}
