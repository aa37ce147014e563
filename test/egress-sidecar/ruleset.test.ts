/** The whole ruleset as text. Read a change of the snapshot like a change of code. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { compilePolicy } from '#policies/compile.ts'
import { readNetworkPolicy } from '#policies/document.ts'
import { bootStatements, closeStatements, controlStatements, leaseSeconds, openStatements, policyStatements, type RulesetInput } from '../../egress-sidecar/ruleset.ts'

const input: RulesetInput = {
  rules: compilePolicy({
    defaultAction: 'deny',
    egress: [
      { action: 'allow', target: '*.example.com' },
      { action: 'allow', target: '1.1.1.1' },
      { action: 'allow', target: '198.18.0.0/15' },
      { action: 'allow', target: '198.18.7.0/24' },
      { action: 'allow', target: 'fd00::/8' },
      { action: 'deny', target: '10.0.0.0/8' },
      { action: 'deny', target: '198.51.100.99' },
      { action: 'deny', target: '2001:db8::1' },
      { action: 'deny', target: '2001:db8:9::/48' },
    ],
  }),
  filter: true,
  ipv6: true,
  exemption: { match: 'meta mark 0x1ee7', protocols: ['udp', 'tcp'] },
  upstreams: [{ address: '198.51.100.53', port: 53 }, { address: '2001:db8::53', port: 5353 }],
  held: { 4: [40000, 40001], 6: [50000] },
  openResolvers: [],
  doh: { everywhere: false, addresses: [] },
  control: false,
  apiPort: 18080,
  generation: 1,
}
const allowAll = readNetworkPolicy({ defaultAction: 'allow' })
if (!allowAll.ok) throw new Error('policy')

const rulesets: Record<string, readonly string[]> = {
  'boot: everything refused': bootStatements(18080),
  'default deny, IPv6, exempt by mark': policyStatements(input),
  'no IPv6, exempt by port, two addresses forgotten': policyStatements({ ...input, ipv6: false, exemption: { match: null, protocols: ['udp'] } }, ['198.51.100.9', '2001:db8::9']),
  'default allow, 443 closed, one open resolver': policyStatements({ ...input, rules: compilePolicy(allowAll.policy), doh: { everywhere: true, addresses: [] }, openResolvers: ['198.51.100.54'] }),
  'a DoH block list': policyStatements({ ...input, doh: { everywhere: false, addresses: ['9.9.9.0/24', '9.9.9.9', '2620:fe::fe'] } }),
  'mode dns': policyStatements({ ...input, filter: false }),
  'opening addresses': openStatements(new Map([['198.51.100.1', 60], ['198.51.100.2', 90], ['2001:db8::2', 360]]), new Set(['198.51.100.2'])),
  'a place of our own': [...policyStatements({ ...input, control: true }).filter((statement) => statement.includes('control')), ...controlStatements('198.51.100.80', 8443), ...controlStatements('2001:db8::80', 443)],
  'the end': closeStatements(),
}

t.test('as recorded', async (t) => {
  const recorded = join(import.meta.dirname, 'rulesets.txt')
  const printed = Object.entries(rulesets).map(([name, statements]) => `# ${name}\n${statements.join('\n')}\n`).join('\n')
  if (process.env['UPDATE_SNAPSHOTS'] === '1') writeFileSync(recorded, printed)
  t.equal(printed, readFileSync(recorded, 'utf8'), 'UPDATE_SNAPSHOTS=1 records anew')
})

t.test('what must come before what', async (t) => {
  const statements = policyStatements(input)
  const rules = statements.filter((statement) => statement.startsWith('add rule inet opensandbox egress ')).map((statement) => statement.slice('add rule inet opensandbox egress '.length))
  const order = ['ip daddr 127.0.0.11 goto denied', 'oif "lo" goto inside', 'ct mark 0x1 ct direction original ct state established ip daddr @dyn_allow_v4', 'jump exempt', 'th dport 853', '@deny_v4', '@deny_net_v6', '@dyn_allow_v4', '@allow_v4', 'ct mark 0x1 ct state established', 'goto denied']
  let last = -1
  for (const part of order) {
    const at = rules.findIndex((rule, index) => index > last && rule.includes(part))
    t.ok(at > last, part)
    last = at
  }
  t.equal(last, rules.length - 1, 'and nothing behind the end')
  const open = policyStatements({ ...input, rules: compilePolicy(allowAll.policy) })
  t.notOk(open.some((statement) => /egress .*@(deny|doh|shut)_/.test(statement)), 'sets that are empty are not looked into')
  t.ok(policyStatements({ ...input, doh: { everywhere: false, addresses: ['9.9.9.9'] } }).some((statement) => /egress th dport 443 .*@doh_block_v4 goto denied$/.test(statement)))
  t.same(policyStatements(input, ['198.51.100.9']).filter((statement) => /egress .*@shut_/.test(statement)), ['add rule inet opensandbox egress ip daddr @shut_v4 goto denied'], 'what a policy takes away is banned, in its own family')
  t.notOk(rules.some((rule) => /^ct state established[^d]*accept$/.test(rule)), 'no connection is let out for being old')
  for (const rule of rules.filter((rule) => rule.startsWith('ct mark'))) t.match(rule, /^ct mark 0x1 (ct direction original ct state established ip6? daddr @dyn_allow_v[46] update |ct state established meta l4proto tcp tcp flags)/, 'a mark alone opens nothing: the address is still open, or the connection an idle one')
  t.ok(statements.every((statement) => !statement.includes('\n')))
})

t.test('the exemption never leads anywhere else', async (t) => {
  for (const statement of policyStatements(input)) {
    if (statement.includes('meta mark 0x1ee7') && !statement.endsWith(' return')) t.match(statement, /^add rule inet opensandbox (nat|exempt) meta mark 0x1ee7 ip6? daddr (198\.51\.100\.53|2001:db8::53) (udp|tcp) dport (53|5353) meta l4proto @alive accept$/)
  }
  const control = (protocols: readonly ('udp' | 'tcp')[]): string[] => policyStatements({ ...input, control: true, exemption: { ...input.exemption, protocols } }).filter((statement) => statement.includes('control'))
  for (const statement of control(['udp', 'tcp'])) t.match(statement, /^add rule inet opensandbox exempt meta mark 0x1ee7 ip6? daddr \. meta l4proto \. th dport @control_v[46] meta l4proto @alive accept$/)
  t.equal(control(['udp', 'tcp']).length, 2)
  t.same(control(['udp']), [], 'where nothing proves that a TCP packet is ours, there is no way out for it')
})

t.test('leases', async (t) => {
  for (const [ttl, seconds] of [[0, 60], [1, 61], [10, 70], [60, 120], [120, 180], [300, 360], [9999, 360]] as const) t.equal(leaseSeconds(ttl), seconds, `TTL ${ttl}`)
})
