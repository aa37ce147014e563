/** One question over a TCP connection of its own (RFC 7766): for answers that do not fit a datagram. */
import { connect } from 'node:net'
import { echoOf } from './echo.ts'
import type { Upstream } from './ruleset.ts'

/** The reply; `refused` when the upstream has no TCP; null when nothing that fits came within `timeoutMs`. */
export function askTcp(question: Buffer, questionEnd: number, { address, port }: Upstream, timeoutMs: number): Promise<Buffer | 'refused' | null> {
  // A copy: the question may be answered elsewhere meanwhile, or be asked elsewhere under another id.
  const framed = Buffer.alloc(2 + question.length)
  framed.writeUInt16BE(question.length, 0)
  question.copy(framed, 2)
  const query = framed.subarray(2)
  return new Promise((resolve) => {
    let received = Buffer.alloc(0)
    const socket = connect({ host: address, port })
    const timer = setTimeout(() => end(null), timeoutMs)
    const end = (reply: Buffer | 'refused' | null): void => {
      clearTimeout(timer)
      socket.destroy()
      resolve(reply)
    }
    socket.on('error', (error: NodeJS.ErrnoException) => end(error.code === 'ECONNREFUSED' ? 'refused' : null))
    socket.on('close', () => end(null))
    socket.on('connect', () => socket.write(framed))
    socket.on('data', (chunk) => {
      received = Buffer.concat([received, chunk])
      if (received.length < 2 || received.length < 2 + received.readUInt16BE(0)) return
      const reply = received.subarray(2, 2 + received.readUInt16BE(0))
      const fits = reply.length >= 12 && reply.readUInt16BE(0) === query.readUInt16BE(0) && echoOf(reply, query, questionEnd) !== 'none'
      end(fits ? reply : null)
    })
  })
}
