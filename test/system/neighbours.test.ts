/**
 * What a sandbox is not told to leave alone by its policy, and must still not reach: the machine it runs on and the sandboxes
 * beside it. Judged by what arrives there: connections on the host, packets in the neighbour's namespace.
 */
import { createSocket } from 'node:dgram'
import { execa } from 'execa'
import { once } from 'node:events'
import { createServer, type AddressInfo } from 'node:net'
import { networkInterfaces } from 'node:os'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attack, attackTogether } from '#test/support/attack.ts'
import { createNetwork, docker } from '#test/support/containers.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack, type Sandbox, type Stack } from '#test/support/stack.ts'
import { watchArrivals } from '#test/support/watch.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const resolver = '198.51.100.53'
const allowAll = { defaultAction: 'allow' }
const denyAll = { defaultAction: 'deny' }

t.test('the host and its services', async (t) => {
  await using internet = await startInternet()
  await using network = await createNetwork('host')
  await using host = await openHost()
  const plain = await network.run()
  await using stack = await startStack({ internet })
  const sandboxes = await attackers(stack)
  const own = await hostAddresses([network.bridge, stack.bridge])
  t.ok(own.length >= 4, 'the host has addresses to try', { own })

  const tries = own.flatMap((address) => ['tcp', 'udp'].map((protocol) => [protocol, address, String(host.port)]))
  for (const [index, said] of (await attackTogether(plain.id, tries)).entries()) t.equal(said, 'ok', `${tries[index]!.join(' ')} answers a plain container`)
  t.equal(host.take(), tries.length)
  const said = await Promise.all([...sandboxes].map(async ([kind, sandbox]) => [kind, await attackTogether(sandbox.main, tries)] as const))
  t.equal(host.take(), 0, 'nothing arrives on the host', { tries, said })
  for (const [kind, answers] of said) t.notMatch(answers, /ok/, `nor is anything answered to a sandbox ${kind}`)
})

t.test('a port that somebody publishes on the host', async (t) => {
  await using internet = await startInternet()
  await using network = await createNetwork('published')
  await using stack = await startStack({ internet })
  const published = await network.run({ Entrypoint: ['node', '/opt/sallyport/app.mjs'], ExposedPorts: { '8080/tcp': {} }, HostConfig: { PortBindings: { '8080/tcp': [{ HostIp: '0.0.0.0', HostPort: '' }] } } })
  const { NetworkSettings } = await docker.getContainer(published.id).inspect()
  const port = NetworkSettings.Ports['8080/tcp']![0]!.HostPort
  const sandboxes = await Promise.all([stack.create(), stack.create({ networkPolicy: allowAll })])
  await using other = await createNetwork('outside')
  const plain = await other.run()
  const tries = (await hostAddresses([network.bridge, stack.bridge])).map((address) => ['tcp', address, port, 'knock\r\n\r\n'])
  t.same(await attackTogether(plain.id, tries), tries.map(() => 'ok'), 'on every address of the host it answers a plain container of another network', { tries })
  for (const said of await Promise.all(sandboxes.map((sandbox) => attackTogether(sandbox.main, tries)))) t.notMatch(said, /ok/, 'and no sandbox')
})

t.test('the sandboxes beside it', async (t) => {
  await using internet = await startInternet()
  await using network = await createNetwork('beside')
  const plain = await network.run({ HostConfig: { Dns: [resolver] } })
  const target = await network.run({ Entrypoint: ['node', '/opt/sallyport/app.mjs'], HostConfig: { Dns: [resolver] } })
  await using stack = await startStack({ internet })
  const sandboxes = await attackers(stack)
  const [open, guarded] = await Promise.all([stack.create(), stack.create({ networkPolicy: allowAll })])
  const victims = new Map([['without a policy', open], ['with a policy', guarded]])
  const tries = (address: string): string[][] => [
    ['tcp', address, '8080', 'GET'],
    ['tcp', address, '18080', 'GET'],
    ['udp', address, '53'],
    ['udp', address, '5000', '9000'],
    ['ping', address],
  ]
  const watched = await watchArrivals(target.id)
  for (const each of tries(target.address)) {
    await attackTogether(plain.id, [each])
    t.ok((await watched.count([plain.address])) > 0, `${each.join(' ')}: arrives between plain containers`)
  }
  for (const [victimKind, victim] of victims) {
    const watch = await watchArrivals(victim.main)
    const said = await Promise.all([...sandboxes.values()].map((attacker) => attackTogether(attacker.main, tries(victim.address))))
    const from = [...sandboxes.values()].map(({ address }) => address)
    t.equal(await watch.count(from), 0, `no packet from any of them to a sandbox ${victimKind}`, { kinds: [...sandboxes.keys()], said })
  }

  const plainName = await attack(plain.id, 'reverse', target.address)
  t.match(plainName.stdout, /sp-test-/, "Docker tells a plain container its neighbour's name")
  for (const [kind, attacker] of sandboxes) {
    for (const victim of victims.values()) {
      const { stdout } = await attack(attacker.main, 'reverse', victim.address)
      t.notMatch(stdout, victim.id, `the neighbour's name does not tell its id to a sandbox ${kind}`, { stdout })
    }
    const own = await attacker.run(['sh', '-c', 'hostname; cat /etc/hosts; env; cat /proc/self/cgroup /proc/self/mountinfo'])
    t.notMatch(own.stdout, attacker.id, 'nor does a sandbox know its own id')
  }
  await namesAreHashes(t, [...sandboxes.values(), ...victims.values()])
})

async function attackers(stack: Stack): Promise<ReadonlyMap<string, Sandbox>> {
  const [plain, free, shut] = await Promise.all([stack.create(), stack.create({ networkPolicy: allowAll }), stack.create({ networkPolicy: denyAll })])
  return new Map([['without a policy', plain], ['that may go anywhere', free], ['that may go nowhere', shut]])
}

async function namesAreHashes(t: { notMatch: (found: unknown, pattern: string, message: string) => unknown }, sandboxes: readonly Sandbox[]): Promise<void> {
  for (const sandbox of sandboxes) {
    for (const container of [sandbox.main, sandbox.sidecar].filter((id) => id !== undefined)) {
      const { Name, Config, NetworkSettings } = await docker.getContainer(container).inspect()
      const names = JSON.stringify([Name, Config.Hostname, Object.values(NetworkSettings.Networks).map((network) => [network.Aliases, network.Links])])
      t.notMatch(names, sandbox.id, 'no name or alias in Docker holds the id')
    }
  }
}

/** One address of the host of every kind: on the way out, on Docker's bridge, on these bridges, on the way to the tests' internet. */
async function hostAddresses(bridges: readonly string[]): Promise<string[]> {
  const [route] = JSON.parse((await execa`ip -j route get ${resolver}`).stdout) as { prefsrc: string }[]
  const outward = JSON.parse((await execa`ip -j -4 route show default`).stdout) as { dev: string }[]
  const links = [...bridges, 'docker0', ...outward.map(({ dev }) => dev)]
  return [route!.prefsrc, ...links.flatMap((link) => networkInterfaces()[link] ?? []).filter(({ family }) => family === 'IPv4').map(({ address }) => address)]
}

interface Host extends AsyncDisposable {
  readonly port: number
  /** Connections and datagrams since the last call. */
  take(): number
}

/** A service of the host, TCP and UDP on one port of every address, that echoes. */
async function openHost(): Promise<Host> {
  let seen = 0
  const tcp = createServer((socket) => {
    seen++
    socket.on('error', () => undefined).pipe(socket)
  })
  tcp.listen(0, '0.0.0.0')
  await once(tcp, 'listening')
  const { port } = tcp.address() as AddressInfo
  const udp = createSocket('udp4')
  udp.on('message', (bytes, peer) => {
    seen++
    udp.send(bytes, peer.port, peer.address)
  })
  udp.bind(port)
  await once(udp, 'listening')
  return {
    port,
    take() {
      const count = seen
      seen = 0
      return count
    },
    async [Symbol.asyncDispose]() {
      tcp.close()
      udp.close()
      await once(tcp, 'close')
    },
  }
}
