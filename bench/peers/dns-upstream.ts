/**
 * The upstream of the DNS bench: answers every question at once, A with one ordinary address made from the name in any case, every other type with
 * nothing. `node dns-upstream.ts`, on port 53 of every address it has.
 */
import { createSocket } from 'node:dgram'

const socket = createSocket('udp4')

socket.on('message', (query, from) => {
  const end = questionEnd(query)
  if (end === -1) return
  const wanted = query.readUInt16BE(end - 4) === 1
  const reply = Buffer.alloc(end + (wanted ? 16 : 0))
  query.copy(reply, 0, 0, end)
  reply.writeUInt32BE(0x8180_0001, 2)
  reply.writeUInt16BE(wanted ? 1 : 0, 6)
  reply.writeUInt32BE(0, 8)
  if (wanted) writeAddress(reply, end)
  socket.send(reply, from.port, from.address)
})

socket.bind(53)

/** Where the first question ends, or -1 when the packet is no plain query. */
function questionEnd(query: Buffer): number {
  let at = 12
  while (at < query.length && query[at] !== 0) at += query[at]! + 1
  return at + 5 <= query.length ? at + 5 : -1
}

/** A record: pointer to the name, type A, class IN, 300 seconds, an address of 198.18.0.0/15. */
function writeAddress(reply: Buffer, end: number): void {
  let hash = 0
  for (let at = 12; at < end - 4; at++) hash = (hash * 31 + (reply[at]! | 0x20)) >>> 0
  reply.writeUInt32BE(0xc00c_0001, end)
  reply.writeUInt32BE(0x0001_0000, end + 4)
  reply.writeUInt32BE(0x012c_0004, end + 8)
  reply.writeUInt32BE((0xc612_0000 | (hash & 0x1_ffff)) >>> 0, end + 12)
}
