/**
 * The upstream of the gateway bench: the least a keep-alive HTTP server can do, so that it is never what limits. `node http-backend.ts <port>`.
 * `/64k` answers 65,536 bytes, `/64m` 64 MiB, everything else five. A body has an announced length and is
 * thrown away before the answer; a head may come in pieces, and several requests may come at once.
 */
import { createServer } from 'node:net'

const small = answer(Buffer.from('hello'))
/** By what stands before the first blank behind the method. */
const byPath: ReadonlyMap<string, Buffer> = new Map([['/64k', answer(Buffer.alloc(64 * 1024, 'x'))], ['/64m', answer(Buffer.alloc(64 * 1024 * 1024, 'x'))]])
/** Of GET. */
const letterG = 0x47
const end = Buffer.from('\r\n\r\n')

createServer({ noDelay: true }, (socket) => {
  let rest: Buffer = Buffer.alloc(0)
  /** Bytes of a request's body that are still to come. */
  let left = 0
  socket.on('error', () => socket.destroy())
  socket.on('data', (chunk: Buffer) => {
    rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk])
    if (left > 0 && !skip()) return
    for (let at = rest.indexOf(end); at !== -1; at = rest.indexOf(end)) {
      const head = rest.subarray(0, at)
      rest = rest.subarray(at + end.length)
      if (head[0] !== letterG) {
        left = Number(/\ncontent-length: *(\d+)/i.exec(head.toString('latin1'))?.[1] ?? 0)
        if (!skip()) return
        continue
      }
      socket.write(byPath.get(head.toString('latin1', 4, head.indexOf(' ', 4))) ?? small)
    }
  })
  /** @returns whether the body is over, and answered */
  function skip(): boolean {
    const here = Math.min(left, rest.length)
    left -= here
    rest = rest.subarray(here)
    if (left === 0) socket.write(small)
    return left === 0
  }
}).listen(Number(process.argv[2]), '127.0.0.1')

function answer(body: Buffer): Buffer {
  return Buffer.concat([Buffer.from(`HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: ${body.length}\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n`), body])
}
