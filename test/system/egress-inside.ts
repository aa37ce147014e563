/**
 * The sandbox of the egress namespace tests: runs inside the guarded namespace and does what a line of JSON on its standard input
 * says, one answer line each: {"ask":name,…}, {"connect":address,"port":n}, {"udp":…}, {"flow":…}, {"stream":…}, {"write":n}.
 */
import { createSocket, type Socket as UdpSocket } from 'node:dgram'
import { connect, type Socket } from 'node:net'
import { createInterface } from 'node:readline'

export type Order = {
  /** Asks a resolver for a name. */
  ask?: string
  type?: number
  server?: string
  tcp?: boolean
  /** Opens a connection and closes it. */
  connect?: string
  /** Sends a datagram and waits for its echo. */
  udp?: string
  /** The same from a socket that stays, one for each address. */
  flow?: string
  port?: number
  /** Opens a connection that stays. */
  stream?: string
  /** Its address and port on our side. */
  from?: { localAddress: string; localPort: number }
  /** Writes to stream number n and waits for the echo. */
  write?: number
}

export type Told = { result: string; ms: number; rcode?: number; answers?: number; stream?: number }

const patienceMs = 1500
const streams: Socket[] = []
const flows = new Map<string, UdpSocket>()

function dnsQuery(name: string, type: number): Buffer {
  const labels = name.split('.').map((label) => Buffer.concat([Buffer.of(label.length), Buffer.from(label)]))
  return Buffer.concat([Buffer.of(0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0), ...labels, Buffer.of(0, type >> 8, type & 255, 0, 1)])
}

function udpSocket(address: string): UdpSocket {
  return createSocket(address.includes(':') ? 'udp6' : 'udp4')
}

/** @param flow socket that stays open */
function overUdp(bytes: Buffer, address: string, port: number, flow?: UdpSocket): Promise<Buffer | string> {
  return new Promise((resolve) => {
    const socket = flow ?? udpSocket(address)
    const timer = setTimeout(() => end('timeout'), patienceMs)
    const end = (outcome: Buffer | string): void => {
      clearTimeout(timer)
      socket.removeAllListeners()
      socket.on('error', () => undefined)
      if (flow === undefined) socket.close()
      resolve(outcome)
    }
    socket.once('message', end)
    socket.once('error', (error: NodeJS.ErrnoException) => end(error.code ?? 'error'))
    socket.send(bytes, port, address, (error) => {
      if (error !== null) end((error as NodeJS.ErrnoException).code ?? 'error')
    })
  })
}

async function ping(address: string, port = 80, flow?: UdpSocket): Promise<string> {
  const reply = await overUdp(Buffer.from('ping'), address, port, flow)
  return typeof reply === 'string' ? reply : 'echo'
}

function overTcp(bytes: Buffer | null, address: string, port: number): Promise<Buffer | string> {
  return new Promise((resolve) => {
    const socket = connect({ host: address, port })
    const timer = setTimeout(() => end('timeout'), patienceMs)
    const end = (outcome: Buffer | string): void => {
      clearTimeout(timer)
      socket.destroy()
      resolve(outcome)
    }
    socket.once('connect', () => (bytes === null ? end('open') : socket.write(bytes)))
    socket.once('data', end)
    socket.on('error', (error: NodeJS.ErrnoException) => end(error.code ?? 'error'))
  })
}

function write(socket: Socket | undefined): Promise<string> {
  return new Promise((resolve) => {
    if (socket === undefined || socket.destroyed) return resolve('closed')
    const timer = setTimeout(() => resolve('timeout'), patienceMs)
    const end = (outcome: string) => (): void => {
      clearTimeout(timer)
      resolve(outcome)
    }
    socket.once('data', end('echo'))
    socket.once('close', end('closed'))
    socket.write('x')
  })
}

async function obey(order: Order): Promise<Omit<Told, 'ms'>> {
  if (order.ask !== undefined) {
    const query = dnsQuery(order.ask, order.type ?? 1)
    const server = order.server ?? '198.51.100.53'
    const reply = order.tcp === true ? await overTcp(Buffer.concat([Buffer.of(0, query.length), query]), server, 53) : await overUdp(query, server, order.port ?? 53)
    if (typeof reply === 'string') return { result: reply }
    const message = order.tcp === true ? reply.subarray(2) : reply
    return { result: 'answered', rcode: (message[3] as number) & 15, answers: message.readUInt16BE(6) }
  }
  if (order.connect !== undefined) return { result: String(await overTcp(null, order.connect, order.port ?? 80)) }
  if (order.udp !== undefined) return { result: await ping(order.udp, order.port) }
  if (order.flow !== undefined) {
    const socket = flows.get(order.flow) ?? udpSocket(order.flow)
    flows.set(order.flow, socket)
    return { result: await ping(order.flow, order.port, socket) }
  }
  if (order.stream !== undefined) {
    const socket = connect({ host: order.stream, port: order.port ?? 80, ...order.from })
    socket.on('error', () => socket.destroy())
    await new Promise((resolve) => socket.once('connect', resolve).once('close', resolve))
    return { result: socket.destroyed ? 'closed' : 'open', stream: streams.push(socket) - 1 }
  }
  return { result: await write(streams[order.write ?? 0]) }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { id, orders } = JSON.parse(line) as { id: number; orders: Order[] }
  const told = await Promise.all(orders.map(async (order): Promise<Told> => {
    const started = performance.now()
    return { ...(await obey(order)), ms: performance.now() - started }
  }))
  process.stdout.write(`${JSON.stringify({ id, told })}\n`)
}
