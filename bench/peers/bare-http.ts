/** The barest HTTP server there is in Node, with an answer as long as a sandbox of the lifecycle API. `node bare-http.ts <port>`. */
import { createServer } from 'node:http'

const answer = { id: '00000000-0000-4000-8000-000000000000', image: { uri: 'sallyport/sandbox:local' }, status: { state: 'Running', reason: 'CONTAINER_RUNNING', message: 'Sandbox container is running.', lastTransitionAt: '2026-01-01T00:00:00.000Z' }, entrypoint: ['sleep', '600'], expiresAt: '2026-01-01T00:00:00.000Z', createdAt: '2026-01-01T00:00:00.000Z' }

createServer((_, response) => {
  response.setHeader('content-type', 'application/json')
  response.end(JSON.stringify(answer))
}).listen(Number(process.argv[2]), '127.0.0.1')
