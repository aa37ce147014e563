/** A policy with as many rules as there may be: too large for the environment a sidecar is started with, and it holds all the same. */
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attackTogether } from '#test/support/attack.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(180_000)

const [allowed, denied] = ['198.51.100.30', '198.51.100.31']
const zones = { 'allowed.example': { a: ['198.51.100.32'] }, 'denied.example': { a: ['198.51.100.33'] } }
const filler = Array.from({ length: 4093 }, (_, n) => ({ action: 'allow', target: n % 4 === 0 ? `198.18.${n >> 8}.${n & 255}` : `host-${n}.of-a-team-that-lists-every-single-host.corp.example` }))
const egress = [...filler, { action: 'allow', target: allowed }, { action: 'allow', target: 'allowed.example' }]

t.test('4,095 rules', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const attempts = [['tcp', allowed, '443'], ['tcp', 'allowed.example', '443'], ['tcp', denied, '443'], ['tcp', 'denied.example', '443']]
  const said = async (main: string): Promise<string[]> => (await attackTogether(main, attempts)).map((line) => (line === 'ok' ? 'ok' : 'no'))
  const open = await stack.create()
  const free = await said(open.main)
  await open.remove()

  t.ok(JSON.stringify(egress).length > 131_072, 'it would not fit into one environment string')
  const sandbox = await stack.create({ networkPolicy: { defaultAction: 'deny', egress } })
  const answer = await stack.api.call('GET', `/v1/sandboxes/${sandbox.id}/network-policy`)
  t.same((answer.body as { policy: unknown }).policy, { defaultAction: 'deny', egress }, 'read back rule by rule')
  const kept = await said(sandbox.main)
  t.same([free, kept], [['ok', 'ok', 'ok', 'ok'], ['ok', 'ok', 'no', 'no']], 'the last two rules hold, and nothing else is open')
  const refused = await stack.api.call('POST', '/v1/sandboxes', { image: { uri: 'x' }, entrypoint: ['x'], resourceLimits: {}, networkPolicy: { egress: [...egress, ...egress] } })
  t.match(refused, { status: 400, body: { code: 'SANDBOX::INVALID_PARAMETER', message: /^networkPolicy\.egress: has 8190 rules/ } })
  await sandbox.remove()
  t.equal(await internet.strays(), 0)
})
