/**
 * Runs in namespaces of its own (see server-engine-restart.test.ts), with an engine of its own that only this test uses: makes sandboxes, ends the
 * engine underneath them in several ways, and prints what it saw as one line of JSON.
 */
import { readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { request } from 'undici'
import { labels } from '#policies/wire.ts'
import { packetsTo } from '#test/support/attack.ts'
import { docker } from '#test/support/containers.ts'
import { startFence } from '#test/support/fence.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Stack } from '#test/support/stack.ts'
import { ensureEngine } from '../../deploy/engine.mjs'

const [logFile = '', images = ''] = process.argv.slice(2)
const image = 'sallyport/egress:local'
const [allowed, denied] = ['198.51.100.30', '198.51.100.31']
/** Knocks at both places for as long as it lives; ends at once when told to. */
const beacon = `process.on('SIGTERM', () => process.exit(3))
const socket = require('node:dgram').createSocket('udp4').on('error', () => undefined)
setInterval(() => ['${allowed}', '${denied}'].forEach((host) => socket.send('knock', 4444, host, () => undefined)), 20)`
const body = { image: { uri: image }, entrypoint: ['node', '-e', beacon] }
const guarded = { ...body, networkPolicy: { egress: [{ action: 'allow', target: allowed }] } }

const start = (): Promise<unknown> => ensureEngine({ dockerHost: undefined, logFile, say: () => undefined })
const ends: Record<string, () => Promise<void>> = {
  restarted: () => end('SIGTERM', '/var/run/docker.pid'),
  killed: () => end('SIGKILL', '/var/run/docker.pid'),
}

const seen: Record<string, unknown> = {}
await start()
await docker.loadImage(images)
{
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence })
  for (const [how, endEngine] of Object.entries(ends)) {
    const ids = await Promise.all([guarded, body].map(async (each) => (await stack.create(each)).id))
    await eventually('both knock', async () => (packetsTo(await fence.flows(), allowed) > 0 && packetsTo(await fence.flows(), denied) > 0) || undefined)
    await stack.api.call('DELETE', `/v1/sandboxes/${ids[1]}`)
    const paused = (await stack.create(guarded)).id
    await stack.api.call('POST', `/v1/sandboxes/${paused}/pause`)
    await fence.forget()

    await endEngine()
    const [listed, create, ready] = [await stack.api.list(), await stack.api.call('POST', '/v1/sandboxes', { ...guarded, resourceLimits: {}, timeout: 60 }), await readiness(stack)]
    await start()
    await eventually('the server has found its engine again', async () => ((await readiness(stack)) === 200 ? true : undefined), 30)
    const after = await eventually('the server knows what became of them', async () => {
      const all = await stack.api.list()
      return all.every(({ status }) => status.state !== 'Running' && status.state !== 'Paused') ? all : undefined
    }, 30).catch(() => stack.api.list())
    const containers = async (): Promise<string[]> => (await stack.containers()).map(({ Labels, State }) => `${Labels[labels.role]} ${State}`)
    // A sidecar goes right after its sandbox was seen to have ended.
    const left = await eventually('no sidecar is left', async () => {
      const all = await containers()
      return all.some((each) => each.startsWith('egress')) ? undefined : all
    }, 30).catch(containers)
    const leaked = packetsTo(await fence.flows(), denied)

    const next = await stack.create(guarded)
    await fence.forget()
    await eventually('a new one knocks', async () => packetsTo(await fence.flows(), allowed) || undefined)
    const kept = packetsTo(await fence.flows(), denied)
    for (const id of [ids[0]!, paused, next.id]) await stack.api.call('DELETE', `/v1/sandboxes/${id}`)
    seen[how] = {
      away: { listed: listed.length, create: { status: create.status, body: create.body }, ready },
      after: after.map(({ status }) => `${status.state} ${status.reason}`), left, leaked, next: kept,
      nothing: (await stack.containers()).length,
    }
  }
}
for (const file of ['/var/run/docker.pid', '/var/run/docker/containerd/containerd.pid']) await end('SIGKILL', file)
console.log(JSON.stringify(seen))

async function readiness(stack: Stack): Promise<number> {
  const answer = await request(`${stack.api.url}/health/ready`)
  await answer.body.dump()
  return answer.statusCode
}

async function end(signal: NodeJS.Signals, file: string): Promise<void> {
  const pid = Number.parseInt(readFileSync(file, 'utf8'), 10)
  process.kill(pid, signal)
  while (isAlive(pid)) await delay(20)
}

function isAlive(pid: number): boolean {
  try {
    return !/^State:\s*Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false
  }
}
