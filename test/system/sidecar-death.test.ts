/** The sidecar ends, however it ends: nothing more comes out of its sandbox, and the sandbox ends with it. Moments: sidecar-kill.test.ts. */
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attackCommand, attackTogether, packetsTo, questionsFor } from '#test/support/attack.ts'
import { docker } from '#test/support/containers.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox, type Stack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const resolver = '198.51.100.53'
const allowed = '198.51.100.30'
const denied = '198.51.100.31'
const zones = { 'allowed.example': { a: ['198.51.100.32'] } }
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: allowed }, { action: 'allow', target: 'allowed.example' }] }
/** The sandbox knocks at both places fifty times a second, from its first moment to its last. */
const entrypoint = attackCommand('beacon', allowed, denied)

const everyWayOut = [['tcp', allowed, '443'], ['udp', allowed, '443'], ['tcp', denied, '443'], ['tcp', 'allowed.example', '443'], ['ask', 'allowed.example', resolver], ['ask', 'allowed.example', '127.0.0.11']]

const ends: [how: string, end: (sidecar: string) => Promise<unknown>][] = [
  ['stopped', (sidecar) => docker.getContainer(sidecar).stop({ t: 1 })],
  ['restarted', (sidecar) => docker.getContainer(sidecar).restart({ t: 0 })],
  ['removed', (sidecar) => docker.getContainer(sidecar).remove({ force: true })],
  ['its process killed from the host', async (sidecar) => process.kill((await docker.getContainer(sidecar).inspect()).State.Pid, 'SIGKILL')],
]

t.test('while the server watches', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  await beaconIsReal(t, internet, stack)
  for (const [how, end] of ends) {
    await t.test(how, async (t) => {
      const sandbox = await knocking(internet, stack)
      await end(sandbox.sidecar!)
      await endsWithItsGuard(t, internet, stack, sandbox)
    })
  }
  t.equal(await internet.strays(), 0)
})

t.test('while there is no server', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  for (const [how, end] of ends) {
    await t.test(how, async (t) => {
      const sandbox = await knocking(internet, stack)
      await stack.server.stop('SIGKILL')
      await end(sandbox.sidecar!)
      await eventually('Docker has taken the network away', async () => ((await sandbox.run(['cat', '/proc/net/dev'])).stdout.includes('eth0') ? undefined : true))
      await internet.forget()
      const said = await attackTogether(sandbox.main, everyWayOut)
      t.notMatch(said, /ok/, 'nothing answers any more', { said })
      // A sidecar that was restarted asks its own resolver whether it is there.
      t.same((await internet.flows()).filter(({ to }) => to !== resolver), [], 'nothing arrives, from the attempts or from the knocking that goes on')
      t.equal(questionsFor(await internet.questions(), 'allowed.example'), 0, 'nor does a question')
      await stack.startServer()
      await endsWithItsGuard(t, internet, stack, sandbox)
    })
  }
  t.equal(await internet.strays(), 0)
})

async function beaconIsReal(t: Test, internet: Internet, stack: Stack): Promise<void> {
  const open = await stack.create({ entrypoint })
  await internet.forget()
  await eventually('a sandbox without a policy is heard at both places', async () => ((await heard(internet, denied)) && (await heard(internet, allowed))) || undefined)
  t.ok(await heard(internet, denied), 'the knocking is real')
  await open.remove()
}

async function knocking(internet: Internet, stack: Stack): Promise<Sandbox> {
  const sandbox = await stack.create({ entrypoint, networkPolicy })
  await internet.forget()
  await eventually('the sandbox is heard where it may go', async () => (await heard(internet, allowed)) || undefined)
  return sandbox
}

async function heard(internet: Internet, place: string): Promise<boolean> {
  return packetsTo(await internet.flows(), place) > 0
}

async function endsWithItsGuard(t: Test, internet: Internet, stack: Stack, sandbox: Sandbox): Promise<void> {
  const status = await eventually('the sandbox has failed', async () => {
    const now = await stack.api.get(sandbox.id)
    return now === undefined || now.status.state === 'Failed' ? (now?.status ?? { state: 'gone' }) : undefined
  }).catch(async () => (await stack.api.get(sandbox.id))?.status)
  t.match(status, { state: 'Failed', reason: 'EGRESS_GONE' })
  const left = await eventually('its containers are gone', async () => (await containersOf(stack, sandbox)).length === 0 ? [] : undefined).catch(() => containersOf(stack, sandbox))
  t.same(left, [], 'its containers are gone')
  t.equal(packetsTo(await internet.flows(), denied), 0, 'at no moment did anything reach the denied place')
  await internet.forget()
  t.equal(await heard(internet, allowed), false, 'and now nothing knocks')
}

async function containersOf(stack: Stack, sandbox: Sandbox): Promise<string[]> {
  return (await stack.containers()).map(({ Id }) => Id).filter((id) => id === sandbox.main || id === sandbox.sidecar)
}
