/**
 * The official JavaScript SDK against a whole Sallyport: every call of a sandbox's life, in direct mode and through the gateway in
 * each mode, with and without a network policy. What a call says is checked against what is there, not against another call alone.
 * execd is a stand-in, or the image that SALLYPORT_EXECD_IMAGE names.
 */
import { Sandbox, SandboxApiException, SandboxManager } from '@alibaba-group/opensandbox'
import { once } from 'node:events'
import t, { type Test } from 'tap'
import WebSocket from 'ws'
import { needs } from '#test/support/abilities.ts'
import { sandboxImage } from '#test/support/containers.ts'
import { execdImage, spyRecord } from '#test/support/execd-image.ts'
import { startFence } from '#test/support/fence.ts'
import { execIn, resolveLocalhost, sdkConnection } from '#test/support/sdk.ts'
import { startStack, type GatewayMode, type Stack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(180_000)
resolveLocalhost()

const modes = ['direct', 'header', 'uri', 'wildcard'] as const
const policy = { egress: [{ action: 'allow' as const, target: 'first.example' }] }
const application = ['node', '/opt/sallyport/app.mjs']

const execd = await execdImage()
for (const mode of modes) {
  t.test(`mode ${mode}`, async (t) => {
    await using fence = await startFence()
    const gateways: GatewayMode[] = mode === 'direct' ? [] : [mode]
    await using stack = await startStack({ internet: fence, gateways, config: { runtime: { type: 'docker', execd_image: execd.reference } } })
    for (const [kind, networkPolicy] of [['without a policy', undefined], ['with a policy', policy]] as const) {
      await t.test(kind, async (t) => {
        const started = Date.now()
        const sandbox = await Sandbox.create({
          connectionConfig: sdkConnection(stack), image: sandboxImage, entrypoint: application, timeoutSeconds: 600, resource: { cpu: '1', memory: '256Mi' },
          env: { GREETING: 'hello' }, metadata: { kind: 'sdk', 'example.com/mode': mode }, ...(networkPolicy === undefined ? {} : { networkPolicy }),
        })
        t.ok(sandbox.id, 'created, and execd answers')
        await describesItself(t, sandbox, { mode, started })
        await isListed(t, stack, sandbox.id, mode)
        await runsCommands(t, sandbox)
        await reachesPorts(t, sandbox)
        await changes(t, sandbox)
        await pausesAndResumes(t, stack, sandbox)
        if (networkPolicy !== undefined) await changesItsPolicy(t, stack, sandbox)
        await ends(t, stack, sandbox)
      })
    }
  })
}

async function describesItself(t: Test, sandbox: Sandbox, { mode, started }: { mode: string; started: number }): Promise<void> {
  const info = await sandbox.getInfo()
  t.match(info, { id: sandbox.id, image: { uri: sandboxImage }, entrypoint: application, metadata: { kind: 'sdk', 'example.com/mode': mode }, status: { state: 'Running', reason: 'CONTAINER_RUNNING' } })
  const lifetime = (info.expiresAt?.getTime() ?? 0) - info.createdAt.getTime()
  t.equal(lifetime, 600_000, 'expires as long after its creation as was asked')
  t.ok(Math.abs(info.createdAt.getTime() - started) < 60_000, 'and was created now')
  t.ok(await sandbox.isHealthy())
  const metrics = await sandbox.getMetrics()
  t.ok(metrics.cpuCount >= 1 && metrics.memoryTotalMiB > 0 && Math.abs(metrics.timestamp - Date.now()) < 120_000, 'metrics of execd', { metrics })
}

async function isListed(t: Test, stack: Stack, id: string, mode: string): Promise<void> {
  const manager = SandboxManager.create({ connectionConfig: sdkConnection(stack) })
  t.teardown(() => manager.close())
  const cases: [why: string, filter: Parameters<SandboxManager['listSandboxInfos']>[0], found: boolean][] = [
    ['everything', {}, true],
    ['by metadata, with a prefix and two keys', { metadata: { kind: 'sdk', 'example.com/mode': mode } }, true],
    ['by another value', { metadata: { kind: 'other' } }, false],
    ['by state, one of two', { states: ['Running', 'Paused'] }, true],
    ['by another state', { states: ['Paused'] }, false],
    ['the second page', { page: 2, pageSize: 200 }, false],
  ]
  for (const [why, filter, found] of cases) {
    const { items, pagination } = await manager.listSandboxInfos(filter)
    t.equal(items.some((item) => item.id === id), found, `listed: ${why}`)
    if (filter?.page === undefined) t.equal(pagination?.totalItems, items.length)
  }
  t.equal((await manager.getSandboxInfo(id)).id, id)
}

async function runsCommands(t: Test, sandbox: Sandbox): Promise<void> {
  const told: string[] = []
  const done = await sandbox.commands.run('echo $GREETING; echo two; echo problem >&2; exit 3', {}, { onStdout: (message) => void told.push(message.text) })
  t.same(done.logs.stdout.map((line) => line.text), ['hello', 'two'], 'the sandbox has its environment, and execd its own output')
  t.same(told, ['hello', 'two'], 'handed over line by line')
  t.same(done.logs.stderr.map((line) => line.text), ['problem'])
  t.equal(done.exitCode, 3)
  t.equal((await sandbox.commands.run('test -x /opt/opensandbox/execd && test -x /opt/opensandbox/bootstrap.sh')).exitCode, 0, 'both files are where the original puts them')
}

/** The application listens on 8080; another copy of it on a port that nobody announced. */
async function reachesPorts(t: Test, sandbox: Sandbox): Promise<void> {
  const ready = 'timeout 20 sh -c "until curl -s -o /dev/null http://127.0.0.1:8080/ && curl -s -o /dev/null http://127.0.0.1:3210/; do sleep 0.05; done"'
  const start = `PORT=3210 node /opt/sallyport/app.mjs >/dev/null 2>&1 & ${ready}`
  t.equal((await sandbox.commands.run(start)).exitCode, 0, 'both listen')
  for (const port of [8080, 3210]) {
    const { endpoint, headers = {} } = await sandbox.getEndpoint(port)
    const url = `http://${endpoint}`
    t.equal(await sandbox.getEndpointUrl(port), url)
    t.match(await (await fetch(`${url}/`, { headers })).text(), /^sallyport sandbox /, `port ${port} at ${endpoint.replace(sandbox.id, '<id>')}`)
    t.match(await (await fetch(`${url}/echo?a=%20b`, { method: 'DELETE', headers })).json(), { method: 'DELETE', url: '/echo?a=%20b' })
    const socket = new WebSocket(`ws://${endpoint}/ws`, { headers, handshakeTimeout: 10_000 })
    await once(socket, 'open')
    socket.send('hello')
    const [answer] = (await once(socket, 'message')) as [Buffer]
    t.equal(answer.toString(), 'hello', `a WebSocket to port ${port}`)
    socket.close()
    await once(socket, 'close')
  }
  const { endpoint, headers = {} } = await sandbox.getEndpoint(44772)
  t.match(JSON.stringify([endpoint, headers]), /[/:-]44772\b/, 'the port stays visible in the endpoint of execd')
}

async function changes(t: Test, sandbox: Sandbox): Promise<void> {
  const before = Date.now()
  const renewed = await sandbox.renew(1200)
  t.ok(Math.abs((renewed.expiresAt?.getTime() ?? 0) - before - 1_200_000) < 10_000)
  t.same((await sandbox.getInfo()).expiresAt, renewed.expiresAt, 'renewed')
  await rejectsWith(t, sandbox.renew(-5), 400, 'DOCKER::INVALID_EXPIRATION', 'not into the past')

  const patched = await sandbox.patchMetadata({ kind: null, stage: 'second', 'never.there': null })
  t.equal(patched.metadata?.['stage'], 'second')
  t.notOk('kind' in (patched.metadata ?? {}), 'a null removes')
  t.notOk('kind' in ((await sandbox.patchMetadata({ kind2: 'x' })).metadata ?? {}), 'and what was removed stays away')
  await rejectsWith(t, sandbox.patchMetadata({ 'opensandbox.io/id': 'x' }), 400, 'INVALID_METADATA_LABEL', 'reserved keys are refused')
}

async function pausesAndResumes(t: Test, stack: Stack, sandbox: Sandbox): Promise<void> {
  const endpoint = await sandbox.getEndpoint(8080)
  await sandbox.pause()
  t.match(await sandbox.getInfo(), { status: { state: 'Paused', reason: 'CONTAINER_PAUSED' } })
  await rejectsWith(t, sandbox.pause(), 409, 'DOCKER::SANDBOX_NOT_RUNNING', 'a second pause')
  const resumed = await sandbox.resume()
  t.teardown(() => resumed.close())
  t.match(await resumed.getInfo(), { status: { state: 'Running' } })
  t.same(await resumed.getEndpoint(8080), endpoint, 'endpoints outlive a pause')
  t.equal((await resumed.commands.run('true')).exitCode, 0, 'and execd is there again')
  await rejectsWith(t, resumed.sandboxes.resumeSandbox(sandbox.id), 409, 'DOCKER::SANDBOX_NOT_PAUSED', 'a second resume')
  const connected = await Sandbox.connect({ sandboxId: sandbox.id, connectionConfig: sdkConnection(stack) })
  t.teardown(() => connected.close())
  t.ok(await connected.isHealthy(), 'another client connects by id')
}

/** None of which passes through execd: it belongs to the sandbox, and must not learn what changes its rules. */
async function changesItsPolicy(t: Test, stack: Stack, sandbox: Sandbox): Promise<void> {
  t.same(await sandbox.getEgressPolicy(), { defaultAction: 'deny', egress: policy.egress }, 'the policy of the create')
  await sandbox.patchEgressRules([{ action: 'allow', target: 'second.example' }, { action: 'deny', target: 'first.example' }])
  t.same(await sandbox.getEgressPolicy(), { defaultAction: 'deny', egress: [{ action: 'allow', target: 'second.example' }, { action: 'deny', target: 'first.example' }] }, 'rules are laid over those of the same target')
  await rejectsWith(t, sandbox.patchEgressRules([{ action: 'allow', target: 'not a host' }]), 400, undefined, 'a bad rule')
  await sandbox.deleteEgressRules(['first.example'])
  t.same((await sandbox.getEgressPolicy()).egress, [{ action: 'allow', target: 'second.example' }])
  if (!execd.spies) return
  const token = (await sandbox.getEndpoint(18080)).headers?.['OPENSANDBOX-EGRESS-AUTH'] ?? ''
  const seen = (await execIn(stack, sandbox.id, ['cat', spyRecord])).stdout
  t.ok(token.length === 32 && seen.includes('OpenSandbox-JS-SDK'), "execd read the SDK's headers")
  t.notMatch(seen, token, 'and the token was not among them')
}

async function ends(t: Test, stack: Stack, sandbox: Sandbox): Promise<void> {
  t.ok((await stack.containers()).length > 0)
  await sandbox.kill()
  await rejectsWith(t, sandbox.getInfo(), 404, 'DOCKER::SANDBOX_NOT_FOUND', 'gone')
  await rejectsWith(t, sandbox.kill(), 404, 'DOCKER::SANDBOX_NOT_FOUND', 'once')
  t.same(await stack.containers(), [], 'with everything of it')
  await sandbox.close()
}

/** SDKs show `message`, `code` and the request id to their users: all three must be there. */
async function rejectsWith(t: Test, call: Promise<unknown>, status: number, code: string | undefined, why: string): Promise<void> {
  const error = await call.then(() => undefined, (thrown: unknown) => thrown)
  t.ok(error instanceof SandboxApiException, `${why}: refused`, { error })
  t.equal((error as SandboxApiException).statusCode, status, why)
  if (code === undefined) return
  t.equal((error as SandboxApiException).error.code, code, why)
  t.match((error as SandboxApiException).requestId, /^[0-9a-f]{32}$/, `${why}: with a request id`)
}
