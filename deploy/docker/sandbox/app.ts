/**
 * The application inside the trial sandbox: a little of everything a gateway has to carry. HTTP on $PORT (8080), `/` who I am, `/echo` the
 * request as it arrived, `/sse` three events, `/bytes/<n>` a known body, `/upload` a checksum, WebSocket echo at `/ws`.
 */
import { createHash } from 'node:crypto'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { hostname } from 'node:os'
import { WebSocketServer } from 'ws'

const eventInterval = 300
const blockLength = 65_536

/** Byte i of `/bytes/<n>` is i mod 251: a prime, so that no block boundary repeats it. */
const pattern = Buffer.alloc(blockLength + 251, Buffer.from(Array.from({ length: 251 }, (_, i) => i)))

function handle(request: IncomingMessage, response: ServerResponse): void {
  const path = (request.url ?? '/').split('?', 1)[0]!
  if (path === '/') return sendText(response, 200, `sallyport sandbox ${hostname()}\n`)
  if (path === '/echo') return sendJson(response, { method: request.method, url: request.url, headers: request.rawHeaders })
  if (path === '/sse') return sendEvents(response)
  if (path === '/upload') return void receive(request, response)
  const bytes = /^\/bytes\/(\d{1,11})$/.exec(path)
  if (bytes !== null) return sendBytes(response, Number(bytes[1]))
  sendText(response, 404, 'not found\n')
}

function sendText(response: ServerResponse, status: number, text: string): void {
  response.writeHead(status, { 'content-type': 'text/plain; charset=utf-8', 'content-length': Buffer.byteLength(text) }).end(text)
}

function sendJson(response: ServerResponse, value: unknown): void {
  const text = JSON.stringify(value)
  response.writeHead(200, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }).end(text)
}

function sendEvents(response: ServerResponse): void {
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' })
  let sent = 0
  const timer = setInterval(() => {
    response.write(`id: ${++sent}\ndata: event ${sent} at ${Date.now()}\n\n`)
    if (sent === 3) response.end()
  }, eventInterval)
  response.once('close', () => clearInterval(timer))
}

function sendBytes(response: ServerResponse, length: number): void {
  response.writeHead(200, { 'content-type': 'application/octet-stream', 'content-length': length })
  let sent = 0
  const write = (): void => {
    while (sent < length && !response.destroyed) {
      const block = Math.min(length - sent, blockLength)
      const from = sent % 251
      sent += block
      if (!response.write(pattern.subarray(from, from + block))) return
    }
    response.end()
  }
  response.on('drain', write)
  write()
}

async function receive(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const hash = createHash('sha256')
  let bytes = 0
  try {
    for await (const chunk of request) {
      hash.update(chunk as Buffer)
      bytes += (chunk as Buffer).length
    }
    sendJson(response, { bytes, sha256: hash.digest('hex') })
  } catch {
    response.destroy()
  }
}

const server = createServer({ requestTimeout: 0 }, handle)
const sockets = new WebSocketServer({ noServer: true })
server.on('upgrade', (request, socket, head) => {
  if ((request.url ?? '').split('?', 1)[0] !== '/ws') {
    socket.end('HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n')
    return
  }
  sockets.handleUpgrade(request, socket, head, (client) => {
    client.on('error', () => client.terminate())
    client.on('message', (data, isBinary) => client.send(data, { binary: isBinary }))
  })
})
server.listen(Number(process.env['PORT'] ?? 8080), '0.0.0.0', () => console.log(`listening on ${process.env['PORT'] ?? 8080}`))
for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => process.exit(0))
