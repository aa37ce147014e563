/** Set-up starts a Docker engine where none answers, also after one was killed. On an engine of its own: the shared one is left alone. */
import { execa } from 'execa'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import path from 'node:path'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'

await needs('root', 'dockerd', 'netns')
t.setTimeout(180_000)

/** Docker's own default places, private: an empty /run, a data folder of the test, no network but what the engine makes. */
const privateMachine = 'set -e; mount -t tmpfs tmpfs /run; mkdir -p /var/lib/docker; mount --bind "$1" /var/lib/docker; ip link set lo up; exec "$2" "$3" "$4"'

t.test('an engine is started, and started again after every kind of end', async (t) => {
  const folder = mkdtempSync(path.join(tmpdir(), 'sp-test-engine-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  const log = path.join(folder, 'dockerd.log')
  const data = mkdtempSync(path.join(folder, 'data-'))
  const inside = path.join(import.meta.dirname, 'engine-inside.ts')
  const { DOCKER_HOST: _, ...env } = process.env
  const run = await execa('unshare', ['-n', '-m', '-p', '--fork', '--kill-child', '--mount-proc', '--propagation', 'private', 'sh', '-c', privateMachine, 'sh', data, process.execPath, inside, log], { env, extendEnv: false, reject: false, all: true, timeout: 150_000 })
  if (run.failed) return void t.fail(`${run.all}\n${readFileSync(log, { encoding: 'utf8', flag: 'a+' }).slice(-3000)}`)

  const seen = JSON.parse(run.stdout) as Record<string, unknown>
  const started = [/^Docker engine: starting/, /^Docker engine started/]
  t.equal(seen['before'], false, 'the private machine has no engine')
  t.match(seen['first'], started)
  t.equal(seen['session'], true, 'dockerd has a session of its own')
  t.match(seen['again'], [/already there/], 'an engine that answers is left as it is')
  t.equal(seen['killed'], false)
  t.match(seen['afterKill'], started, 'killed: its pid file and socket are not in the way')
  t.equal(seen['network'], true, 'and what it held is there again')
  t.match(seen['afterForeignPid'], started, 'killed with containerd, and other processes have their numbers now')
  t.equal(seen['alive'], true)
  t.match(seen['afterNoSocket'], started, 'an empty pid file and no socket')
})
