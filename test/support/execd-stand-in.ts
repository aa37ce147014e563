/**
 * Plays execd inside a sandbox, as far as the official SDKs need it: `/ping`, `/metrics`, `/command` (events, one JSON object and a
 * blank line each) and `/proxy/<port>/…` (HTTP and WebSocket, to loopback). It is also the spy: every request it sees is written
 * down with all its header fields, for a test to look through for secrets that have no business in a sandbox.
 */
import { appendFileSync } from 'node:fs'
import { createServer, request as httpRequest, type IncomingMessage, type ServerResponse } from 'node:http'
import { connect } from 'node:net'
import { cpus, freemem, totalmem } from 'node:os'
import type { Duplex } from 'node:stream'
import { createInterface } from 'node:readline'
import { execa } from 'execa'

const port = 44772
/** One JSON object a line: first the environment, then each request. */
const record = '/tmp/execd-seen.jsonl'
const mebibyte = 1024 * 1024

function note(what: object): void {
  appendFileSync(record, `${JSON.stringify(what)}\n`)
}

function handle(request: IncomingMessage, response: ServerResponse): void {
  const path = (request.url ?? '/').split('?', 1)[0]!
  note({ method: request.method, url: request.url, headers: request.rawHeaders })
  if (path === '/ping') return void response.writeHead(200, { 'content-length': '0' }).end()
  if (path === '/metrics') return sendJson(response, 200, metrics())
  if (path === '/command' && request.method === 'POST') return void runCommand(request, response)
  const target = readProxy(request.url ?? '/')
  if (target !== null) return proxy(request, response, target)
  sendJson(response, 404, { code: 'NOT_FOUND', message: 'not found' })
}

function metrics(): object {
  return { cpu_count: cpus().length, cpu_used_pct: 1.5, mem_total_mib: totalmem() / mebibyte, mem_used_mib: (totalmem() - freemem()) / mebibyte, timestamp: Date.now() }
}

async function runCommand(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const started = Date.now()
  const send = (event: object): void => void response.write(`${JSON.stringify({ ...event, timestamp: Date.now() })}\n\n`)
  try {
    const { command, cwd, envs } = JSON.parse(await readText(request)) as { command: string; cwd?: string; envs?: Record<string, string> }
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' })
    send({ type: 'init', text: `command-${started}` })
    const child = execa({ cwd: cwd ?? '/', env: envs ?? {}, reject: false, buffer: false, stdin: 'ignore' })`sh -c ${command}`
    createInterface({ input: child.stdout }).on('line', (text) => send({ type: 'stdout', text }))
    createInterface({ input: child.stderr }).on('line', (text) => send({ type: 'stderr', text }))
    const { exitCode = -1 } = await child
    if (exitCode === 0) send({ type: 'execution_complete', execution_time: Date.now() - started })
    else send({ type: 'error', error: { ename: 'CommandExecError', evalue: String(exitCode), traceback: [] } })
    response.end()
  } catch (error) {
    sendJson(response, 400, { code: 'INVALID_REQUEST_BODY', message: (error as Error).message })
  }
}

type Target = { readonly port: number; readonly path: string }

function readProxy(url: string): Target | null {
  const match = /^\/proxy\/(\d{1,5})(\/.*|\?.*|)$/.exec(url)
  return match === null ? null : { port: Number(match[1]), path: match[2]!.startsWith('/') ? match[2]! : `/${match[2]}` }
}

function proxy(request: IncomingMessage, response: ServerResponse, { port, path }: Target): void {
  const { connection: _hop, ...headers } = request.headers
  const upstream = httpRequest({ host: '127.0.0.1', port, path, method: request.method ?? 'GET', headers })
  upstream.on('response', (answer) => {
    response.writeHead(answer.statusCode ?? 502, answer.rawHeaders)
    answer.pipe(response)
  })
  upstream.on('error', () => (response.headersSent ? response.destroy() : void response.writeHead(502, { 'content-type': 'text/plain' }).end('Bad Gateway')))
  request.pipe(upstream)
}

/** Bytes both ways after the same head, with the path cut. */
function upgrade(request: IncomingMessage, socket: Duplex, head: Buffer): void {
  note({ method: request.method, url: request.url, headers: request.rawHeaders, upgrade: true })
  const target = readProxy(request.url ?? '/')
  if (target === null) return void socket.end('HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n')
  const upstream = connect({ host: '127.0.0.1', port: target.port }, () => {
    const fields = request.rawHeaders.reduce((text, value, index) => text + (index % 2 === 0 ? `${value}: ` : `${value}\r\n`), '')
    upstream.write(`${request.method} ${target.path} HTTP/1.1\r\n${fields}\r\n`)
    upstream.write(head)
    upstream.pipe(socket).pipe(upstream)
  })
  upstream.on('error', () => socket.destroy())
  socket.on('error', () => upstream.destroy())
}

function sendJson(response: ServerResponse, status: number, value: object): void {
  const text = JSON.stringify(value)
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }).end(text)
}

async function readText(request: IncomingMessage): Promise<string> {
  const parts: Buffer[] = []
  for await (const part of request) parts.push(part as Buffer)
  return Buffer.concat(parts).toString('utf8')
}

note({ environment: process.env })
createServer(handle).on('upgrade', upgrade).listen(port, '0.0.0.0')
