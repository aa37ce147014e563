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
      const broken: [why: string, body: object][] = [
        ['no such program', { entrypoint: ['/no/such/program'] }],
        ['no such program, with a policy', { entrypoint: ['/no/such/program'], ...policy }],
        ['no such image', { image: { uri: 'sp-test/no-such-image:local' }, ...policy }],
        ['a bad policy', { networkPolicy: { egress: [{ action: 'allow', target: 'http://x/' }] } }],
      ]
      for (const [why, body] of broken) {
        const reply = await stack.api.call<{ code: string }>('POST', '/v1/sandboxes', { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '60'], resourceLimits: {}, timeout: 60, ...body })
        t.ok(reply.status >= 400, `${why}: refused with ${reply.status}`, reply.body)
        t.same((await stack.containers()).map(({ Names }) => Names), [], `${why}: no container`)
        t.same(await stack.api.list(), [], `${why}: no sandbox`)
      }
    })
    await stack.server.stop()
    t.same((await docker.listNetworks()).filter(({ Name }) => Name === stack.network), [], 'a server that ends takes its unused network along')
    t.equal(await internet.strays(), 0)
  })
}
