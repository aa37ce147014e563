/**
 * Reference row: undici behind node:http and nothing else (no routes, no checks, no header rules, no log). What our own code adds is the
 * difference to this. `node undici-proxy.ts <port> <backend port>`.
 */
import { createServer } from 'node:http'
import { Pool, type Dispatcher } from 'undici'

const [port, backendPort] = process.argv.slice(2).map(Number)
const pool = new Pool(`http://127.0.0.1:${backendPort}`, { connections: 64, pipelining: 1 })

createServer((request, response) => {
  let controller: Dispatcher.DispatchController | null = null
  response.on('drain', () => controller?.resume())
  // A client that left in the middle must not keep its upstream connection paused for ever.
  response.on('close', () => { if (!response.writableFinished) controller?.abort(new Error('the client went away')) })
  pool.dispatch({ method: request.method as Dispatcher.HttpMethod, path: request.url ?? '/', headers: { host: request.headers.host ?? '' }, body: null }, {
    onRequestStart: (started) => { controller = started },
    onResponseStart: (_, status, headers) => { response.writeHead(status, headers) },
    onResponseData: (started, chunk) => { if (!response.write(chunk)) started.pause() },
    onResponseEnd: () => { response.end() },
    onResponseError: (_, error) => { response.destroy(error) },
  })
}).listen(port, '127.0.0.1')
