/** The demonstration, as a user runs it: once with its own checks, once until Ctrl-C, once where it cannot work. */
import { execa } from 'execa'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import t, { type Test } from 'tap'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import { hostLink, netns } from '#test/support/internet-layout.ts'
import { isOver, namePrefix, ownerOf } from '#test/support/leftovers.ts'
import { root } from '#test/support/program.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(180_000)

t.test('--once', async (t) => {
  const { pid, exitCode, stdout } = await demo(['--once'])
  t.equal(exitCode, 0, 'ends well', { stdout })
  t.match(stdout, /\n {2}(\d+) checks passed, 0 failed, everything removed/)
  for (const line of ['allowed name', 'denied name', 'denied address', 'metadata address', 'HTTP by host name', 'WebSocket by path', 'HTTP by header']) t.match(stdout, new RegExp(`ok +${line}`), line)
  await nothingLeft(t, pid)
})

t.test('until Ctrl-C', async (t) => {
  const { child, pid, shown } = await demoUntil('Ctrl-C ends it')
  const commands = shown.split('\n').map((line) => line.trim()).filter((line) => line.startsWith('curl '))
  t.ok(commands.length >= 4, 'it prints commands to try', { shown })
  for (const command of commands) t.match((await execa({ shell: true, timeout: 10_000 })`${command} -sS -f -o /dev/null -w %{http_code}`).stdout, '200', command)
  child.kill('SIGINT')
  t.match(await child, { exitCode: 0 }, 'Ctrl-C is a good end')
  await nothingLeft(t, pid)
})

/** The one phase that may wait for somebody else: there is one test internet on a machine. */
const waits = 'small internet'

for (const line of [waits, 'server and gateway', 'WebSocket by path']) {
  t.test(`Ctrl-C right after "${line}"`, async (t) => {
    const { child, pid } = await demoUntil(line)
    child.kill('SIGINT')
    t.match(await child, { exitCode: 130 })
    await nothingLeft(t, pid)
  })
}

for (const [victims, killed] of [['all of it', (pid: number) => [pid, ...descendants(pid)]], ['its first process alone', (pid: number) => [pid]]] as const) {
  t.test(`killed with -9, ${victims}: the next one clears up`, async (t) => {
    const { child, pid } = await demoUntil('Ctrl-C ends it')
    const started = descendants(pid)
    t.ok(started.length >= 4, 'internet, its keeper, server, gateway', { started })
    const bridge = (await docker.listNetworks()).find(({ Name }) => Name.startsWith(`${namePrefix}${pid}-`))?.Options?.['com.docker.network.bridge.name'] ?? 'none'
    t.match((await execa`nft list ruleset`).stdout, bridge, 'the kernel knows its bridge')
    for (const victim of killed(pid)) process.kill(victim, 'SIGKILL')
    await child
    const next = await demo(['--once'])
    t.equal(next.exitCode, 0, 'the next one works', { stdout: next.stdout })
    t.same(started.filter(isAlive), [], 'no program of the first is left')
    t.notMatch((await execa`nft list ruleset`).stdout, bridge, 'no rule')
    for (const owner of [pid, next.pid]) await nothingLeft(t, owner)
    const phases = readPhases(next.stdout)
    const own = phases.filter(({ name }) => name !== waits).reduce((sum, { seconds }) => sum + seconds, 0)
    t.ok(phases.length >= 18 && own < 15, `${own.toFixed(1)} s of its own work in ${phases.length} phases`)
  })
}

t.test('into a pipe that closes', async (t) => {
  const script = '"$0" test/demo/main.ts --once | head -n 5 >/dev/null; echo "${PIPESTATUS[0]}"'
  const child = execa({ cwd: root, timeout: 120_000 })`bash -c ${script} ${process.execPath}`
  t.equal((await child).stdout, '130', 'it ends as after Ctrl-C')
  t.same((await docker.listContainers({ all: true })).filter(({ Labels }) => isOver(ownerOf(Labels[labels.instance] ?? ''))), [], 'no container is left')
})

t.test('no engine', async (t) => {
  const { pid, exitCode, stdout } = await demo(['--once'], { DOCKER_HOST: 'unix:///nowhere/docker.sock' })
  t.equal(exitCode, 1)
  t.match(stdout, /FAIL server and gateway[^]*\n {2}\d+ checks passed, 1 failed: server and gateway/, 'the step that failed is named')
  await nothingLeft(t, pid)
})

/** Starts it and comes back when it has printed these words. */
async function demoUntil(words: string) {
  const child = execa({ cwd: root, reject: false, timeout: 120_000, stderr: 'inherit' })`${process.execPath} test/demo/main.ts`
  let shown = ''
  await new Promise<void>((resolve, reject) => {
    child.stdout.on('data', (text: Buffer) => {
      shown += text.toString()
      if (shown.includes(words)) resolve()
    })
    child.stdout.on('end', () => reject(new Error(`it ended by itself:\n${shown}`)))
  })
  return { child, pid: child.pid ?? 0, shown }
}

async function demo(args: readonly string[], env: Record<string, string> = {}): Promise<{ pid: number; exitCode: number | undefined; stdout: string }> {
  const child = execa({ cwd: root, env, reject: false, timeout: 120_000, stderr: 'inherit' })`${process.execPath} test/demo/main.ts ${args}`
  const { exitCode, stdout } = await child
  return { pid: child.pid ?? 0, exitCode, stdout }
}

function readPhases(stdout: string): { name: string; seconds: number }[] {
  return [...stdout.matchAll(/^ {4}ok +(.*?) +(\d+\.\d\d) s\b/gm)].map(([, name, seconds]) => ({ name: name!, seconds: Number(seconds) }))
}

/** Process ids of all that this process started and that still runs below it. */
function descendants(pid: number): number[] {
  const children = readdirSync(`/proc/${pid}/task`).flatMap((task) => readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').split(' ').filter(Boolean).map(Number))
  return children.flatMap((child) => [child, ...descendants(child)])
}

/** A process that has ended counts as gone, also where nobody collects it. */
function isAlive(pid: number): boolean {
  return existsSync(`/proc/${pid}`) && !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
}

async function nothingLeft(t: Test, pid: number): Promise<void> {
  const own = `${namePrefix}${pid}-`
  t.same((await docker.listContainers({ all: true })).filter(({ Labels }) => Labels[labels.instance]?.startsWith(own)), [], 'no container is left')
  t.same((await docker.listNetworks()).filter(({ Name }) => Name.startsWith(own)), [], 'no network')
  t.notMatch((await execa`ip netns list`).stdout, netns, 'no namespace')
  t.notMatch((await execa`ip -brief link`).stdout, hostLink, 'no link')
  t.notMatch((await execa`ps -e -o args`).stdout, own, 'no program')
}
