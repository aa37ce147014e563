/** `npm start` as its user sees it: keys made once and kept to their owner, two processes that live and end together. */
import { execa } from 'execa'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { parse, stringify } from 'smol-toml'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import { ignoreGone, namePrefix } from '#test/support/leftovers.ts'
import { eventually, freePort, root } from '#test/support/program.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

type Config = Record<string, Record<string, unknown>>

/** A state folder with new keys, on free ports and an instance and network of this test. */
async function prepare(t: Test): Promise<{ folder: string; server: string; gateway: string; config: Config }> {
  const folder = mkdtempSync(path.join(tmpdir(), `${namePrefix}${process.pid}-start`))
  const network = path.basename(folder)
  t.teardown(async () => {
    await docker.getNetwork(network).remove().catch(ignoreGone)
    rmSync(folder, { recursive: true })
  })
  await execa(process.execPath, ['deploy/start.ts', '--prepare', '--state', folder], { cwd: root })
  const file = path.join(folder, 'config.toml')
  const config = parse(readFileSync(file, 'utf8')) as Config
  const [server, gateway] = [await freePort(), await freePort()]
  config['server']!['port'] = server
  config['docker'] = { network_mode: 'bridge', network_name: network, bridge_name: `spt-${network.slice(-6)}`, instance: network }
  config['ingress']!['gateway'] = { address: `*.sandbox.localhost:${gateway}`, route: { mode: 'wildcard' } }
  writeFileSync(file, stringify(config))
  return { folder, server: `http://127.0.0.1:${server}`, gateway: `http://127.0.0.1:${gateway}`, config }
}

function start(t: Test, folder: string) {
  const child = execa(process.execPath, ['deploy/start.ts', '--state', folder], { cwd: root, reject: false, all: true })
  t.teardown(async () => {
    child.kill('SIGTERM')
    await child
  })
  let said = ''
  let over = false
  child.all.setEncoding('utf8').on('data', (text: string) => (said += text))
  void child.then(() => (over = true))
  const ready = () =>
    eventually('start says where to go', async () => {
      if (over) throw new Error(said)
      return said.includes('Ctrl-C ends both') ? true : undefined
    }, 60)
  return { child, ready, said: () => said }
}

/** Process ids of our programs whose command line names the state folder or, for the gateway, its files. */
function programs(folder: string): { pid: number; args: string }[] {
  return readdirSync('/proc').filter((name) => /^\d+$/.test(name)).flatMap((pid) => {
    try {
      const args = readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ')
      return args.includes(folder) && /(server|gateway)\/main\.ts/.test(args) ? [{ pid: Number(pid), args }] : []
    } catch {
      return []
    }
  })
}

t.test('the first run makes keys, for their owner alone', async (t) => {
  const { folder, config } = await prepare(t)
  for (const name of ['config.toml', 'route-token', 'access-keys']) t.equal(statSync(path.join(folder, name)).mode & 0o777, 0o600, name)
  const other = await prepare(t)
  for (const [table, key] of [['server', 'api_key'], ['ingress', 'route_token'], ['ingress', 'secure_access']] as const) t.notSame(config[table]![key], other.config[table]![key], `${table}.${key} is random`)
  const before = readFileSync(path.join(folder, 'config.toml'), 'utf8')
  await execa(process.execPath, ['deploy/start.ts', '--prepare', '--state', folder], { cwd: root })
  t.equal(readFileSync(path.join(folder, 'config.toml'), 'utf8'), before, 'a second run changes nothing')
})

t.test('both answer, no secret stands in a command line, and one signal ends both', async (t) => {
  const { folder, server, gateway, config } = await prepare(t)
  const { child, ready, said } = start(t, folder)
  await ready()
  t.equal((await fetch(`${gateway}/status.ok`)).status, 200)
  t.equal((await fetch(`${server}/v1/sandboxes`)).status, 401, 'without the key')
  const key = String(config['server']!['api_key'])
  t.equal((await fetch(`${server}/v1/sandboxes`, { headers: { 'open-sandbox-api-key': key } })).status, 200, 'with it')
  const running = programs(folder)
  t.equal(running.length, 2)
  const secrets = [key, String(config['ingress']!['route_token']), readFileSync(path.join(folder, 'access-keys'), 'utf8').trim().slice(2)]
  for (const secret of secrets) t.notOk(running.some(({ args }) => args.includes(secret)) || said().includes(secret), 'kept')
  child.kill('SIGTERM')
  t.equal((await child).exitCode, 0)
  t.strictSame(programs(folder), [])
})

t.test('when one dies the other is ended, and start says which', async (t) => {
  for (const name of ['server', 'gateway']) {
    const { folder } = await prepare(t)
    const { child, ready, said } = start(t, folder)
    await ready()
    process.kill(programs(folder).find(({ args }) => args.includes(`${name}/main.ts`))!.pid, 'SIGKILL')
    t.equal((await child).exitCode, 1)
    t.match(said(), new RegExp(`the ${name} ended with SIGKILL`))
    t.strictSame(programs(folder), [])
  }
})

t.test('a configuration with a mistake is named, and nothing stays', async (t) => {
  for (const [mistake, wanted] of [
    [(config: Config) => (config['server']!['port'] = 70000), /server\.port: must be <= 65535[\s\S]*the server ended with exit 64/],
    [(config: Config) => (config['ingress'] = { mode: 'gateway', gateway: { address: 5 }, secure_access: { keys: 5 } }), /ingress\.secure_access\.keys\[0\]: must be object[\s\S]*the server ended with exit 64/],
    ['not toml', /config\.toml: Invalid TOML/],
  ] as const) {
    const { folder, config } = await prepare(t)
    if (typeof mistake === 'function') mistake(config)
    writeFileSync(path.join(folder, 'config.toml'), typeof mistake === 'function' ? stringify(config) : mistake)
    const { exitCode, all } = await start(t, folder).child
    t.equal(exitCode, 64, 'wrong configuration')
    t.match(all, wanted)
    t.strictSame(programs(folder), [])
  }
})
