/** What an operator may switch at the sidecar, in real namespaces: mode `dns`, closed port 443, resolvers that are open to the sandbox; and where it will not run. */
import { existsSync } from 'node:fs'
import { execa } from 'execa'
import t from 'tap'
import { needs } from '../support/abilities.ts'
import { root } from '../support/program.ts'
import { createNamespaces, outside, type Namespaces } from './egress-namespaces.ts'

await needs('root', 'nft', 'netns', 'curl')
t.setTimeout(120_000)

const rules = JSON.stringify({ egress: ['*.ok.example', '198.18.0.0/16'].map((target) => ({ action: 'allow', target })) })
const resultsOf = async (space: Namespaces, ...orders: Parameters<Namespaces['ask']>): Promise<string[]> => (await space.ask(...orders)).map(({ result }) => result)
const asked = (space: Namespaces, name: string): boolean => space.seen.some((line) => line.saw === 'dns' && line.name === name)

t.test('mode dns: names are judged, addresses are open, and it says so', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: rules, OPENSANDBOX_EGRESS_MODE: 'dns' })
  await sidecar.said(/egress\.dns_only/)
  const [denied, allowed] = await space.ask({ ask: 'evil.example' }, { ask: 'a.ok.example' })
  t.same([denied?.rcode, allowed?.rcode, asked(space, 'evil.example')], [3, 0, false])
  t.same(await resultsOf(space, { connect: outside.other }, { udp: outside.other }, { connect: outside.other, port: 853 }), ['open', 'echo', 'open'])
  t.match(JSON.parse(await space.run('curl', '-s', 'http://127.0.0.1:18080/policy')), { enforcementMode: 'dns', warning: /not restricted/ })
})

t.test('port 443 of a list is closed, a resolver is open on its port 53 only', async (t) => {
  await using space = await createNamespaces()
  const policy = { OPENSANDBOX_EGRESS_RULES: rules, OPENSANDBOX_EGRESS_BLOCK_DOH_443: 'on' }
  const first = await space.startSidecar({ ...policy, OPENSANDBOX_EGRESS_DOH_BLOCKLIST: '198.18.7.0/24, 198.18.9.9, nonsense', OPENSANDBOX_EGRESS_NAMESERVER_EXEMPT: outside.v4 })
  t.same(await resultsOf(space, { connect: '198.18.7.7', port: 443 }, { connect: '198.18.9.9', port: 443 }, { connect: '198.18.7.7' }, { connect: '198.18.8.8', port: 443 }), ['ECONNREFUSED', 'ECONNREFUSED', 'open', 'open'])
  const [unfiltered, unfilteredTcp, elsewhere] = await space.ask({ ask: 'evil.example' }, { ask: 'evil2.example', tcp: true }, { ask: 'evil3.example', server: '192.0.0.9' })
  t.same([unfiltered?.rcode, unfilteredTcp?.rcode, elsewhere?.rcode], [0, 0, 3], 'asked at the open resolver, and at another')
  t.same(['evil.example', 'evil2.example', 'evil3.example'].map((name) => asked(space, name)), [true, true, false])
  t.same(await resultsOf(space, { connect: outside.v4 }, { connect: outside.v4, port: 443 }), ['ECONNREFUSED', 'ECONNREFUSED'])

  await first.end('SIGTERM')
  await space.startSidecar(policy)
  t.same(await resultsOf(space, { connect: '198.18.8.8', port: 443 }, { udp: '198.18.8.8', port: 443 }, { connect: '198.18.8.8' }), ['ECONNREFUSED', 'EPERM', 'open'], 'without a list it is closed everywhere')
  t.equal((await space.ask({ ask: 'evil4.example' }))[0]?.rcode, 3, 'and no resolver is open any more')
})

t.test('never in the namespace of the host', async (t) => {
  // Without NET_ADMIN, so that a sidecar that did not refuse would do no harm.
  const result = await execa({ cwd: root, reject: false, all: true, env: { OPENSANDBOX_EGRESS_DNS_UPSTREAM: outside.v4, OPENSANDBOX_EGRESS_HTTP_ADDR: '127.0.0.1:0' } })`setpriv --bounding-set=-net_admin -- ${process.execPath} egress-sidecar/main.ts`
  t.equal(result.exitCode, 1)
  // A test that itself runs in a container is not there.
  const first = existsSync('/proc/sys/net/core/netdev_budget')
  t.match(result.all, first ? /this is the network namespace of the host: refusing to filter it/ : /NET_ADMIN is needed/)
})
