/**
 * The servers of the tests' internet: one process inside its network namespace. DNS on port 53, HTTP on 80 and 8080, and an echo
 * on every other TCP and UDP port (internet-rules.ts sends those here), all of them on every claimed address. Each command is
 * one JSON line in (`{"id", "do", …}`), each answer one JSON line out; the process ends with its standard input.
 */
import DNS from 'dns2'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { createServer as createHttpServer } from 'node:http'
import { createServer as createTcpServer, type AddressInfo, type Socket } from 'node:net'
import { createInterface } from 'node:readline'
import { answerFromZones, type Zones } from './zones.ts'

/** One DNS question as it came, but for its name in lower case: the sidecar mixes it. */
export type SeenQuestion = { readonly name: string; readonly type: number; readonly transport: 'udp' | 'tcp'; readonly from: string }
/**
 * One conversation. `address` and `port` are where the other side meant to go for HTTP; for the echo they are the echo's own
 * (the kernel redirected it), the flows of internet.ts tell the real ones. `head`: the first 256 bytes, as latin1.
 */
export type SeenExchange = {
  readonly server: 'http' | 'tcp-echo' | 'udp-echo'
  readonly from: string
  readonly address: string
  readonly port: number
  bytes: number
  head: string
  readonly host?: string
}
export type Command = { readonly id: number } & (
  | { readonly do: 'zones'; readonly zones: Zones }
  | { readonly do: 'seen' }
  | { readonly do: 'forget' }
)

export const echoPort = 7
export const httpPorts = [80, 8080]

let zones: Zones = {}
let questions: SeenQuestion[] = []
let exchanges: SeenExchange[] = []
/** More than any test makes: beyond it only the kernel's counters go on. */
const KEPT = 100_000

if (process.argv[1] === import.meta.filename) await serve()

async function serve(): Promise<void> {
  const udp = createSocket('udp6')
  const tcpEcho = createTcpServer({ allowHalfOpen: true }, echo)
  const listening: Promise<unknown>[] = [once(udp, 'listening'), once(tcpEcho, 'listening')]
  udp.on('message', (bytes, peer) => {
    keep({ server: 'udp-echo', from: plain(peer.address), address: '', port: echoPort, bytes: bytes.length, head: headOf(bytes) })
    udp.send(bytes, peer.port, peer.address, () => undefined)
  })
  udp.bind(echoPort, '::')
  tcpEcho.listen(echoPort, '::')
  for (const port of httpPorts) listening.push(listenHttp(port))
  listening.push(listenDns())
  await Promise.all(listening)
  const lines = createInterface({ input: process.stdin })
  lines.on('line', (line) => obey(JSON.parse(line) as Command))
  lines.on('close', () => process.exit(0))
  process.stdout.write(`${JSON.stringify({ id: 0 })}\n`)
}

function obey(command: Command): void {
  const answer: { id: number; questions?: SeenQuestion[]; exchanges?: SeenExchange[] } = { id: command.id }
  if (command.do === 'zones') zones = command.zones
  if (command.do === 'seen') Object.assign(answer, { questions, exchanges })
  if (command.do === 'forget') {
    questions = []
    exchanges = []
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`)
}

async function listenDns(): Promise<unknown[]> {
  const udp = new DNS.UDPServer({ type: 'udp6' })
  const tcp = new DNS.TCPServer()
  udp.on('request', (request, send, peer) => reply(request, send, { transport: 'udp', from: plain((peer as AddressInfo).address) }))
  tcp.on('request', (request, send, peer) => reply(request, send, { transport: 'tcp', from: plain((peer as Socket).remoteAddress) }))
  for (const server of [udp, tcp]) server.on('requestError', () => undefined)
  const ready = [once(udp, 'listening'), once(tcp, 'listening')]
  udp.bind(53, '::')
  tcp.listen(53, '::')
  return Promise.all(ready)
}

function reply(request: DNS.Packet, send: (answer: DNS.Packet) => unknown, peer: Pick<SeenQuestion, 'transport' | 'from'>): void {
  const question = request.questions[0]
  if (question === undefined) return
  if (questions.length < KEPT) questions.push({ name: question.name.toLowerCase(), type: question.type, ...peer })
  const answer = new DNS.Packet()
  answer.header = { ...request.header, qr: 1, aa: 0, ra: 1 } as DNS.Packet.Header
  answer.questions = [question]
  if (answerFromZones(zones, question, answer)) void Promise.resolve(send(answer)).catch(() => undefined)
}

async function listenHttp(port: number): Promise<unknown> {
  const server = createHttpServer((request, response) => {
    const address = plain(request.socket.localAddress)
    const line = `${request.method} ${request.url}`
    const seen: SeenExchange = { server: 'http', from: plain(request.socket.remoteAddress), address, port, bytes: 0, head: line, host: request.headers.host ?? '' }
    keep(seen)
    request.on('error', () => undefined).on('data', (chunk: Buffer) => (seen.bytes += chunk.length))
    request.on('end', () => response.writeHead(200, { 'content-type': 'text/plain' }).end(`internet ${address} ${line}\n`))
  })
  server.on('clientError', (_error, socket) => socket.destroy())
  server.listen(port, '::')
  return once(server, 'listening')
}

function echo(socket: Socket): void {
  const seen: SeenExchange = { server: 'tcp-echo', from: plain(socket.remoteAddress), address: plain(socket.localAddress), port: echoPort, bytes: 0, head: '' }
  keep(seen)
  socket.on('error', () => undefined)
  socket.on('data', (chunk: Buffer) => {
    seen.bytes += chunk.length
    seen.head += headOf(chunk).slice(0, 256 - seen.head.length)
    socket.write(chunk)
  })
  socket.on('end', () => socket.end())
}

function keep(seen: SeenExchange): void {
  if (exchanges.length < KEPT) exchanges.push(seen)
}

function headOf(bytes: Buffer): string {
  return bytes.toString('latin1', 0, 256)
}

/** IPv4 peers of a dual-stack socket read as ::ffff:1.2.3.4. */
function plain(address: string | undefined): string {
  return (address ?? '').replace(/^::ffff:/, '')
}
