/**
 * What V8's collector has to do while requests pass through the program: young collections keep next to nothing, and bodies start no whole
 * ones. Nothing here looks at times.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { sized } from '#test/support/size.ts'
import { eventually, startRaw, type TestServer } from './support.ts'

const main = new URL('../../gateway/main.ts', import.meta.url).pathname
const folder = mkdtempSync(join(tmpdir(), 'gateway-collections-'))
t.teardown(() => rmSync(folder, { recursive: true }))

type Collections = { /** MB in use behind each young collection. */ kept: number[]; whole: number }
type Traced = AsyncDisposable & { readonly port: number; collections(): Collections }

/** The program with a line for each collection of its heap. */
async function startTraced(): Promise<Traced> {
  const routes = join(folder, 'routes.json')
  writeFileSync(routes, JSON.stringify({ sandboxes: [{ id: 'a', host: '127.0.0.1' }] }))
  const argv = ['--trace-gc', main, '--port=0', '--host=127.0.0.1', '--mode=uri', '--allow-loopback-upstreams', '--provider=static', `--routes=${routes}`, `--access-log=${join(folder, 'access.log')}`]
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'pipe'], env: { PATH: process.env['PATH'] } })
  const closed = once(child, 'close')
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk: Buffer) => (output += chunk.toString()))
  await eventually(() => /"msg":"listening".*\n/.test(output) || child.exitCode !== null, 'listening', 15_000)
  const port = Number(/"port":(\d+).*"msg":"listening"|"msg":"listening".*"port":(\d+)/.exec(output)?.slice(1).find(Boolean))
  if (!(port > 0)) throw new Error(output)
  return {
    port,
    collections() {
      const kept = Array.from(output.matchAll(/: Scavenge [^>]*-> ([\d.]+) \(/g), ([, megabytes]) => Number(megabytes))
      return { kept, whole: output.match(/: Mark-Compact/g)?.length ?? 0 }
    },
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await closed
    },
  }
}

/** A client that sends one request after the other over one connection, and keeps nothing of the answers. */
function askOften(port: number, target: string, times: number, bodyLength: number): Promise<void> {
  const request = `GET ${target} HTTP/1.1\r\nHost: x\r\n\r\n`
  return new Promise((resolve, reject) => {
    let answered = 0
    let missing = -1
    const onBytes = (size: number, bytes: Uint8Array): boolean => {
      let at = 0
      if (missing === -1) {
        // The gateway hands a head over in one piece, and one that came in two would be no answer to this.
        const head = Buffer.from(bytes.buffer, bytes.byteOffset, size).indexOf('\r\n\r\n')
        if (head === -1) return socket.destroy(new Error('no head')), false
        at = head + 4
        missing = bodyLength
      }
      missing -= size - at
      if (missing < 0) return socket.destroy(new Error('more than was asked for')), false
      if (missing > 0) return true
      missing = -1
      if (++answered < times) socket.write(request)
      else socket.destroy()
      return true
    }
    const socket = connect({ port, host: '127.0.0.1', noDelay: true, onread: { buffer: Buffer.alloc(256 * 1024), callback: onBytes } })
    socket.on('error', reject)
    socket.on('close', () => (answered === times ? resolve() : reject(new Error(`the connection ended behind ${answered} answers`))))
    socket.write(request)
  })
}

/** Answers every request with the same pieces. */
function startSandbox(pieces: readonly (Buffer | string)[]): Promise<TestServer> {
  return startRaw((socket) => {
    socket.setNoDelay(true)
    socket.on('end', () => socket.end())
    socket.on('data', () => {
      for (const piece of pieces) socket.write(piece)
    })
  })
}

/** Requests of many connections at once: a table of what is under way grows large enough to live through collections only then. */
const connections = 256

t.test('young collections find next to nothing that outlives its request', { timeout: 60_000 }, async (t) => {
  await using sandbox = await startSandbox(['HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok'])
  await using gateway = await startTraced()
  const times = Math.ceil(sized(40_000, 200_000) / connections)
  await Promise.all(Array.from({ length: connections }, () => askOften(gateway.port, `/a/${sandbox.port}/`, times, 2)))
  const { kept } = gateway.collections()
  t.ok(kept.length >= 5, `${kept.length} of them were seen`)
  const later = kept.slice(kept.length / 2)
  const climbs = later.slice(1).map((after, index) => Math.max(0, after - (later[index] as number)))
  const climb = climbs.reduce((sum, one) => sum + one, 0) / climbs.length
  // Some 10 KB for each of them; the table of relays that was a Set left tens of megabytes.
  t.ok(climb < 6, `each leaves ${climb.toFixed(1)} MB more behind than the one before it: ${kept.join(' ')}`)
})

t.test('bodies that pass through start no whole collections', { timeout: 60_000 }, async (t) => {
  const body = Buffer.alloc(64 * 1024)
  await using sandbox = await startSandbox([`HTTP/1.1 200 OK\r\nContent-Length: ${body.length}\r\n\r\n`, body])
  await using gateway = await startTraced()
  const times = sized(2048, 4096)
  await Promise.all(Array.from({ length: 16 }, () => askOften(gateway.port, `/a/${sandbox.port}/`, times, body.length)))
  const { kept, whole } = gateway.collections()
  t.ok(kept.length > 0, `${kept.length} young ones were seen`)
  t.ok(whole <= 5, `${whole} whole ones for ${times} MiB`)
})
