/**
 * What one side of a tunnel sends and the other does not read waits at the sender: the gateway holds a piece of it, however much there is,
 * and loses nothing. The gateway is a process of its own here, so that its memory is its own.
 */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { listening, start } from './program.ts'
import { eventually, startGateway, startRaw } from './support.ts'

const MiB = 1024 * 1024
/** The most a kernel's buffer of this machine holds, bytes. */
const bufferOf = (kind: 'rmem' | 'wmem'): number => Number(readFileSync(`/proc/sys/net/ipv4/tcp_${kind}`, 'utf8').trim().split(/\s+/).at(-1))
/** On the way: two connections with a buffer at both ends, seldom full, and what the gateway holds. */
const mostHeld = 2 * (bufferOf('rmem') + bufferOf('wmem')) + 8 * MiB
const size = Math.max(64 * MiB, Math.ceil((1.5 * mostHeld) / MiB) * MiB)
/** In the gateway: what it read and passed on until then, and has not collected yet. */
const mostGrown = 20 * MiB

const folder = mkdtempSync(join(tmpdir(), 'tunnel-flow-'))
t.teardown(() => rmSync(folder, { recursive: true }))
const routes = join(folder, 'routes.json')
writeFileSync(routes, JSON.stringify({ sandboxes: [{ id: 'a', host: '127.0.0.1' }] }))

/** Resident memory of a process, bytes. */
function memoryOf(pid: number | undefined): number {
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) * 1024
}

/** Reads up to the end of a head, and nothing behind it. */
function readHead(socket: Socket): Promise<void> {
  return new Promise((resolve) => {
    let text = ''
    const read = (chunk: Buffer): void => {
      text += chunk.toString('latin1')
      const end = text.indexOf('\r\n\r\n')
      if (end === -1) return
      socket.off('data', read).pause()
      if (text.length > end + 4) socket.unshift(Buffer.from(text.slice(end + 4), 'latin1'))
      resolve()
    }
    socket.on('data', read)
  })
}

/** Sends numbered words, so that none of them can be missing or in another's place, as fast as they are taken, and then the end. */
class Sender {
  /** Bytes that the kernel took. */
  taken = 0
  readonly digest: Promise<string>

  constructor(socket: Socket) {
    this.digest = this.#send(socket)
  }

  async #send(socket: Socket): Promise<string> {
    const hash = createHash('sha256')
    for (let at = 0; at < size; ) {
      const words = new Uint32Array(16 * 1024)
      for (let i = 0; i < words.length; i++) words[i] = at / 4 + i
      const piece = Buffer.from(words.buffer)
      at += piece.length
      hash.update(piece)
      if (!socket.write(piece, () => (this.taken += piece.length))) await once(socket, 'drain')
    }
    socket.end()
    return hash.digest('hex')
  }

  /** What was taken when nothing more was for a while; all of it, if nothing holds it up. */
  async stopped(): Promise<number> {
    for (let before = -1; before !== this.taken || before === 0; await delay(300)) before = this.taken
    return this.taken
  }
}

async function readAll(socket: Socket): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of socket) hash.update(chunk as Buffer)
  return hash.digest('hex')
}

for (const [name, from, answersLate] of [
  ['the sandbox sends, the client does not read', 'sandbox', false],
  ['the client sends, the sandbox does not read', 'client', false],
  ['the client sends, the sandbox has not even answered', 'client', true],
] as const) {
  t.test(name, { timeout: 20_000 }, async (t) => {
    await using program = start('--port', '0', '--mode', 'uri', '--provider', 'static', '--routes', routes, '--allow-loopback-upstreams', '--access-log', 'off')
    const port = await listening(program)
    const accepted = Promise.withResolvers<Socket>()
    await using upstream = await startRaw(accepted.resolve)
    const client = connect({ port, host: '127.0.0.1', allowHalfOpen: true })
    client.write(`GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`)
    const sandbox = await accepted.promise
    await readHead(sandbox)
    const answer = (): void => void sandbox.write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n')
    if (!answersLate) {
      answer()
      await readHead(client)
    }
    const before = memoryOf(program.child.pid)
    const sender = new Sender(from === 'sandbox' ? sandbox : client)
    const held = await sender.stopped()
    const grown = memoryOf(program.child.pid) - before
    t.ok(held < mostHeld, `${(held / MiB).toFixed(1)} of ${size / MiB} MiB could be sent`)
    t.ok(grown < mostGrown, `the gateway grew by ${(grown / MiB).toFixed(1)} MiB`)
    if (answersLate) answer()
    t.equal(await readAll(from === 'sandbox' ? client : sandbox), await sender.digest, 'and all of it arrives')
    client.destroy()
  })
}

t.test('what nobody takes for the idle timeout is given up, and a tunnel that is only quiet is not', { timeout: 30_000 }, async (t) => {
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'uri', idleTimeout: 1_000 })
  const sandboxes: Socket[] = []
  await using upstream = await startRaw((socket) => {
    sandboxes.push(socket)
    socket.once('data', () => socket.pause().write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'))
  })
  const open = async (): Promise<Socket> => {
    const client = connect({ port: gateway.port, host: '127.0.0.1', allowHalfOpen: true })
    client.on('error', () => undefined)
    client.write(`GET /a/${upstream.port}/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n`)
    await readHead(client)
    return client
  }
  const stalled = async (from: Socket): Promise<void> => {
    const sender = new Sender(from)
    sender.digest.catch(() => undefined)
    await sender.stopped()
  }
  const quiet = await open()
  const sending = await open()
  // Nobody can see this client go while its bytes wait for the sandbox.
  await stalled(sending)
  sending.resetAndDestroy()
  const reading = await open()
  await stalled(sandboxes[2] as Socket)
  await eventually(() => gateway.lines.length === 2, 'both stalled tunnels have ended', 15_000)
  t.equal(quiet.destroyed || quiet.readableEnded, false, 'the quiet one goes on')
  sandboxes[0]!.resume()
  const echo = once(sandboxes[0] as Socket, 'data')
  quiet.write('still here')
  t.equal(String((await echo)[0]), 'still here')
  for (const client of [quiet, reading]) client.destroy()
})
