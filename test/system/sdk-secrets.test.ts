/**
 * execd belongs to the sandbox: root in there can put anything in its place. So nothing that would let a sandbox change its own rules
 * may pass through it. Here execd is a spy that writes down every header it is sent, while the official SDK reads and changes the
 * egress policy; and the rules it changes are those of the kernel, seen by what gets out.
 */
import { Sandbox } from '@alibaba-group/opensandbox'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker, exec, sandboxImage } from '#test/support/containers.ts'
import { spyImage, spyRecord } from '#test/support/execd-image.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { execIn, sdkConnection } from '#test/support/sdk.ts'
import { startStack, type GatewayMode, type Stack } from '#test/support/stack.ts'
import { labels } from '#policies/wire.ts'
import { writeTar } from '../../server/tar.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(180_000)

/** sdk-calls.test.ts asks the spy in the others. */
const modes = ['direct', 'uri'] as const
const zones = { 'first.example': { a: ['198.51.100.10'] }, 'second.example': { a: ['198.51.100.11'] } }
const canary = 'seen-by-the-spy'

t.test('what passes through execd', async (t) => {
  await using internet = await startInternet({ zones })
  const image = await spyImage()
  for (const mode of modes) {
    await t.test(`mode ${mode}`, async (t) => {
      const gateways: GatewayMode[] = mode === 'direct' ? [] : [mode]
      await using stack = await startStack({ internet, gateways, config: { runtime: { type: 'docker', execd_image: image } } })
      const sandbox = await Sandbox.create({ connectionConfig: sdkConnection(stack), image: sandboxImage, networkPolicy: { egress: [{ action: 'allow', target: 'first.example' }] } })
      const { endpoint, headers = {} } = await sandbox.getEndpoint(18080)
      const token = headers['OPENSANDBOX-EGRESS-AUTH'] ?? ''
      t.match(token, /^[\w-]{32}$/, 'the client is given the token')

      await policyIsTheKernels(t, internet, stack, sandbox)
      await strangersAreRefused(t, `http://${endpoint}`, headers)
      await spyKnowsNothing(t, stack, sandbox, { token, apiKey: mode === 'direct' ? '' : stack.apiKey })
      await insideKnowsNothing(t, stack, sandbox, token)
      await nobodyStandsIn(t, stack, sandbox)
      await sandbox.kill()
      await sandbox.close()
    })
  }
  t.equal(await internet.strays(), 0)
})

/** Read, add, take away: what the API says and what the sandbox can reach go together. */
async function policyIsTheKernels(t: Test, internet: Internet, stack: Stack, sandbox: Sandbox): Promise<void> {
  const reaches = async (name: string): Promise<boolean> => {
    await internet.forget()
    await execIn(stack, sandbox.id, ['curl', '-sS', '-m', '2', '-o', '/dev/null', `http://${name}/`])
    return (await internet.exchanges()).length > 0
  }
  t.ok(await reaches('first.example'), 'what the create allowed')
  t.notOk(await reaches('second.example'), 'and nothing else')
  await sandbox.patchEgressRules([{ action: 'allow', target: 'second.example' }])
  t.same((await sandbox.getEgressPolicy()).egress?.map(({ target }) => target).sort(), ['first.example', 'second.example'])
  t.ok(await reaches('second.example'), 'allowed from now on')
  await sandbox.deleteEgressRules(['second.example'])
  t.notOk(await reaches('second.example'), 'taken away again')
}

async function strangersAreRefused(t: Test, url: string, headers: Readonly<Record<string, string>>): Promise<void> {
  const { 'OPENSANDBOX-EGRESS-AUTH': _token, ...routing } = headers
  for (const [why, auth] of [['without the token', {}], ['with another', { 'OPENSANDBOX-EGRESS-AUTH': canary }]] as const) {
    const answer = await fetch(`${url}/policy`, { headers: { ...routing, ...auth } })
    t.equal(answer.status, 401, `${why}: ${await answer.text()}`)
  }
}

/** The API key goes to execd in direct mode: the SDK sends it wherever it goes, and there is nothing of ours between. */
async function spyKnowsNothing(t: Test, stack: Stack, sandbox: Sandbox, secrets: { token: string; apiKey: string }): Promise<void> {
  const { endpoint, headers = {} } = await sandbox.getEndpoint(44772)
  await sandbox.commands.run('true')
  await fetch(`http://${endpoint}/proxy/18080/policy`, { headers: { ...headers, 'OPENSANDBOX-EGRESS-AUTH': canary } }).then((answer) => answer.text())
  const seen = (await execIn(stack, sandbox.id, ['cat', spyRecord])).stdout
  t.ok(seen.split('\n').length > 4, 'the spy was there all the time', { seen })
  t.match(seen, /OpenSandbox-JS-SDK/i, "it read the SDK's headers")
  t.match(seen, canary, 'it would have read the token')
  t.notMatch(seen, secrets.token, 'but never did')
  if (secrets.apiKey !== '') t.notMatch(seen, secrets.apiKey, "nor the server's API key")
}

/** Root looks for it in every place the token could have been left: environments, command lines, files. */
async function insideKnowsNothing(t: Test, stack: Stack, sandbox: Sandbox, token: string): Promise<void> {
  const main = docker.getContainer((await stack.containers()).find((container) => container.Labels[labels.id] === sandbox.id)!.Id)
  const places = '/proc/[0-9]*/environ /proc/[0-9]*/cmdline /etc/* /opt/opensandbox/* /tmp/* /run/*'
  const search = async (wanted: string): Promise<number> => {
    // By the engine, and into a place that is not searched: no process of the search holds it.
    await main.putArchive(writeTar({ 'root/wanted': { mode: 0o600, content: Buffer.from(wanted) } }), { path: '/' })
    const { stdout } = await exec(main.id, ['sh', '-c', `cat ${places} 2>/dev/null | tr '\\0' '\\n' | grep -c -F -f /root/wanted`], 30)
    return Number(stdout)
  }
  t.ok((await search('/opt/opensandbox/bootstrap.sh')) > 0, 'the search finds what is there')
  t.equal(await search(token), 0, 'the token is nowhere inside')
  const { Config } = await main.inspect()
  t.notMatch(JSON.stringify([Config.Env, Config.Cmd, Config.Entrypoint]), token)
}

/** A program of the sandbox that listened where the sidecar listens would be handed the token by the next call. */
async function nobodyStandsIn(t: Test, stack: Stack, sandbox: Sandbox): Promise<void> {
  const attempt = `
import socket, sys
own = socket.gethostbyname(socket.gethostname())
for address in ('0.0.0.0', '127.0.0.1', own):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        s.bind((address, int(sys.argv[1])))
        s.listen()
        print('taken', address)
    except OSError as error:
        print('refused', address, error.errno)
`
  const free = await execIn(stack, sandbox.id, ['python3', '-c', attempt, '18081'])
  t.match(free.stdout, 'taken 0.0.0.0', 'the attempt is a real one')
  const guarded = await execIn(stack, sandbox.id, ['python3', '-c', attempt, '18080'])
  t.notMatch(guarded.stdout, 'taken', "the sidecar's port is not to be had")
  t.match(guarded.stdout, 'refused')
}
