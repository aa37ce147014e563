/**
 * A sandbox in a process of its own, with descriptors of its own: it holds every request until it is told to answer, and answers at once
 * from then on. Says its port, and again and again how many requests it holds.
 */
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'

const held = new Set<ServerResponse>()
let holds = true

const server = createServer((_request, response) => {
  if (!holds) return void response.end('answered')
  held.add(response)
  response.once('close', () => held.delete(response))
})
// What is kept after an answer is given back soon, so that tests need not wait for it.
server.keepAliveTimeout = 3_000
server.listen({ port: 0, host: '127.0.0.1', backlog: 4096 }, () => process.send?.((server.address() as AddressInfo).port))
setInterval(() => process.send?.({ held: held.size }), 20)

process.on('message', () => {
  holds = false
  for (const response of held) response.end('answered')
})
process.on('disconnect', () => process.exit())
