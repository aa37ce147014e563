/**
 * The Docker engine is restarted, or killed, underneath the server: what becomes of sandboxes, and of the server. On an engine of its own, in
 * namespaces of their own: the shared one is left alone.
 */
import { execa } from 'execa'
import { createWriteStream, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { pipeline } from 'node:stream/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'

await needs('root', 'docker', 'dockerd', 'nft', 'iptables', 'netns')
t.setTimeout(230_000)

/** Docker's own default places, private: an empty /run, a data folder of the test, no network but what the engine makes. */
const privateMachine = 'set -e; mount -t tmpfs tmpfs /run; mkdir -p /var/lib/docker; mount --bind "$1" /var/lib/docker; ip link set lo up; shift; exec "$@"'

t.test('every sandbox ends and none runs on without its rules; the server goes on, and makes new ones, without a restart of its own', async (t) => {
  const folder = mkdtempSync(path.join(tmpdir(), 'sp-engine-restart-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  const [log, images, data] = [path.join(folder, 'dockerd.log'), path.join(folder, 'images.tar'), mkdtempSync(path.join(folder, 'data-'))]
  await pipeline(await docker.getImage('sallyport/egress:local').get(), createWriteStream(images))
  // What the stack inside sweeps up is what it finds in its own temporary folder: other runs look dead from there.
  const { DOCKER_HOST: _, ...rest } = process.env
  const env = { ...rest, TMPDIR: folder }
  const run = await execa('unshare', ['-n', '-m', '-p', '--fork', '--kill-child', '--mount-proc', '--propagation', 'private', 'sh', '-c', privateMachine, 'sh', data, process.execPath, path.join(import.meta.dirname, 'server-engine-inside.ts'), log, images], { env, extendEnv: false, reject: false, all: true, timeout: 200_000 })
  if (run.failed) return void t.fail(`${run.all}\n${readFileSync(log, { encoding: 'utf8', flag: 'a+' }).slice(-3000)}`)

  const seen = JSON.parse(run.stdout.split('\n').at(-1)!) as Record<string, unknown>
  for (const how of ['restarted', 'killed']) {
    t.match(seen[how], {
      // A clear refusal, and reads as ever.
      away: { listed: 2, create: { status: 503, body: { code: 'DOCKER::SANDBOX_START_FAILED', message: 'The Docker engine cannot be reached.' } }, ready: 503 },
      leaked: 0,
      next: 0,
      nothing: 0,
    }, how)
    const { after, left } = seen[how] as { after: string[]; left: string[] }
    t.equal(after.length, 2, `${how}: both are still listed`)
    // An engine that stops its containers may stop the sidecar first, while the server still listens.
    for (const status of after) t.match(status, /^Failed (CONTAINER_EXITED_ERROR|EGRESS_GONE)$/, how)
    // Dead is one that the engine is removing.
    t.same(left.filter((each) => !/^main (exited|dead)$/.test(each)), [], `${how}: nothing runs, and no sidecar is left`)
  }
})
