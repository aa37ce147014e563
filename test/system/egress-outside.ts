/**
 * The internet of the egress namespace tests: runs inside a network namespace that owns the addresses, answers DNS and every TCP and
 * UDP port it is told to, and prints one JSON line for whatever reaches it.
 *   node egress-outside.ts <its IPv4> <its IPv6> <IPv4 of every other name> <port,port,…> [folder with key.pem and cert.pem]
 * With a folder the TCP ports also take TLS, told by its first byte.
 */
import { createSocket } from 'node:dgram'
import { readFileSync } from 'node:fs'
import { createServer, type Socket } from 'node:net'
import { createServer as createTlsServer } from 'node:tls'
import dns2 from 'dns2'

const [v4 = '', v6 = '', site = '', ports = '', folder = ''] = process.argv.slice(2)
const { Packet } = dns2
type Question = { name: string; type: number }
type Answer = object
const report = (line: object): void => void process.stdout.write(`${JSON.stringify(line)}\n`)

/** Addresses of `rotating` told so far. */
let turn = 0

/**
 * `ip-198-51-100-9.…` has that address, `alias-<name>.…` is an alias of `<name>.other.example`, `many-<n>.…` has n addresses,
 * `rotating.…` four others each time, of 500 in all, `v6.…` an IPv6 one.
 */
function answersTo({ name, type }: Question): Answer[] {
  const first = name.split('.')[0]?.toLowerCase() ?? ''
  const ttl = /^ttl(\d+)/.exec(first)?.[1] ?? '30'
  const address = (owner: string, text: string): Answer => ({ name: owner, type: 1, class: 1, ttl: Number(ttl), address: text }) 
  if (type === 28) return first.startsWith('v6') ? [{ name, type: 28, class: 1, ttl: 30, address: v6 } ] : []
  if (type !== 1) return []
  const literal = /^ip-(\d+)-(\d+)-(\d+)-(\d+)$/.exec(first)
  if (literal !== null) return [address(name, literal.slice(1).join('.'))]
  const many = /^many-(\d+)$/.exec(first)?.[1]
  if (many !== undefined) return Array.from({ length: Number(many) }, (_, i) => address(name, `198.18.${i >> 8}.${i & 255}`))
  if (first === 'rotating') return Array.from({ length: 4 }, () => address(name, `198.18.${128 + ((turn % 500) >> 8)}.${turn++ % 500 & 255}`))
  if (first.startsWith('alias-')) {
    const target = `${first.slice(6)}.other.example`
    return [{ name, type: 5, class: 1, ttl: 30, domain: target } , address(target, site)]
  }
  return [address(name, site)]
}

const server = dns2.createServer({
  udp: true,
  tcp: true,
  handle(request, send) {
    const response = Packet.createResponseFromRequest(request)
    const question = request.questions[0]
    if (question !== undefined) {
      report({ saw: 'dns', name: question.name, type: question.type })
      response.answers.push(...(answersTo(question) as never[]))
    }
    send(response)
  },
})
server.on('requestError', (error: Error) => report({ saw: 'dns-error', text: String(error) }))
await server.listen({ udp: { port: 53, address: v4 }, tcp: { port: 53, address: v4 } })

for (const port of ports.split(',').map(Number)) {
  const talk = (socket: Socket, data: Buffer, secure: boolean): void => {
    const text = data.toString('latin1')
    if (text.startsWith('POST ')) {
      report({ saw: 'post', to: socket.localAddress, port, text, secure })
      socket.write('HTTP/1.1 204 No Content\r\n\r\n')
      return
    }
    report({ saw: 'bytes', to: socket.localAddress, port, length: data.length })
    socket.write(data)
  }
  const secured = folder === '' ? null : createTlsServer({ key: readFileSync(`${folder}/key.pem`), cert: readFileSync(`${folder}/cert.pem`) }, (socket) => {
    socket.on('error', () => socket.destroy()).on('data', (data) => talk(socket, data, true))
  })
  const tcp = createServer((socket) => {
    report({ saw: 'tcp', to: socket.localAddress, port })
    socket.on('error', () => socket.destroy())
    socket.once('data', (data) => {
      if (secured !== null && data[0] === 0x16) {
        socket.pause().unshift(data)
        secured.emit('connection', socket)
        return
      }
      talk(socket, data, false)
      socket.on('data', (more) => talk(socket, more, false))
    })
  })
  tcp.listen({ port, host: '::' })
  for (const type of ['udp4', 'udp6'] as const) {
    const udp = createSocket({ type, ipv6Only: type === 'udp6' })
    udp.on('message', (data, peer) => {
      report({ saw: 'udp', port, from: peer.address, length: data.length })
      udp.send(data, peer.port, peer.address)
    })
    udp.bind(port)
  }
}
report({ saw: 'start' })
