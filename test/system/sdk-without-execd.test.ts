/**
 * Sandboxes that have no execd, because none is configured: they work, and where a client asks for execd it is told so in words, not
 * by a timeout. And an execd image that is none.
 */
import { Sandbox, SandboxApiException, SandboxManager } from '@alibaba-group/opensandbox'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { sandboxImage } from '#test/support/containers.ts'
import { startFence } from '#test/support/fence.ts'
import { sdkConnection } from '#test/support/sdk.ts'
import { eventually } from '#test/support/program.ts'
import { startStack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

const application = ['node', '/opt/sallyport/app.mjs']
const resource = { memory: '256Mi' }
const networkPolicy = { egress: [{ action: 'allow' as const, target: 'first.example' }] }

t.test('through the gateway', async (t) => {
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence, gateways: ['header'] })
  const sandbox = await Sandbox.create({ connectionConfig: sdkConnection(stack), image: sandboxImage, entrypoint: application, resource, networkPolicy, skipHealthCheck: true })
  t.match(await sandbox.getInfo(), { status: { state: 'Running' }, entrypoint: application })

  const { endpoint, headers = {} } = await sandbox.getEndpoint(8080)
  const text = await eventually('the application answers', () => fetch(`http://${endpoint}/`, { headers }).then(async (answer) => (answer.ok ? await answer.text() : undefined)))
  t.match(text, /^sallyport sandbox /, 'its ports can be reached')
  t.same((await sandbox.getEgressPolicy()).egress, networkPolicy.egress, 'and its policy')

  const execd = await sandbox.getEndpoint(44772)
  const answer = await fetch(`http://${execd.endpoint}/ping`, { headers: { ...execd.headers, accept: 'application/json' } })
  t.equal(answer.status, 502)
  t.match(await answer.json(), { code: 'EDGE_UPSTREAM_REFUSED', message: /\w/ }, 'execd is refused with a code')
  t.equal(await sandbox.isHealthy(), false, 'which the SDK takes for what it is')
  await t.rejects(sandbox.commands.run('true'), 'commands fail')
  await sandbox.kill()
  await sandbox.close()
  t.same(await stack.containers(), [])
})

t.test('in direct mode', async (t) => {
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence })
  const error = await Sandbox.create({ connectionConfig: sdkConnection(stack), image: sandboxImage, entrypoint: application, resource }).then(() => null, (thrown: unknown) => thrown as SandboxApiException)
  t.match(error, { statusCode: 501, error: { code: 'NOT_IMPLEMENTED', message: /execd/ } }, 'the SDK needs execd, and its user is told')
  t.same(await stack.containers(), [], 'the SDK has taken its sandbox away')

  const { id } = await stack.create()
  const { endpoint } = await stack.api.endpoint(id, 8080)
  t.match(await (await fetch(`http://${endpoint}/`)).text(), /^sallyport sandbox /, 'port 8080 needs no execd')
  const manager = SandboxManager.create({ connectionConfig: sdkConnection(stack) })
  t.match((await manager.listSandboxInfos({ states: ['running'] })).items, [{ id }], 'nor does management')
  await manager.pauseSandbox(id)
  await manager.resumeSandbox(id)
  await manager.renewSandbox(id, 900)
  await manager.killSandbox(id)
  await manager.close()
  t.same(await stack.containers(), [])
})

t.test('an execd image that holds none', async (t) => {
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence, config: { runtime: { type: 'docker', execd_image: sandboxImage } } })
  const error = await Sandbox.create({ connectionConfig: sdkConnection(stack), image: sandboxImage, resource, networkPolicy }).then(() => null, (thrown: unknown) => thrown as SandboxApiException)
  t.match(error, { statusCode: 500, error: { code: 'DOCKER::SANDBOX_EXECD_DISTRIBUTION_FAILED' } })
  t.same(await stack.containers(), [], 'no container is left, also not the one it was looked for in')
  t.same(await stack.api.list(), [], 'no record either')
})
