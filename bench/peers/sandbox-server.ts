/** What the sandboxes of the egress bench connect to: `node sandbox-server.ts` takes or gives bytes without end, on every address it has. */
import { createServer } from 'node:net'

export const streamPorts = { sink: 5001, source: 5002 } as const

if (import.meta.main) {
  createServer((socket) => socket.on('error', () => socket.destroy()).resume()).listen(streamPorts.sink)
  const block = Buffer.alloc(1 << 18)
  createServer((socket) => {
    const write = (): void => {
      while (!socket.destroyed && socket.write(block));
    }
    socket.on('error', () => socket.destroy()).on('drain', write).resume()
    write()
  }).listen(streamPorts.source)
}
