/**
 * The upstream of the WebSocket bench: the least an echo server can do. `node websocket-echo.ts <port>`. Messages have 128 bytes, the only length
 * it knows; a frame may come in pieces, and several may come at once.
 */
import { createHash } from 'node:crypto'
import { createServer, type Socket } from 'node:net'

const size = 128
/** Two bytes, the length in two more (RFC 6455 §5.2), and from a client the mask. */
const header = 4
const frame = header + 4 + size

createServer({ noDelay: true }, (socket) => {
  let rest: Buffer = Buffer.alloc(0)
  let open = false
  socket.on('error', () => socket.destroy())
  socket.on('data', (chunk: Buffer) => {
    rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk])
    if (!open) {
      const end = rest.indexOf('\r\n\r\n')
      if (end === -1) return
      shakeHands(socket, rest.toString('latin1', 0, end))
      rest = rest.subarray(end + 4)
      open = true
    }
    for (; rest.length >= frame; rest = rest.subarray(frame)) echo(socket, rest)
  })
}).listen(Number(process.argv[2]), '127.0.0.1', 1024)

function shakeHands(socket: Socket, head: string): void {
  const key = /^sec-websocket-key: *(\S+)$/im.exec(head)?.[1] ?? ''
  const accept = createHash('sha1').update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest('base64')
  socket.write(`HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`)
}

function echo(socket: Socket, bytes: Buffer): void {
  if (bytes[0] !== 0x82 || bytes[1] !== 0xfe || bytes.readUInt16BE(2) !== size) return void socket.destroy()
  const answer = Buffer.allocUnsafe(header + size)
  answer.writeUInt32BE(0x827e_0000 + size, 0)
  for (let at = 0; at < size; at++) answer[header + at] = bytes[header + 4 + at]! ^ bytes[header + (at & 3)]!
  socket.write(answer)
}
