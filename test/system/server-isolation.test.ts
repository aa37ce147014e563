/**
 * What holds the keys stays out of reach: the lifecycle server, the gateway and its operator's port, and the Docker API, each open on every
 * address of the host, IPv4 and IPv6. A plain container gets an answer from all of them; a sandbox, with and without a policy, from none.
 */
import { execa } from 'execa'
import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { connect, createServer, type AddressInfo } from 'node:net'
import { networkInterfaces } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker, exec, sandboxImage } from '#test/support/containers.ts'
import type { Internet } from '#test/support/internet.ts'
import { ignoreGone, namePrefix, ownerLabel } from '#test/support/leftovers.ts'
import { freePort, startProgram } from '#test/support/program.ts'
import { startStack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

/** Nothing here leaves the host. */
const nowhere = { dns: '198.51.100.53:53', fence: async () => undefined } as Pick<Internet, 'dns' | 'fence'> as Internet
/** Asks every `[address, port]` for a page at once; prints which of them answered in HTTP. */
const ask = `
import json, socket, sys, threading
places, answered = json.loads(sys.argv[1]), []
def one(index, address, port):
    try:
        s = socket.create_connection((address, port), timeout=2)
        s.sendall(b'GET /_ping HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n')
        if s.recv(5) == b'HTTP/': answered.append(index)
    except OSError: pass
threads = [threading.Thread(target=one, args=(i, a, p)) for i, (a, p) in enumerate(places)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(sorted(answered)))`

t.test('server, gateway, its operator and Docker', async (t) => {
  await using plain = await startPlain()
  await using engine = await serveEngine()
  await using stack = await startStack({ internet: nowhere, gateways: ['uri'], config: { server: { host: '::' } } })
  const [gatewayPort, adminPort] = [await freePort(0), await freePort(0)]
  const routes = join(stack.folder, 'routes.json')
  await writeFile(routes, '{"sandboxes":[]}')
  const listens = (): Promise<boolean> => new Promise((resolve) => {
    const socket = connect(adminPort, '127.0.0.1', () => { socket.destroy(); resolve(true) }).on('error', () => resolve(false))
  })
  await using _gateway = await startProgram({ args: ['gateway/main.ts', '--host', '::', '--port', String(gatewayPort), '--admin-host', '::', '--admin-port', String(adminPort), '--mode', 'uri', '--provider', 'static', '--routes', routes], ready: listens })
  const services: [name: string, port: number][] = [['the lifecycle server', Number(new URL(stack.api.url).port)], ['the gateway', gatewayPort], ["the gateway's operator port", adminPort], ['the Docker API', engine.port]]
  const sandboxes = [['without a policy', await stack.create({ entrypoint: ['sleep', '600'] })], ['that may go anywhere', await stack.create({ entrypoint: ['sleep', '600'], networkPolicy: { defaultAction: 'allow' } })], ['that may go nowhere', await stack.create({ entrypoint: ['sleep', '600'], networkPolicy: { defaultAction: 'deny' } })]] as const

  /** As somebody behind this bridge would write them. */
  const addresses = async (bridge: string): Promise<string[]> => {
    const outward = JSON.parse((await execa`ip -j route show default`).stdout) as { dev: string }[]
    const links = [...new Set([bridge, plain.bridge, 'docker0', ...outward.map(({ dev }) => dev)])]
    const all = links.flatMap((link) => (networkInterfaces()[link] ?? []).filter(({ address }) => link === bridge || !address.startsWith('fe80:')))
    return all.flatMap(({ address, family }) => (family === 'IPv4' ? [address, `::ffff:${address}`] : [address.startsWith('fe80:') ? `${address}%eth0` : address]))
  }
  const answered = async (container: string, bridge: string): Promise<{ tried: string[]; heard: string[] }> => {
    const places = services.flatMap(([name, port]) => addressesOf.get(bridge)!.map((address) => ({ name, address, port })))
    const { stdout, stderr } = await exec(container, ['python3', '-c', ask, JSON.stringify(places.map(({ address, port }) => [address, port]))], 20)
    if (stdout === '') throw new Error(stderr)
    const say = ({ name, address }: { name: string; address: string }): string => `${name} at ${address}`
    return { tried: places.map(say), heard: (JSON.parse(stdout) as number[]).map((index) => say(places[index]!)) }
  }
  const addressesOf = new Map([[plain.bridge, await addresses(plain.bridge)], [stack.bridge, await addresses(stack.bridge)]])
  t.ok(addressesOf.get(plain.bridge)!.some((address) => /^f[cd]/.test(address)) && addressesOf.get(plain.bridge)!.some((address) => address.endsWith('%eth0')), 'IPv6 of both kinds is tried', { addresses: [...addressesOf] })
  const seen = await answered(plain.id, plain.bridge)
  t.same(seen.heard, seen.tried, 'a plain container hears from all of them, everywhere')
  for (const [kind, sandbox] of sandboxes) {
    const { heard, tried } = await answered(sandbox.main, stack.bridge)
    t.ok(tried.length >= seen.tried.length)
    t.same(heard, [], `a sandbox ${kind} hears from none`)
    t.not((await sandbox.run(['sh', '-c', 'ls /run/docker.sock /var/run/docker.sock /run/containerd/containerd.sock'])).code, 0, 'nor is there a socket of the engine inside')
  }
})

/** A container of Docker's own making, on a bridge with IPv6. */
async function startPlain(): Promise<{ id: string; bridge: string } & AsyncDisposable> {
  const tag = process.pid.toString(16).padStart(4, '0').slice(-4)
  const [name, bridge] = [`${namePrefix}${process.pid}-six`, `spt-six${tag}`]
  const network = await docker.createNetwork({ Name: name, Driver: 'bridge', EnableIPv6: true, IPAM: { Driver: 'default', Config: [{ Subnet: `fd5a:1170:${tag}::/64`, Gateway: `fd5a:1170:${tag}::1` }] }, Options: { 'com.docker.network.bridge.name': bridge }, Labels: { [ownerLabel]: String(process.pid) } })
  const container = await docker.createContainer({ name, Image: sandboxImage, Entrypoint: ['sleep', '600'], Labels: { [ownerLabel]: String(process.pid) }, HostConfig: { NetworkMode: name } })
  await container.start()
  return {
    id: container.id,
    bridge,
    async [Symbol.asyncDispose]() {
      await container.remove({ force: true, v: true }).catch(ignoreGone)
      await network.remove().catch(ignoreGone)
    },
  }
}

/** The engine's API over TCP, as careless people open it. */
async function serveEngine(): Promise<{ port: number } & AsyncDisposable> {
  const path = (process.env['DOCKER_HOST'] ?? '').replace(/^unix:\/\//, '') || '/var/run/docker.sock'
  const server = createServer((socket) => {
    const engine = connect(path)
    for (const [side, other] of [[socket, engine], [engine, socket]] as const) side.on('error', () => other.destroy()).on('close', () => other.destroy())
    socket.pipe(engine).pipe(socket)
  })
  server.listen(0, '::')
  await once(server, 'listening')
  return {
    port: (server.address() as AddressInfo).port,
    async [Symbol.asyncDispose]() {
      server.close()
      await once(server, 'close')
    },
  }
}
