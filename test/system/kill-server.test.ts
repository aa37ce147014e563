/**
 * The lifecycle server is killed with -9 at every call it makes to Docker during a create, before the engine gets the call and after it
 * has carried it out, and started again. Whatever it left: no container that belongs to no sandbox, no sandbox that runs without
 * its rules, at no moment a packet where the policy forbids it.
 */
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { attackCommand, packetsTo } from '#test/support/attack.ts'
import { sandboxImage } from '#test/support/containers.ts'
import { startEngineProxy, type EngineCall, type EngineProxy } from '#test/support/engine-proxy.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { namePrefix } from '#test/support/leftovers.ts'
import { eventually } from '#test/support/program.ts'
import { sized } from '#test/support/size.ts'
import { randomOf } from '#test/support/random.ts'
import { startStack, type Stack } from '#test/support/stack.ts'
import { tmpdir } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(sized(235_000, 1_800_000))

const allowed = '198.51.100.30'
const denied = '198.51.100.31'
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: allowed }] }
/** Knocks at the denied place from its first moment on: a sandbox that ever ran without rules was heard there. */
const body = { image: { uri: sandboxImage }, entrypoint: attackCommand('beacon', allowed, denied), resourceLimits: {}, timeout: 600, networkPolicy }

type Point = { readonly call: number; readonly moment: 'before' | 'after' }

t.test('killed at every step of a create', async (t) => {
  await using internet = await startInternet()
  await using proxy = await startEngineProxy(join(tmpdir(), `${namePrefix}${process.pid}-engine.sock`))
  await using stack = await startStack({ internet, env: { DOCKER_HOST: proxy.dockerHost } })
  await deniedPlaceIsReal(t, internet, stack)

  // The first create also proves the engine, which is done once: the second is like all that follow.
  await callsOfCreate(proxy, stack)
  const calls = await callsOfCreate(proxy, stack)
  t.ok(calls.length >= 5, 'a create makes calls to the engine', { calls })
  await internet.forget()
  const points = calls.flatMap((call, index): Point[] => (call.method === 'GET' ? [{ call: index, moment: 'before' }] : [{ call: index, moment: 'before' }, { call: index, moment: 'after' }]))
  for (const point of points) {
    await t.test(`${point.moment} ${calls[point.call]!.method} ${calls[point.call]!.path}`, async (t) => {
      await killAt(proxy, stack, point)
      await checkWhatIsLeft(t, internet, stack)
    })
  }
  t.equal(await internet.strays(), 0)
})

t.test('killed at any time', async (t) => {
  const random = randomOf(t)
  await using internet = await startInternet()
  await using stack = await startStack({ internet })
  // With the steps above and those of a delete (server-kill.test.ts) some 20 in all; `npm run test:long` finds the moments between.
  for (let kill = 0; kill < sized(4, 60); kill++) {
    const after = random.between(0, 1500)
    await t.test(`${after} ms into a create`, async (t) => {
      const created = stack.api.call('POST', '/v1/sandboxes', body).catch(() => undefined)
      await delay(after)
      await stack.server.stop('SIGKILL')
      await created
      await checkWhatIsLeft(t, internet, stack)
    })
  }
  t.equal(await internet.strays(), 0)
})

async function deniedPlaceIsReal(t: Test, internet: Internet, stack: Stack): Promise<void> {
  const open = await stack.create({ entrypoint: body.entrypoint })
  const heard = await eventually('a sandbox without a policy is heard', async () => packetsTo(await internet.flows(), denied) || undefined)
  t.ok(heard > 0, 'the knocking is real')
  await open.remove()
}

/** The calls of one create in a quiet server, without the event stream; paths without ids, so that they can be told apart in print. */
async function callsOfCreate(proxy: EngineProxy, stack: Stack): Promise<EngineCall[]> {
  const calls: EngineCall[] = []
  proxy.hook = (call, moment) => {
    if (moment === 'before') calls.push({ ...call, path: call.path.replace(/\?.*/, '').replace(/[0-9a-f]{64}/, '<id>') })
    return 'pass'
  }
  const reply = await stack.api.call<{ id: string }>('POST', '/v1/sandboxes', body)
  proxy.hook = () => 'pass'
  if (reply.status !== 202) throw new Error(`create answered ${reply.status}: ${JSON.stringify(reply.body)}`)
  await stack.api.call('DELETE', `/v1/sandboxes/${reply.body.id}`)
  return calls
}

/** Creates, and kills the server at this point. The engine finishes what it was told before. */
async function killAt(proxy: EngineProxy, stack: Stack, point: Point): Promise<void> {
  let seen = -1
  let dead: Promise<unknown> | undefined
  proxy.hook = (_call, moment) => {
    if (dead !== undefined) return 'drop'
    if (moment === 'before') seen++
    if (seen !== point.call || moment !== point.moment) return 'pass'
    dead = stack.server.stop('SIGKILL')
    return 'drop'
  }
  await stack.api.call('POST', '/v1/sandboxes', body).catch(() => undefined)
  await stack.server.stop('SIGKILL')
  await dead
  proxy.hook = () => 'pass'
}

/** Starts the server again and waits until it and the engine agree; then ends what is left as a user would. */
async function checkWhatIsLeft(t: Test, internet: Internet, stack: Stack): Promise<void> {
  await stack.startServer()
  const problems = await eventually('server and engine agree', async () => ((await disagreements(stack)).length === 0 ? [] : undefined), 15).catch(() => disagreements(stack))
  t.same(problems, [], 'every container belongs to a sandbox that is listed, and a running sandbox has its sidecar')
  for (const { id } of await stack.api.list()) t.equal((await stack.api.call('DELETE', `/v1/sandboxes/${id}`)).status, 204)
  t.same((await stack.containers()).map(({ Names, State }) => [Names, State]), [], 'after that nothing is left')
  t.equal(packetsTo(await internet.flows(), denied), 0, 'nothing was ever heard at the denied place')
}

async function disagreements(stack: Stack): Promise<string[]> {
  const [listed, containers] = [await stack.api.list(), await stack.containers()]
  const problems: string[] = []
  const running = new Set(containers.filter(({ State }) => State === 'running').map(({ Labels }) => `${Labels[labels.id] ?? Labels[labels.egressSidecarFor]} ${Labels[labels.role]}`))
  for (const { Names, Labels } of containers) {
    const id = Labels[labels.id] ?? Labels[labels.egressSidecarFor]
    if (!listed.some((sandbox) => sandbox.id === id && sandbox.status.state === 'Running')) problems.push(`container ${Names.join()} belongs to no running sandbox`)
  }
  for (const { id, status } of listed) {
    if (status.state === 'Running' && !(running.has(`${id} egress`) && running.has(`${id} main`))) problems.push(`sandbox ${id} is Running, its containers are not`)
    if (status.state !== 'Running' && status.state !== 'Failed') problems.push(`sandbox ${id} stays ${status.state}`)
  }
  return problems
}
