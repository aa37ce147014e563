/**
 * The disk under the server's store is full. Creates, renewals and changes of metadata answer an error and change nothing; sandboxes that are
 * there go on, are kept in, expire, and can be deleted, for that is how room is made. With room again, everything works as before.
 */
import { closeSync, existsSync, mkdirSync, openSync, readdirSync, rmdirSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import t, { type Test } from 'tap'
import { request } from 'undici'
import { needs } from '#test/support/abilities.ts'
import type { ErrorBody, SandboxBody } from '#test/support/api.ts'
import { docker } from '#test/support/containers.ts'
import { startFence } from '#test/support/fence.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox } from '#test/support/stack.ts'
import { Store } from '../../server/store.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(180_000)

const policy = { networkPolicy: { egress: [] }, entrypoint: ['sleep', '3600'] }
const prefix = 'sallyport-small-disk-'

t.test("the store's disk is full: nothing half-made, nothing lost, and it goes on when there is room again", async (t) => {
  const disk = await smallDisk(t)
  await using fence = await startFence()
  await using stack = await startStack({ internet: fence, config: { store: { path: join(disk.folder, 'sallyport.db') } } })
  const [kept, unguarded, deleted, expiring] = await Promise.all([1, 2, 3, 4].map(() => stack.create(policy))) as [Sandbox, Sandbox, Sandbox, Sandbox]
  const renew = (sandbox: Sandbox, at: number) => stack.api.call<SandboxBody & ErrorBody>('POST', `/v1/sandboxes/${sandbox.id}/renew-expiration`, { expiresAt: new Date(at).toISOString() })
  const patch = (metadata: object) => stack.api.call<SandboxBody & ErrorBody>('PATCH', `/v1/sandboxes/${kept.id}/metadata`, metadata)
  const ready = async (): Promise<number> => request(`${stack.api.url}/health/ready`).then(async (answer) => (await answer.body.dump(), answer.statusCode))
  t.equal((await renew(expiring, Date.now() + 8000)).status, 200)
  t.equal((await patch({ step: 'before' })).status, 200)
  const [before, containers] = [await stack.api.get(kept.id), (await stack.containers()).length]
  t.equal(await ready(), 200)

  t.ok(recorded().includes(deleted.id))
  disk.fill()
  const refused = { status: 500, body: { code: 'SERVER::STORE_FAILED', message: 'The server could not write its store; nothing was changed.' } }
  t.match(await stack.api.call('POST', '/v1/sandboxes', { image: { uri: 'sallyport/sandbox:local' }, resourceLimits: {}, ...policy }), refused, 'a create is refused')
  t.same([(await stack.api.list()).length, (await stack.containers()).length], [4, containers], 'nothing half-made')
  t.match(await renew(kept, Date.now() + 900_000), refused, 'a renewal too')
  t.match(await patch({ step: 'after' }), refused, 'and a change of metadata')
  t.equal(await ready(), 503, 'readiness says so')
  t.same(await stack.api.get(kept.id), before, 'nothing changed')
  for (const [verb, state] of [['pause', 'Paused'], ['resume', 'Running']] as const) {
    t.equal((await stack.api.call('POST', `/v1/sandboxes/${kept.id}/${verb}`)).status, 202)
    t.equal((await stack.api.get(kept.id))?.status.state, state, `${verb} needs no disk`)
  }

  t.equal((await stack.api.call('DELETE', `/v1/sandboxes/${deleted.id}`)).status, 204, 'one can be deleted')
  await docker.getContainer(unguarded.sidecar!).kill()
  t.match(await eventually('the sandbox without its guard has ended', async () => {
    const { status } = (await stack.api.get(unguarded.id))!
    return status.state === 'Failed' ? status : undefined
  }), { reason: 'EGRESS_GONE' }, 'one that loses its guard ends, with the reason')
  await eventually('the one whose time is over is gone', async () => ((await stack.api.get(expiring.id)) === undefined ? true : undefined))
  await onlyLeft([kept], 'whoever was to end has ended, the other goes on')

  disk.empty()
  t.equal(await ready(), 200, 'there is room again, and readiness notices')
  t.notOk(recorded().includes(deleted.id), 'what could not be struck out is struck out now')
  t.equal((await patch({ step: 'after' })).status, 200)
  const late = await stack.create(policy)
  await stack.server.stop('SIGKILL')
  await stack.startServer()
  t.equal((await stack.api.get(kept.id))?.metadata?.['step'], 'after', 'what was answered is kept')
  t.same((await stack.api.list()).map(({ id, status }) => [id, status.state]).filter(([id]) => id !== unguarded.id).sort(), [[kept.id, 'Running'], [late.id, 'Running']].sort(), 'a server that is killed now knows the same')
  await onlyLeft([kept, late], 'and nothing of the others comes back')

  function recorded(): string[] {
    const store = new Store(join(disk.folder, 'sallyport.db'))
    try {
      return store.all().map(({ id }) => id)
    } finally {
      store.close()
    }
  }

  async function onlyLeft(sandboxes: readonly Sandbox[], why: string): Promise<void> {
    const wanted = sandboxes.flatMap(({ main, sidecar }) => [main, sidecar!]).sort()
    const found = async (): Promise<string[]> => (await stack.containers()).map(({ Id }) => Id).sort()
    await eventually(why, async () => ((await found()).join() === wanted.join() ? true : undefined)).catch(() => undefined)
    t.same(await found(), wanted, why)
  }
})

/** A tmpfs of 2 MiB, and a file that takes all that is left of it. Those of tests that were killed are taken away first. */
async function smallDisk(t: Test): Promise<{ folder: string; fill(): void; empty(): void }> {
  for (const name of readdirSync(tmpdir())) if (name.startsWith(prefix) && !existsSync(`/proc/${name.slice(prefix.length)}`)) await unmount(join(tmpdir(), name))
  const folder = join(tmpdir(), `${prefix}${process.pid}`)
  mkdirSync(folder)
  await execa`mount -t tmpfs -o size=2m,mode=700 tmpfs ${folder}`
  t.teardown(() => unmount(folder))
  const ballast = join(folder, 'ballast')
  return {
    folder,
    fill() {
      const file = openSync(ballast, 'w')
      try {
        for (;;) writeSync(file, Buffer.alloc(4096))
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error
      } finally {
        closeSync(file)
      }
    },
    empty: () => rmSync(ballast),
  }
}

async function unmount(folder: string): Promise<void> {
  await execa({ reject: false })`umount -l ${folder}`
  rmdirSync(folder)
}
