/**
 * A socket between a lifecycle server and the Docker engine, for tests that stop the world at an exact call. It passes everything
 * through, byte for byte, and asks a hook before a call goes to the engine and before its answer goes back.
 */
import { Agent, createServer, request, type IncomingMessage, type ServerResponse } from 'node:http'
import { once } from 'node:events'

/** A call without the API version: `POST /containers/create`. */
export type EngineCall = { readonly method: string; readonly path: string }
/** `drop`: this side of the call is never finished. */
export type Hook = (call: EngineCall, moment: 'before' | 'after') => 'pass' | 'drop'

export interface EngineProxy extends AsyncDisposable {
  /** For the server's environment. */
  readonly dockerHost: string
  hook: Hook
}

/** @param path of the socket to make */
export async function startEngineProxy(path: string): Promise<EngineProxy> {
  const socketPath = (process.env['DOCKER_HOST'] ?? '').replace(/^unix:\/\//, '') || '/var/run/docker.sock'
  const proxy = { dockerHost: `unix://${path}`, hook: (() => 'pass') as Hook }
  // Its own, so that no connection outlives the proxy and with it the test.
  const engine = new Agent({ keepAlive: true })
  // The engine takes request lines of up to 1 MiB, and gets them: dockerode repeats a create's body in its query.
  const server = createServer({ maxHeaderSize: 1 << 20 }, (incoming, outgoing) => pass(incoming, outgoing, { socketPath, agent: engine }, proxy))
  server.listen(path)
  await once(server, 'listening')
  return Object.assign(proxy, {
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
      engine.destroy()
    },
  })
}

function pass(incoming: IncomingMessage, outgoing: ServerResponse, to: { socketPath: string; agent: Agent }, proxy: { hook: Hook }): void {
  const call = { method: incoming.method ?? '', path: (incoming.url ?? '').replace(/^\/v[\d.]+/, '') }
  for (const side of [incoming, outgoing]) side.on('error', () => undefined)
  if (proxy.hook(call, 'before') === 'drop') return void incoming.destroy()
  const onward = request({ ...to, method: incoming.method, path: incoming.url, headers: incoming.headers })
  onward.on('error', () => outgoing.destroy())
  onward.on('response', (answer) => {
    if (proxy.hook(call, 'after') === 'drop') return void answer.resume()
    outgoing.writeHead(answer.statusCode ?? 502, answer.headers)
    outgoing.flushHeaders()
    answer.pipe(outgoing)
  })
  // A server that dies in the middle of a call does not stop the engine from carrying it out.
  outgoing.on('close', () => {
    if (/^\/events/.test(call.path)) onward.destroy()
  })
  // A call that was never whole is not carried out, and the engine is not left waiting for the rest.
  incoming.on('close', () => {
    if (!incoming.complete) onward.destroy()
  })
  incoming.pipe(onward)
}
