/** Options of the configuration that only a real engine can show: seccomp, the runtime, limits, and sandboxes of the original server. */
import { spawnSync } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { docker, sandboxImage } from '#test/support/containers.ts'
import type { Internet } from '#test/support/internet.ts'
import { ignoreGone, namePrefix } from '#test/support/leftovers.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Stack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(180_000)

/** Nothing here leaves the sandboxes' own bridge, so no internet is needed. */
const nowhere = { dns: '198.51.100.53:53', fence: async () => undefined } as Pick<Internet, 'dns' | 'fence'> as Internet
const policy = { networkPolicy: { egress: [] } }
/** capabilities(7): what the original takes from a sandbox. */
const dropped = { NET_ADMIN: 12, NET_RAW: 13, SYS_MODULE: 16, SYS_PTRACE: 19, SYS_ADMIN: 21, SYS_TIME: 25, SYS_TTY_CONFIG: 26, MKNOD: 27, AUDIT_WRITE: 29 } as const
/** Another name of runc that every engine of these days knows, and not its default. */
const otherRuntime = 'io.containerd.runc.v2'

/** Makes processes until it may not (EAGAIN is 11), says how many; they end with it. */
const forks = `
import os
r, w = os.pipe()
n = 0
try:
  while n < 200:
    if os.fork() == 0:
      os.close(w)
      os.read(r, 1)
      os._exit(0)
    n += 1
except OSError as error:
  print(error.errno, n)`

const folder = mkdtempSync(join(tmpdir(), namePrefix))
t.teardown(() => rmSync(folder, { recursive: true }))

t.test('what holds a sandbox, from inside', async (t) => {
  const profile = join(folder, 'profile.json')
  writeFileSync(profile, JSON.stringify({ defaultAction: 'SCMP_ACT_ALLOW', syscalls: [{ names: ['mkdir', 'mkdirat'], action: 'SCMP_ACT_ERRNO' }] }))
  await using stack = await startStack({ internet: nowhere, config: { docker: { seccomp_profile: profile, pids_limit: 64 }, secure_runtime: { type: 'gvisor', docker_runtime: otherRuntime } } })
  await using plain = await startStack({ internet: nowhere })
  const makeFolder = ['python3', '-c', 'import os; os.mkdir("/tmp/made"); print("made")']
  t.match(await (await plain.create({ entrypoint: ['sleep', '600'] })).run(makeFolder), { stdout: /made/ }, "the engine's own profile lets a folder be made")

  for (const [kind, more] of [['without a policy', {}], ['with a policy', policy]] as const) {
    const sandbox = await stack.create({ entrypoint: ['sleep', '600'], ...more })
    t.match(await sandbox.run(makeFolder), { stderr: /PermissionError.*\/tmp\/made/ }, `${kind}: the configured seccomp profile does not`)
    const status = (await sandbox.run(['cat', '/proc/1/status'])).stdout
    for (const set of ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb']) {
      const held = BigInt(`0x${new RegExp(`^${set}:\\s*(\\w+)`, 'm').exec(status)?.[1]}`)
      t.same(Object.entries(dropped).filter(([, bit]) => (held >> BigInt(bit)) & 1n).map(([name]) => name), [], `${kind}: ${set}`)
    }
    t.match(status, /^NoNewPrivs:\s*1$/m, `${kind}: setuid programs gain nothing`)
    t.match(status, /^Seccomp:\s*2$/m, kind)
    t.match((await sandbox.run(['python3', '-c', forks])).stdout, /^11 [1-6]\d$/m, `${kind}: no more processes than docker.pids_limit`)
    t.equal((await docker.getContainer(sandbox.main).inspect()).HostConfig.Runtime, otherRuntime, `${kind}: secure_runtime`)
    if (sandbox.sidecar !== undefined) t.not((await docker.getContainer(sandbox.sidecar).inspect()).HostConfig.Runtime, otherRuntime, 'the sidecar is ours and needs none')
  }
})

t.test('a runtime that the engine does not have is refused at the start', async (t) => {
  const file = join(folder, 'runtime.toml')
  writeFileSync(file, `[server]\nhost = "127.0.0.1"\nport = 0\napi_key = "k"\n[docker]\nnetwork_name = "${namePrefix}none"\n[secure_runtime]\ntype = "kata"\ndocker_runtime = "no-such-runtime"\n[store]\npath = "${join(folder, 'runtime.db')}"\n`)
  const run = spawnSync(process.execPath, ['server/main.ts', '--config', file], { encoding: 'utf8', timeout: 30_000 })
  t.match(run, { status: 64, stderr: /secure_runtime: the Docker engine has no runtime "no-such-runtime"; it has .*runc/ })
})

t.test('sandboxes of the original server', async (t) => {
  const [kept, ended] = [await makeOld(t, { team: 'x' }), await makeOld(t, {})]
  await using without = await startStack({ internet: nowhere })
  await using stack = await startStack({ internet: nowhere, config: { docker: { adopt: true } } })
  const known = async (of: Stack, id: string): Promise<boolean> => (await of.api.get(id)) !== undefined
  t.same([await known(without, kept.id), (await without.api.call('DELETE', `/v1/sandboxes/${kept.id}`)).status, await without.api.list()], [false, 404, []], 'without adopt nobody knows them')
  t.same((await stack.api.list()).map(({ id }) => id).sort(), [kept.id, ended.id].sort(), 'with it they are listed')
  t.match(await stack.api.get(kept.id), { status: { state: 'Running' }, image: { uri: sandboxImage }, entrypoint: ['sleep', '600'], expiresAt: kept.expiresAt, metadata: { team: 'x' } })
  t.same(await stack.api.endpoint(kept.id, 8080), { endpoint: '127.0.0.1:41234' }, 'by the ports the original published')

  t.equal((await stack.api.call('POST', `/v1/sandboxes/${kept.id}/pause`)).status, 202)
  t.equal((await docker.getContainer(kept.container).inspect()).State.Paused, true)
  t.equal((await stack.api.call('POST', `/v1/sandboxes/${kept.id}/resume`)).status, 202)
  const renew = async (milliseconds: number): Promise<void> => {
    t.equal((await stack.api.call('POST', `/v1/sandboxes/${kept.id}/renew-expiration`, { expiresAt: new Date(Date.now() + milliseconds).toISOString() })).status, 200)
  }
  await renew(3_600_000)
  await stack.server.stop('SIGKILL')
  await stack.startServer()
  t.ok(Date.parse((await stack.api.get(kept.id))?.expiresAt ?? '') > Date.now() + 3_000_000, 'a renewal survives kill -9, where the label would have it end sooner')

  t.equal((await stack.api.call('DELETE', `/v1/sandboxes/${ended.id}`)).status, 204)
  t.equal(await isThere(ended.container), false, 'deleted')
  await renew(500)
  await eventually('it expires', async () => ((await isThere(kept.container)) ? undefined : true))
  t.equal(await known(stack, kept.id), false, 'expired')

  const late = await makeOld(t, {})
  await docker.getContainer(late.container).stop({ t: 0 })
  await stack.server.stop()
  await stack.startServer()
  t.match(await stack.api.get(late.id), { status: { state: 'Failed', reason: 'CONTAINER_EXITED_ERROR' } }, 'one that has ended is shown as it is')
})

/** As the original makes one: its labels, Docker's own bridge, and nothing that is ours. */
async function makeOld(t: Test, metadata: Readonly<Record<string, string>>): Promise<{ id: string; container: string; expiresAt: string }> {
  const id = randomUUID()
  const expiresAt = new Date(Math.floor(Date.now() / 1000) * 1000 + 600_000)
  const container = await docker.createContainer({
    name: `${namePrefix}${process.pid}-${id}`, Image: sandboxImage, Entrypoint: [], Cmd: ['sleep', '600'],
    Labels: { [labels.id]: id, [labels.expiresAt]: expiresAt.toISOString().replace('.000Z', '.000000+00:00'), [labels.embeddingProxyPort]: '41233', [labels.httpPort]: '41234', ...metadata },
  })
  t.teardown(() => container.remove({ force: true, v: true }).catch(ignoreGone))
  await container.start()
  return { id, container: container.id, expiresAt: expiresAt.toISOString() }
}

async function isThere(container: string): Promise<boolean> {
  return docker.getContainer(container).inspect().then(() => true, (error: { statusCode?: number }) => {
    ignoreGone(error)
    return false
  })
}
