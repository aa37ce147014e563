/**
 * What a sandbox does in the egress bench, inside its network namespace: `node sandbox-client.ts <resolver>`. Orders on standard input, one
 * line of JSON in answer to each:
 *   teach <prefix> <count>       asks for so many names below .bench.example, 64 at a time                     → how many addresses
 *   first <prefix> <count>       asks for a new name, connects to its address, the next                        → ms of each
 *   upload|download <seconds>    one TCP stream to the address of a name                                       → bytes a second
 */
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { createInterface } from 'node:readline'
import { dnsQuestion } from '../dns-message.ts'
import { streamPorts } from './sandbox-server.ts'

const resolver = createSocket('udp4')
resolver.connect(53, process.argv[2])
await once(resolver, 'connect')
const waiting = new Map<number, (address: string) => void>()
const seen = new Set<string>()
let lastId = 0

resolver.on('message', (reply) => {
  const id = reply.readUInt16BE(0)
  const rcode = reply[3]! & 15
  if (rcode !== 0) throw new Error(`rcode ${rcode}`)
  waiting.get(id)?.([...reply.subarray(-4)].join('.'))
  waiting.delete(id)
})

function ask(name: string): Promise<string> {
  const query = dnsQuestion(`${name}.bench.example`, 1)
  const id = lastId = (lastId + 1) & 0xffff
  query.writeUInt16BE(id, 0)
  const answered = new Promise<string>((resolve) => waiting.set(id, resolve))
  resolver.send(query)
  const timer = setTimeout(() => { throw new Error(`no answer for ${name}`) }, 10_000)
  void answered.then(() => clearTimeout(timer))
  return answered
}

async function open(address: string, port: number): Promise<Socket> {
  const socket = connect({ host: address, port, noDelay: true })
  await once(socket, 'connect')
  return socket
}

async function teach(prefix: string, count: number): Promise<number> {
  for (let i = 0; i < count; i += 64) for (const address of await Promise.all(Array.from({ length: Math.min(64, count - i) }, (_, k) => ask(`${prefix}${i + k}`)))) seen.add(address)
  return seen.size
}

async function first(prefix: string, count: number): Promise<number[]> {
  const times: number[] = []
  for (let i = 0; i < count; i++) {
    const begin = performance.now()
    const address = await ask(`${prefix}${i}`)
    const socket = await open(address, streamPorts.sink)
    const took = performance.now() - begin
    socket.destroy()
    // Two names with one address: its second use is not a first one.
    if (!seen.has(address)) times.push(took)
    seen.add(address)
  }
  return times
}

async function stream(kind: 'upload' | 'download', seconds: number): Promise<number> {
  const socket = await open(await ask('stream'), kind === 'upload' ? streamPorts.sink : streamPorts.source)
  let received = 0
  let over = false
  if (kind === 'download') socket.on('data', (chunk) => (received += chunk.length))
  else {
    const block = Buffer.alloc(1 << 18)
    const write = (): void => {
      while (!over && socket.write(block));
    }
    socket.on('drain', write)
    write()
  }
  const begin = performance.now()
  await new Promise((resolve) => setTimeout(resolve, seconds * 1000))
  over = true
  const bytes = kind === 'upload' ? socket.bytesWritten - socket.writableLength : received
  const took = (performance.now() - begin) / 1000
  socket.destroy()
  return bytes / took
}

for await (const line of createInterface({ input: process.stdin })) {
  const [order = '', one = '', two = ''] = line.split(' ')
  const answer = order === 'teach' ? await teach(one, Number(two)) : order === 'first' ? await first(one, Number(two)) : await stream(order as 'upload', Number(one))
  process.stdout.write(`${JSON.stringify(answer)}\n`)
}
process.exit()
