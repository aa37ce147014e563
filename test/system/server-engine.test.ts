/** What the server asks the Docker engine, seen from between the two: secrets travel in bodies, never in request lines. */
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { labels } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import { startEngineProxy } from '#test/support/engine-proxy.ts'
import type { Internet } from '#test/support/internet.ts'
import { namePrefix } from '#test/support/leftovers.ts'
import { startStack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(120_000)

/** Nothing here leaves the sandbox's own bridge, so no internet is needed. */
const nowhere = { dns: '198.51.100.53:53', fence: async () => undefined } as Pick<Internet, 'dns' | 'fence'> as Internet
/** More than a Node proxy in between takes as headers (16 KiB), less than one environment string may hold. */
const long = 'x'.repeat(100_000)

t.test('a create repeats nothing of its body in the request line', async (t) => {
  await using proxy = await startEngineProxy(join(tmpdir(), `${namePrefix}${process.pid}-paths.sock`))
  const paths: string[] = []
  proxy.hook = ({ method, path }, moment) => {
    if (moment === 'before') paths.push(`${method} ${decodeURIComponent(path)}`)
    return 'pass'
  }
  await using stack = await startStack({ internet: nowhere, env: { DOCKER_HOST: proxy.dockerHost } })
  const sandbox = await stack.create({ networkPolicy: { egress: [] }, env: { PASSWORD: 'secret-of-the-user', LONG: long }, metadata: { team: 'meta-of-the-user' }, platform: { os: 'linux', arch: process.arch === 'arm64' ? 'arm64' : 'amd64' } })
  const main = await docker.getContainer(sandbox.main).inspect()
  t.ok(main.Config.Env.includes('PASSWORD=secret-of-the-user') && main.Config.Env.includes(`LONG=${long}`), 'the body arrives')
  t.match(main.Name, /^\/\S+$/, 'and so does the name')
  const token = main.Config.Labels[labels.egressAuthToken] ?? ''
  t.not(token, '')

  const creates = paths.filter((path) => path.startsWith('POST /containers/create'))
  t.ok(creates.length >= 2, 'sidecar and main were seen', { creates })
  t.ok(paths.some((path) => path.startsWith('POST /networks/create')), 'the network too')
  for (const secret of ['secret-of-the-user', 'meta-of-the-user', token, 'OPENSANDBOX_EGRESS_TOKEN', 'Entrypoint', 'xxxx']) {
    t.same(paths.filter((path) => path.includes(secret)), [], `no request line holds ${secret === token ? 'the egress token' : secret}`)
  }
  t.same(creates.filter((path) => path.length > 200), [], 'they are short')
  await sandbox.remove()
})
