/** The official SDK and sandboxes whose ports are closed to whoever only knows their id: `secureAccess`, and endpoints that open for a while. */
import { Sandbox, SandboxApiException } from '@alibaba-group/opensandbox'
import { randomBytes } from 'node:crypto'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { sandboxImage } from '#test/support/containers.ts'
import { execdImage } from '#test/support/execd-image.ts'
import { startFence } from '#test/support/fence.ts'
import { eventually, freePort, startProgram } from '#test/support/program.ts'
import { sdkConnection } from '#test/support/sdk.ts'
import { startStack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(90_000)

const application = ['node', '/opt/sallyport/app.mjs']
const key = randomBytes(32).toString('base64')

t.test('through a gateway that knows the keys', async (t) => {
  await using fence = await startFence()
  const port = await freePort()
  const address = `127.0.0.1:${port}`
  const ingress = { mode: 'gateway', route_token: randomBytes(16).toString('hex'), gateway: { address, route: { mode: 'uri' } }, secure_access: { active_key: 'a', keys: [{ key_id: 'a', key }] } }
  const runtime = { type: 'docker', execd_image: (await execdImage()).reference }
  await using stack = await startStack({ internet: fence, config: { ingress, runtime } })
  const args = ['gateway/main.ts', '--port', String(port), '--mode', 'uri', '--provider', 'server', '--server-url', stack.api.url, '--server-token', ingress.route_token, '--secure-access-keys', `a=${key}`]
  await using _gateway = await startProgram({ args, ready: async () => (await fetch(`http://${address}/status.ok`)).ok })

  const sandbox = await Sandbox.create({ connectionConfig: sdkConnection(stack), image: sandboxImage, entrypoint: application, secureAccess: true })
  const { endpoint, headers = {} } = await sandbox.getEndpoint(8080)
  const status = (url: string, given: Record<string, string> = {}): Promise<number> => fetch(url, { headers: given }).then(async (answer) => (await answer.arrayBuffer(), answer.status))
  await eventually('the application answers', async () => ((await status(`http://${endpoint}/`, headers)) === 200 ? true : undefined))
  t.ok(await sandbox.isHealthy(), 'the SDK sends what the endpoint told it to')

  const name = 'OpenSandbox-Secure-Access'
  t.match(headers[name], /^[\w-]{32}$/)
  t.equal(await status(`http://${endpoint}/`), 401, 'the id alone is not enough')
  t.equal(await status(`http://${endpoint}/`, { [name]: 'x'.repeat(32) }), 401, 'nor another token')

  const signed = await sandbox.getSignedEndpoint(8080, Math.floor(Date.now() / 1000) + 60)
  t.notOk(signed.headers !== undefined && name in signed.headers, 'a signed endpoint stands by itself')
  t.equal(await status(`http://${signed.endpoint}/`), 200)
  t.equal(await status(`http://${signed.endpoint.replace('/8080/', '/44772/')}/ping`), 401, 'for this port only')
  const past = await sandbox.getSignedEndpoint(8080, 1).then(() => null, (thrown: unknown) => thrown)
  t.match(past, { statusCode: 400, error: { code: 'SANDBOX::INVALID_PARAMETER' } }, 'not for the past')
  await sandbox.kill()
  await sandbox.close()
})

t.test('in direct mode there is nobody who could check', async (t) => {
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence })
  const refused = await Sandbox.create({ connectionConfig: sdkConnection(stack), image: sandboxImage, secureAccess: true }).then(() => null, (thrown: unknown) => thrown as SandboxApiException)
  t.match(refused, { statusCode: 400, error: { code: 'SANDBOX::INVALID_PARAMETER', message: /secureAccess/ } })
  t.same(await stack.containers(), [])
})
