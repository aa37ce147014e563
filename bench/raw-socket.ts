/** Connections of load generators: whatever arrives is looked at in one buffer that all share, so that nothing is allocated, copied or kept. */
import { connect, type Socket } from 'node:net'

export interface Reader {
  /** `bytes` are only there during the call. */
  read(bytes: Buffer): void
  /** The connection ended or broke, whoever wanted it. */
  closed(reason: Error): void
}

const shared = Buffer.allocUnsafe(256 * 1024)

/** Connects to a port of 127.0.0.1. @throws Error when nobody accepts */
export async function openSocket(port: number, reader: Reader): Promise<Socket> {
  const callback = (length: number): boolean => {
    reader.read(shared.subarray(0, length))
    return true
  }
  const socket = connect({ port, host: '127.0.0.1', noDelay: true, onread: { buffer: shared, callback } })
  let broken = new Error('the connection ended')
  await new Promise<void>((resolve, reject) => socket.once('connect', resolve).once('error', reject))
  socket.on('error', (error) => { broken = error })
  socket.once('close', () => reader.closed(broken))
  return socket
}

/** Puts a head together from pieces. */
export class HeadReader {
  #text = ''

  /** @returns the head when it is complete, and how many of `bytes` belonged to it; null when more is to come */
  feed(bytes: Buffer): { head: string; length: number } | null {
    const before = this.#text.length
    this.#text += bytes.toString('latin1')
    const end = this.#text.indexOf('\r\n\r\n')
    if (end === -1) return null
    const head = this.#text.slice(0, end + 4)
    this.#text = ''
    return { head, length: head.length - before }
  }
}
