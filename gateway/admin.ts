/** What the operator asks, on a listener of its own: `/metrics` as Prometheus text, and `/readyz`. */
import { createServer, type Server, type ServerResponse } from 'node:http'

/** One process, or several that are asked together. */
export interface Overseen {
  readonly contentType: string
  metrics(): Promise<string>
  /** Why it should get no new requests; '' when it should. */
  unready(): Promise<string>
}

/** @param onError told when an answer could not be made */
export async function openAdmin(overseen: Overseen, port: number, host: string, onError: (error: unknown) => void): Promise<Server> {
  const server = createServer((request, response) => {
    const answer = request.method !== 'GET' ? undefined : answers.get(request.url as string)
    if (answer === undefined) return reply(response, 404, 'text/plain', 'not found\n')
    answer(overseen, response).catch((error: unknown) => {
      onError(error)
      reply(response, 500, 'text/plain', 'failed\n')
    })
  })
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(port, host, resolve))
  return server
}

const answers = new Map<string, (overseen: Overseen, response: ServerResponse) => Promise<void>>([
  ['/metrics', async (overseen, response) => reply(response, 200, overseen.contentType, await overseen.metrics())],
  ['/readyz', async (overseen, response) => {
    const unready = await overseen.unready()
    reply(response, unready === '' ? 200 : 503, 'text/plain', unready === '' ? 'OK' : `${unready}\n`)
  }],
])

function reply(response: ServerResponse, status: number, type: string, body: string): void {
  response.writeHead(status, { 'content-type': type, 'content-length': Buffer.byteLength(body) }).end(body)
}
