/** Which Docker network sandboxes are on, how it is guarded, and what is said about it. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import t from 'tap'
import { request } from 'undici'
import { EngineError, type NetworkFact } from '../../server/docker.ts'
import { HostGuard } from '../../server/host-guard.ts'
import { SandboxNetwork } from '../../server/network.ts'
import { eventually, freePort, startProgram } from '#test/support/program.ts'
import { gatewayToml, readToml } from './bench.ts'

t.setTimeout(120_000)

const top = join(import.meta.dirname, '../..')
const fact = (name: string, bridge: string): NetworkFact => ({ id: 'n', name, driver: 'bridge', bridge, subnets: ['172.30.0.0/16'], labels: {} })

/** A network, what is asked of the engine and what of nft. */
function parts(docker: string, known: readonly NetworkFact[], { racing = false } = {}) {
  const networks = new Map(known.map((each) => [each.name, each]))
  const made: string[] = []
  const rules: string[] = []
  const config = readToml(`${gatewayToml}\n[docker]\n${docker}\n`)
  const guard = config.docker.host_guard === 'off' ? null : new HostGuard(async (_args, input) => (rules.push(input), ''), async () => '')
  const network = new SandboxNetwork(config, {
    guard,
    engine: {
      network: async (name) => networks.get(name) ?? null,
      async createNetwork(name, bridge) {
        networks.set(name, fact(name, bridge))
        if (racing) throw new EngineError('network with that name already exists', 409)
        made.push(name)
      },
      removeNetwork: async () => undefined,
      users: async () => [],
    },
  })
  return { network, made, elements: (set: string) => rules.flatMap((text) => text.split('\n')).filter((line) => line.startsWith(`add element inet sallyport_host ${set} `)).map((line) => /\{ (.*) \}/.exec(line)?.[1]) }
}

t.test('the network of sandboxes', async (t) => {
  const cases: [why: string, docker: string, known: NetworkFact[], name: string, isolation: RegExp, bridges: string[], isolated: string[], made: string[]][] = [
    ['our own, made on demand', '', [], 'sallyport', /^isolated$/, ['"sallyport0"'], ['"sallyport0"'], ['sallyport']],
    ['our own, there already', '', [fact('sallyport', 'sallyport0')], 'sallyport', /^isolated$/, ['"sallyport0"'], ['"sallyport0"'], []],
    ["docker0: other people's containers are on it, so it is not ours to guard", 'default_bridge = true', [fact('bridge', 'docker0')], 'bridge', /^default bridge: neighbours are not isolated$/, [], [], []],
    ['a named one: guarded, but its neighbours are meant to be reached', 'network_mode = "theirs"', [fact('theirs', 'br-1')], 'theirs', /^named network: neighbours are not isolated$/, ['"br-1"'], [], []],
    ['without the guard', 'host_guard = "off"', [], 'sallyport', /^host guard off$/, [], [], ['sallyport']],
  ]
  for (const [why, docker, known, name, isolation, bridges, isolated, made] of cases) {
    const { network, made: asked, elements } = parts(docker, known)
    t.equal(await network.ensure(), name, why)
    t.match(network.isolation, isolation, `${why}: said openly`)
    t.same([elements('bridges'), elements('isolated'), asked], [bridges, isolated, made], why)
  }
  t.equal(await parts('', [], { racing: true }).network.ensure(), 'sallyport', 'another server was faster')
})

t.test('a network that will not do is refused', async (t) => {
  await t.rejects(parts('network_mode = "nowhere"', []).network.ensure(), { code: 'SANDBOX::INVALID_PARAMETER', message: /"nowhere" of docker\.network_mode does not exist/ })
  await t.rejects(parts('', [fact('sallyport', 'br-9')]).network.ensure(), { code: 'DOCKER::SANDBOX_START_FAILED', message: /another bridge/ }, 'ours is guarded by the name of its bridge')
})

t.test('the rules cannot be set: no start, unless the operator says that sandboxes may reach the host', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-guard-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const file = join(folder, 'config.toml')
  const port = await freePort()
  // No nft on the path, and no engine either: neither is asked for before the guard.
  const env = { PATH: folder, DOCKER_HOST: `unix://${join(folder, 'none.sock')}` }
  const write = (guard: string): void => writeFileSync(file, `[server]\nhost = "127.0.0.1"\nport = ${port}\napi_key = "k"\n[docker]\nhost_guard = "${guard}"\nhost_gaurd = "on"\n[egress]\ndns_upstreams = ["198.51.100.53"]\n[store]\npath = "${join(folder, 'a.db')}"\n`)
  write('on')
  const refused = await execa(process.execPath, ['server/main.ts', '--config', file], { cwd: top, env, reject: false, timeout: 60_000 })
  t.equal(refused.exitCode, 77)
  t.match(refused.stderr, /^sallyport server: the host guard cannot be set: .*\[docker\] host_guard = "off"/)
  t.equal(refused.stdout, '', 'nothing was opened')

  write('off')
  const url = `http://127.0.0.1:${port}`
  await using server = await startProgram({ args: ['server/main.ts', '--config', file], env, seconds: 60, ready: () => request(`${url}/health`).then(({ body }) => body.dump()).then(() => true) })
  const ready = await request(`${url}/health/ready`)
  t.match([ready.statusCode, await ready.body.json()], [503, { checks: { engine: 'unreachable', host_guard: 'off', isolation: 'host guard off' } }], 'started, and says so')
  t.match(server.log(), /"event":"host-guard-off"/)
  await eventually('and which keys it does not know', async () => /"event":"config-ignored","keys":\["docker\.host_gaurd"\]/.test(server.log()) || undefined)
})
