/** Upstreams as a test wants them, over UDP and TCP, and what a resolver asks them. */
import { createSocket, type RemoteInfo, type Socket } from 'node:dgram'
import { once } from 'node:events'
import { createServer, type AddressInfo, type Server } from 'node:net'
import type { Test } from 'tap'
import { createResolver, type ResolverOptions, type UdpResolver } from '../../egress-sidecar/resolver.ts'
import type { Upstream } from '../../egress-sidecar/ruleset.ts'
import { message, replyFlags, toQuestion, types } from './message.ts'

export type Reply = (query: Buffer, send: (reply: Buffer) => void, peer: RemoteInfo) => void

/** @param whole what it answers over TCP, null for silence; without it nobody listens there */
export async function upstream(t: Test, reply: Reply, whole?: (asked: Buffer) => Buffer | null): Promise<Upstream & { asked: number }> {
  const socket: Socket = createSocket('udp4')
  const server = whole === undefined ? null : await serveTcp(t, whole)
  socket.bind(server === null ? 0 : (server.address() as AddressInfo).port, '127.0.0.1')
  // What is free for TCP may be taken for UDP.
  if (!(await once(socket, 'listening').then(() => true, () => false))) return upstream(t, reply, whole)
  const state = { address: '127.0.0.1', port: socket.address().port, asked: 0 }
  socket.on('message', (query, peer) => {
    state.asked++
    reply(query, (bytes) => socket.send(bytes, peer.port, peer.address), peer)
  })
  t.teardown(() => socket.close())
  return state
}

export async function resolverOf(t: Test, upstreams: Upstream[], timeoutMs = 3000, tcp = true, more: Partial<ResolverOptions> = {}): Promise<UdpResolver> {
  const resolver = await createResolver({ upstreams, timeoutMs, tcp: () => tcp, ...more }, () => performance.now())
  t.teardown(() => resolver.close())
  await resolver.connect()
  return resolver
}

async function serveTcp(t: Test, whole: (asked: Buffer) => Buffer | null): Promise<Server> {
  const server = createServer((socket) => {
    socket.on('error', () => socket.destroy())
    socket.on('data', (data) => {
      const reply = whole(data.subarray(2))
      if (reply === null) return
      const framed = Buffer.concat([Buffer.of(reply.length >> 8, reply.length & 255), reply])
      // In two parts: the length alone may come first.
      socket.write(framed.subarray(0, 1), () => socket.write(framed.subarray(1)))
    })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  return server
}

export const query = (): Buffer => message({ name: 'a.example' })
export const end = query().length
/** Gives the question back as it came, as servers do. */
export function answer(asked: Buffer, address = '198.51.100.1', flags = replyFlags): Buffer {
  const reply = folded(asked, address, flags)
  asked.copy(reply, 12, 12, end)
  return reply
}
/** By a server that does not keep the case, or somebody who did not see the question. */
export const folded = (asked: Buffer, address = '198.51.100.1', flags = replyFlags): Buffer => message({ id: asked.readUInt16BE(0), flags, name: 'a.example', answers: [{ name: toQuestion, type: types.A, data: address }] })
export const good: Reply = (asked, send) => send(answer(asked))
