/** Our own access tokens and renew-on-access, from the server's answer through a real gateway to a sandbox. */
import { randomBytes } from 'node:crypto'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import type { Internet } from '#test/support/internet.ts'
import { eventually, freePort, startProgram } from '#test/support/program.ts'
import { startStack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

/** Nothing here leaves the sandboxes' own bridge, so no internet is needed. */
const nowhere = { dns: '198.51.100.53:53', fence: async () => undefined } as Pick<Internet, 'dns' | 'fence'> as Internet
type Strong = { endpoint: string; headers: Record<string, string>; signedEndpoint: string }

t.test('a token opens, is revoked, and every use makes the sandbox live longer', async (t) => {
  const [port, key, route_token] = [await freePort(), randomBytes(32).toString('base64'), randomBytes(16).toString('hex')]
  const address = `127.0.0.1:${port}`
  const ingress = { mode: 'gateway', route_token, gateway: { address, route: { mode: 'uri' } }, secure_access: { active_key: 'a', keys: [{ key_id: 'a', key }] } }
  await using stack = await startStack({ internet: nowhere, config: { ingress } })
  const args = ['gateway/main.ts', '--port', String(port), '--mode', 'uri', '--provider', 'server', '--server-url', stack.api.url, '--server-token', route_token, '--secure-access-keys', `a=${key}`]
  await using _gateway = await startProgram({ args, ready: async () => (await fetch(`http://${address}/status.ok`)).ok })
  const sandbox = await stack.create({ secureAccess: true, timeout: 100, extensions: { 'access.renew.extend.seconds': '600' } })
  const status = (url: string, headers: Record<string, string> = {}): Promise<number> => fetch(`http://${url}`, { headers }).then(async (answer) => (await answer.arrayBuffer(), answer.status))
  const strong = async (more = ''): Promise<Strong> => (await stack.api.call<Strong>('GET', `/v1/sandboxes/${sandbox.id}/endpoints/8080?expires=${Math.floor(Date.now() / 1000) + 60}&form=strong${more}`)).body
  const left = async (): Promise<number> => Date.parse((await stack.api.get(sandbox.id))?.expiresAt ?? '') - Date.now()

  const whole = await strong()
  t.equal(await status(`${whole.endpoint}/`), 401, 'without the token')
  t.ok(await left() <= 100_000, 'a refused request is no use')
  t.equal(await status(`${whole.endpoint}/echo`, whole.headers), 200, 'as a header')
  t.equal(await status(`${whole.signedEndpoint}echo`), 200, 'in the URL')
  t.ok(await eventually('the use is reported', async () => ((await left()) > 590_000 ? true : undefined)))
  const part = await strong('&methods=GET&path_prefix=/echo')
  t.equal(await status(part.signedEndpoint), 200)
  t.equal(await status(`${part.endpoint}/`, part.headers), 401, 'not outside of its prefix')

  t.same((await stack.api.call('POST', `/v1/sandboxes/${sandbox.id}/access/revoke`)).body, { epoch: 1 })
  t.ok(await eventually('the gateway hears of it', async () => ((await status(`${whole.endpoint}/`, whole.headers)) === 401 ? true : undefined)))
  t.equal(await status(part.signedEndpoint), 401, 'every token')
  const fresh = await strong()
  t.equal(await status(`${fresh.endpoint}/`, fresh.headers), 200, 'a new one opens')

  await stack.server.stop('SIGKILL')
  await stack.startServer()
  t.ok(await left() > 500_000, 'the renewal survives')
  t.equal(await eventually('the gateway is back', async () => ((await status(`${fresh.endpoint}/`, fresh.headers)) === 200 ? 200 : undefined)), 200)
  t.equal(await status(part.signedEndpoint), 401, 'and so does the revocation')
})
