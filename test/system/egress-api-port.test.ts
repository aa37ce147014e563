/** Connections from the port of the policy API that are not the API's: they are judged like all others. */
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { needs } from '../support/abilities.ts'
import { api, createNamespaces, policy, type Namespaces } from './egress-namespaces.ts'

await needs('root', 'nft', 'netns', 'curl')
t.setTimeout(60_000)

const result = async (space: Namespaces, order: Parameters<Namespaces['ask']>[0]): Promise<string | undefined> => (await space.ask(order))[0]?.result
/** That reached the internet; a moment later, because it tells in its own time. */
const bytes = (space: Namespaces): Promise<number> => delay(50).then(() => space.seen.filter(({ saw }) => saw === 'bytes').length)

// Of the policy API's connections the kernel keeps no table.
t.test('a connection from the port of the policy API', async (t) => {
  const allowing = { OPENSANDBOX_EGRESS_RULES: policy('198.18.7.7') }
  const order = { stream: '198.18.7.7', from: { localAddress: '198.51.100.2', localPort: 18080 } }
  const rows: [why: string, begin: (space: Namespaces) => Promise<number>][] = [
    ['begun before the sidecar', async (space) => {
      const [told] = await space.ask(order)
      await space.startSidecar(allowing)
      return told!.stream!
    }],
    ['on an address where the API is not', async (space) => {
      await space.startSidecar({ ...allowing, OPENSANDBOX_EGRESS_HTTP_ADDR: '127.0.0.1:18080' })
      return (await space.ask(order))[0]!.stream!
    }],
  ]
  for (const [why, begin] of rows) {
    await using space = await createNamespaces()
    const write = await begin(space)
    t.same(await result(space, { write }), 'echo', `${why}: goes on while the policy allows its place`)
    t.match(await api(space, 'POST', '{}'), /200$/)
    const before = await bytes(space)
    t.same(await result(space, { write }), 'closed', `${why}: is cut by a policy that does not`)
    t.equal(await bytes(space), before, `${why}: not one byte`)
  }
})
