/**
 * The server is killed with -9 at every moment of a delete, and started again (kill-server.test.ts does the same to a create). Docker's own
 * events say when; the product knows nothing of this test. Whatever the moment: the sandbox is complete and has its rules, or there is nothing of it.
 */
import { once } from 'node:events'
import t from 'tap'
import { request } from 'undici'
import { headerNames, labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import type { Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Stack } from '#test/support/stack.ts'

t.setTimeout(600_000)
await needs('root', 'docker', 'nft')

/** Nothing here leaves the sandbox's own bridge, so no internet is needed. */
const nowhere = { dns: '198.51.100.53:53', fence: async () => undefined } as Pick<Internet, 'dns' | 'fence'> as Internet

t.test('killed at each event of a delete', { timeout: 300_000 }, async (t) => {
  await using stack = await startStack({ internet: nowhere })
  let point = 0
  for (let over = false; !over; point++) {
    const { id } = await stack.create({ networkPolicy: { egress: [] }, entrypoint: ['sleep', '3600'] })
    const events = await watchEvents(stack.instance)
    const deleted = stack.api.call('DELETE', `/v1/sandboxes/${id}`).then((reply) => reply.status, () => 0)
    over = await Promise.race([deleted.then((status) => status === 204), events.atEvent(point).then(() => false)])
    await stack.server.stop('SIGKILL')
    events.close()
    await deleted
    await stack.startServer()
    const left = await settled(stack)
    t.equal(left.faults.join('; '), '', `event ${point}${over ? ' (answered)' : ''}: whole or gone`)
    await removeAll(stack)
  }
  t.ok(point >= 4, `${point} kill points`)
})

/** Waits until the server has compared everything with Docker, then says what is wrong with what there is. */
async function settled(stack: Stack): Promise<{ sandboxes: number; faults: string[] }> {
  await eventually('the server is ready', async () => ((await request(`${stack.api.url}/health/ready`).then(async (answer) => (await answer.body.dump(), answer.statusCode))) === 200 ? true : undefined))
  const faults: string[] = []
  const sandboxes = (await stack.api.list()).filter((sandbox) => sandbox.status.state !== 'Failed')
  const containers = await stack.containers()
  for (const sandbox of sandboxes) {
    if (sandbox.status.state !== 'Running') faults.push(`${sandbox.id} is ${sandbox.status.state}`)
    const main = containers.find((container) => container.Labels[labels.id] === sandbox.id)
    const sidecar = containers.find((container) => container.Labels[labels.egressSidecarFor] === sandbox.id)
    if (main?.State !== 'running' || sidecar?.State !== 'running') faults.push(`${sandbox.id}: main ${main?.State}, sidecar ${sidecar?.State}`)
    else if (!(await enforces(sidecar.Id, main.Labels[labels.egressAuthToken] ?? ''))) faults.push(`${sandbox.id}: its sidecar does not enforce`)
  }
  const known = new Set(sandboxes.map((sandbox) => sandbox.id))
  for (const { Labels, State, Names } of containers) {
    if (!known.has(Labels[labels.id] ?? Labels[labels.egressSidecarFor] ?? '')) faults.push(`orphan ${Names.join()} (${State})`)
  }
  return { sandboxes: sandboxes.length, faults }
}

async function enforces(sidecar: string, token: string): Promise<boolean> {
  const { NetworkSettings } = await docker.getContainer(sidecar).inspect()
  const address = Object.values(NetworkSettings.Networks)[0]?.IPAddress ?? ''
  const { statusCode, body } = await request(`http://${address}:18080/healthz`, { headers: { [headerNames.egressAuth]: token } })
  await body.dump()
  return statusCode === 200
}

async function removeAll(stack: Stack): Promise<void> {
  for (const { id } of await stack.api.list()) await stack.api.call('DELETE', `/v1/sandboxes/${id}`)
}

/** Container events of an instance as they come: create, start, kill, die, destroy … */
async function watchEvents(instance: string): Promise<{ atEvent(index: number): Promise<void>; close(): void }> {
  const stream = await docker.getEvents({ filters: JSON.stringify({ type: ['container'], label: [`${labels.instance}=${instance}`] }) })
  let seen = 0
  stream.setEncoding('utf8')
  stream.on('data', (chunk: string) => (seen += chunk.split('\n').length - 1))
  return {
    async atEvent(index) {
      while (seen <= index) await once(stream, 'data')
    },
    close: () => (stream as unknown as { destroy(): void }).destroy(),
  }
}
