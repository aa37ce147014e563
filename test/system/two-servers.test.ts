/** Two lifecycle servers on one Docker engine: neither sees, ends or unguards what belongs to the other. */
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attackTogether } from '#test/support/attack.ts'
import { docker } from '#test/support/containers.ts'
import { fetchThrough, openDoor } from '#test/support/doors.ts'
import { startInternet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox, type Stack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const networkPolicy = { egress: [{ action: 'allow', target: '198.51.100.30' }] }
const denied = '198.51.100.31'

for (const shared of [false, true]) {
  t.test(shared ? 'on one network' : 'each on a network of its own', async (t) => {
    await using internet = await startInternet({ claims: ['169.254.169.254'] })
    await using mine = await startStack({ internet, gateways: ['uri'] })
    const network = shared ? { network_name: mine.network, bridge_name: mine.bridge } : {}
    await using theirs = await startStack({ internet, gateways: ['uri'], config: { docker: network } })
    const sandboxes = new Map<Stack, Sandbox>([[mine, await mine.create({ networkPolicy })], [theirs, await theirs.create({ networkPolicy })]])

    for (const [stack, other] of [[mine, theirs], [theirs, mine]] as const) {
      const foreign = sandboxes.get(other)!
      t.same((await stack.api.list()).map(({ id }) => id), [sandboxes.get(stack)!.id], 'lists its own')
      t.equal(await stack.api.get(foreign.id), undefined, "does not know the other's")
      for (const [method, path] of [['DELETE', ''], ['POST', '/pause'], ['GET', '/endpoints/8080']] as const) {
        t.equal((await stack.api.call(method, `/v1/sandboxes/${foreign.id}${path}`)).status, 404, `${method} ${path} of the other's sandbox`)
      }
      t.equal((await fetchThrough(doorOf(stack, foreign), '/')).status, 404, "its gateway has no route to the other's")
      t.equal((await fetchThrough(doorOf(other, foreign), '/')).status, 200, 'which goes on')
    }

    await mine.server.stop('SIGKILL')
    await mine.startServer()
    t.same((await mine.api.list()).map(({ id }) => id), [sandboxes.get(mine)!.id], 'a killed server finds its own again')
    t.match(await eventually('it counts what is not its own', async () => /\{[^\n]*"other-instances"[^\n]*/.exec(mine.server.log())?.[0]), new RegExp(`"containers":[1-9].*"${theirs.instance}"`))
    await sandboxes.get(mine)!.remove()
    t.same(await mine.containers(), [])
    t.equal((await theirs.api.list()).length, 1, "deleting does not touch the other's")

    await mine.server.stop()
    const left = sandboxes.get(theirs)!
    t.equal((await docker.getContainer(left.main).inspect()).State.Running, true, 'the end of one server ends no sandbox of the other')
    t.equal((await fetchThrough(doorOf(theirs, left), '/')).status, 200)
    await stillGuarded(t, left)
    const next = await theirs.create()
    t.same(await attackTogether(next.main, [['tcp', denied, '443']]), ['ok'], 'the other still makes sandboxes, and without a policy they connect')
    t.notMatch(await attackTogether(next.main, [['tcp', '169.254.169.254', '80']]), /ok/, 'but not to what no sandbox may reach')
    await next.remove()
    await left.remove()
    await eventually('all containers are gone', async () => ((await theirs.containers()).length === 0 ? true : undefined))
    t.equal(await internet.strays(), 0)
  })
}

async function stillGuarded(t: { same: (found: unknown, wanted: unknown, message: string) => unknown }, sandbox: Sandbox): Promise<void> {
  const said = await attackTogether(sandbox.main, [['tcp', '198.51.100.30', '443'], ['tcp', denied, '443'], ['tcp', '169.254.169.254', '80']])
  t.same(said.map((word) => word === 'ok'), [true, false, false], 'its policy still holds')
}

function doorOf(stack: Stack, sandbox: Sandbox): ReturnType<typeof openDoor> {
  return openDoor('uri', stack.gateways.get('uri')!.url.replace('http://', ''), sandbox.id, 8080)
}
