/** A deleted sandbox is gone: container, network endpoint, link, namespace, process, cgroup, file, mount, rule, volume. */
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import { startInternet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type CreateOptions, type Sandbox, type Stack } from '#test/support/stack.ts'
import { findTraces, readMarks, type Traces } from '#test/support/traces.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const policy = { networkPolicy: { egress: [{ action: 'allow', target: 'allowed.example' }] } }
const nothing: Traces = { containers: [], endpoints: [], links: [], processes: [], namespaces: [], cgroups: [], files: [], mounts: [], rules: [], volumes: [] }

const cases: [why: string, options: CreateOptions, end: (stack: Stack, sandbox: Sandbox) => Promise<unknown>][] = [
  ['deleted', policy, (_stack, sandbox) => sandbox.remove()],
  ['deleted, without a policy', {}, (_stack, sandbox) => sandbox.remove()],
  ['deleted while paused', policy, async (stack, sandbox) => {
    const { status } = await stack.api.call('POST', `/v1/sandboxes/${sandbox.id}/pause`)
    if (status !== 202) throw new Error(`pause answered ${status}`)
    await sandbox.remove()
  }],
  ['deleted by two clients at once', policy, (stack, sandbox) => Promise.all([stack.api.call('DELETE', `/v1/sandboxes/${sandbox.id}`), stack.api.call('DELETE', `/v1/sandboxes/${sandbox.id}`)])],
  ['main container removed behind the server', policy, (_stack, sandbox) => docker.getContainer(sandbox.main).remove({ force: true })],
]

for (const mode of ['direct', 'gateway'] as const) {
  t.test(`ingress ${mode}`, async (t) => {
    await using internet = await startInternet({ zones: { 'allowed.example': { a: ['198.51.100.30'] } } })
    const stack = await startStack({ internet, gateways: mode === 'gateway' ? ['uri'] : [] })
    t.teardown(() => stack[Symbol.asyncDispose]())
    for (const [why, options, end] of cases) {
      const sandbox = await stack.create(options)
      await sandbox.run(['curl', '-s', '-m', '3', 'http://allowed.example/'])
      const marks = await readMarks(stack, [sandbox.sidecar, sandbox.main].filter((id) => id !== undefined))
      const before = await findTraces(stack, marks)
      const wanted = Object.entries(before).filter(([kind]) => kind !== 'volumes' && (kind !== 'rules' || mode === 'direct'))
      t.same(wanted.filter(([, found]) => found.length === 0), [], `${why}: while it runs, everything looked for is found`)
      await end(stack, sandbox)
      await eventually('the server has let go', async () => ((await stack.api.get(sandbox.id)) === undefined ? true : undefined))
      const after = await eventually('Docker has cleaned up', async () => {
        const found = await findTraces(stack, marks)
        return Object.values(found).every((list) => list.length === 0) ? found : undefined
      }, 5).catch(() => findTraces(stack, marks))
      t.same(after, nothing, `${why}: nothing is left`)
    }
    await t.test('creates that cannot work', async (t) => {
      const [bad, pull] = ['SANDBOX::INVALID_PARAMETER', 'DOCKER::SANDBOX_IMAGE_PULL_FAILED']
      const foreign = process.arch === 'x64' ? 'arm64' : 'amd64'
      const broken: [why: string, body: object, status: number, code: string, message: RegExp][] = [
        ['no such program', { entrypoint: ['/no/such/program'] }, 400, bad, /^entrypoint\[0\]: names no program of this image$/],
        ['no such program, with a policy', { entrypoint: ['/no/such/program'], ...policy }, 400, bad, /^entrypoint\[0\]: names no program of this image$/],
        ['no such program on the path', { entrypoint: ['no-such-program'] }, 400, bad, /^entrypoint\[0\]: names no program of this image$/],
        ['a folder as program', { entrypoint: ['/etc'] }, 400, bad, /^entrypoint\[0\]: names nothing of this image that can be run$/],
        // With or without a registry in reach: it is not there, and nothing of the engine's text is passed on.
        ['no such image', { image: { uri: 'sp-test/no-such-image:local' }, ...policy }, 500, pull, /^Failed to pull image sp-test\/no-such-image:local: (the registry cannot be reached|there is no such image, or these credentials may not pull it|the registry limits pulls; try again later)\.$/],
        ['an image in upper case', { image: { uri: 'Foo/BAR' } }, 400, bad, /^image\.uri: .*must be lower case$/],
        ['another processor', { platform: { os: 'linux', arch: foreign } }, 400, bad, /^platform\.arch: this machine runs/],
        ['more CPUs than there are', { resourceLimits: { cpu: '100000' } }, 400, bad, /^resourceLimits\.cpu: is more than the \d+ CPUs of this machine$/],
        ['too little memory', { resourceLimits: { memory: '5Mi' } }, 400, bad, /^resourceLimits\.memory: /],
        ['a bad policy', { networkPolicy: { egress: [{ action: 'allow', target: 'http://x/' }] } }, 400, bad, /^networkPolicy\.egress\[0\]\.target: /],
      ]
      for (const [why, body, status, code, message] of broken) {
        const reply = await stack.api.call<{ code: string }>('POST', '/v1/sandboxes', { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '60'], resourceLimits: {}, timeout: 60, ...body })
        t.match(reply, { status, body: { code, message } }, `${why}: refused with ${status}`)
        t.same((await stack.containers()).map(({ Names }) => Names), [], `${why}: no container`)
        t.same(await stack.api.list(), [], `${why}: no sandbox`)
      }
    })
    await stack.server.stop()
    t.same((await docker.listNetworks()).filter(({ Name }) => Name === stack.network), [], 'a server that ends takes its unused network along')
    t.equal(await internet.strays(), 0)
  })
}
