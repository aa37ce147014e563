/**
 * Reference row: the least a DNS forwarder in Node can do, a new id and two sockets, nothing judged. `node dns-forward.ts <port> <upstream>`.
 */
import { createSocket, type RemoteInfo } from 'node:dgram'

const [port, upstreamAddress] = process.argv.slice(2)
const waiting = new Map<number, { id: number; from: RemoteInfo }>()
const listener = createSocket('udp4')
const upstream = createSocket('udp4')
let next = 0

listener.on('message', (query, from) => {
  next = (next + 1) & 0xffff
  waiting.set(next, { id: query.readUInt16BE(0), from })
  query.writeUInt16BE(next, 0)
  upstream.send(query)
})

upstream.on('message', (reply) => {
  const asked = waiting.get(reply.readUInt16BE(0))
  if (asked === undefined) return
  waiting.delete(reply.readUInt16BE(0))
  reply.writeUInt16BE(asked.id, 0)
  listener.send(reply, asked.from.port, asked.from.address)
})

upstream.connect(53, upstreamAddress!, () => listener.bind(Number(port), '127.0.0.1'))
