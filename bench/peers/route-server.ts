/**
 * A lifecycle server's route stream and nothing else: `node route-server.ts <port> <routes file>…` tells every gateway the sandboxes of one file, and
 * at `POST /next` breaks off and tells those of the next file to whoever comes back.
 */
import { readFileSync } from 'node:fs'
import { createServer, type ServerResponse } from 'node:http'
import type { RouteEvent } from '#policies/wire.ts'
import type { StaticSandbox } from '../load/gateway-program.ts'

const [port, ...files] = process.argv.slice(2)
const lists = files.map((file) => list((JSON.parse(readFileSync(file, 'utf8')) as { sandboxes: StaticSandbox[] }).sandboxes))
const streams = new Set<ServerResponse>()
let current = 0

createServer((request, response) => {
  if (request.method === 'POST') {
    current = (current + 1) % lists.length
    for (const stream of streams) stream.destroy()
    response.writeHead(204).end()
    return
  }
  streams.add(response)
  response.on('close', () => streams.delete(response)).on('error', () => undefined)
  response.writeHead(200, { 'content-type': 'application/x-ndjson' }).write(lists[current])
}).listen(Number(port), '127.0.0.1')

setInterval(() => {
  for (const stream of streams) stream.write(line({ type: 'ping' }))
}, 5_000)

function list(sandboxes: readonly StaticSandbox[]): Buffer {
  const puts = sandboxes.map(({ id, host }) => line({ type: 'put', sandbox: { id, host, state: 'Running', lifecycle: `${id} at ${host}` } }))
  return Buffer.from([line({ type: 'reset' }), ...puts, line({ type: 'synced' })].join(''))
}

function line(event: RouteEvent): string {
  return `${JSON.stringify(event)}\n`
}
