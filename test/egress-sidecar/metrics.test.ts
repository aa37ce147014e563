/** The original's quantities under Prometheus' spelling of their names: what an operator's dashboards and alerts look for. */
import t from 'tap'
import { compilePolicy } from '#policies/compile.ts'
import type { Outcome } from '../../egress-sidecar/answer.ts'
import { createMetrics } from '../../egress-sidecar/metrics.ts'

const question = { name: 'a.example', type: 1, class: 1, end: 0, judged: { policy: 0, verdict: null } }
const rules = compilePolicy({ defaultAction: 'deny', egress: [] })
const allowed: Outcome = { question, rules, shut: [], rcode: 0, verdict: { action: 'allow', reason: 'rule-allows' }, result: 'answered', addresses: [], took: 3 }
const denied: Outcome = { question, rules, shut: [], rcode: 0, verdict: { action: 'deny', reason: 'default-denies' }, result: 'denied', addresses: [], took: 1 }

t.test('a duration counts in the bucket whose limit it reaches, and in all above', async (t) => {
  const limits = [0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5]
  for (const [took, first] of [[0, 0], [1, 0], [1.001, 1], [2, 1], [5, 2], [99, 6], [1000, 8], [1001, 9], [5000, 9], [5001, 10], [120_000, 10]] as const) {
    const metrics = createMetrics(new Map())
    metrics.outcome({ ...allowed, took })
    const text = metrics.text({ learned: 0, rules: 0, elements: 0, updates: 0, refused: 0 })
    const buckets = [...text.matchAll(/^egress_dns_query_duration_seconds_bucket\{le="([^"]+)"\} (\d+)$/gm)].map(([, limit, count]) => [limit, Number(count)])
    t.same(buckets, [...limits.map((limit, i) => [`${limit}`, i >= first ? 1 : 0]), ['+Inf', 1]], `${took} ms`)
  }
})

t.test('outcomes and denials are counted each under its own name, and nothing is before it happened', async (t) => {
  const results = ['answered', 'denied', 'no-upstream', 'upstream-failed', 'bad-answer', 'kernel-failed', 'policy-unsettled'] as const
  const metrics = createMetrics(new Map())
  const counts = (name: string): string[] => metrics.text({ learned: 0, rules: 0, elements: 0, updates: 0, refused: 0 }).split('\n').filter((line) => line.startsWith(name)).map((line) => line.slice(name.length))
  t.same(counts('egress_dns_questions_total'), results.map((result) => `{result="${result}"} 0`), 'every outcome stands there from the start')
  t.same(counts('egress_policy_denied_total'), [])
  t.same(counts('egress_policy_updates_total'), [' 0'])
  for (const [i, result] of results.entries()) for (let k = 0; k <= i; k++) metrics.outcome({ ...(result === 'denied' ? denied : allowed), result })
  metrics.outcome({ ...denied, verdict: { action: 'deny', reason: 'rule-denies', rule: 1 } })
  t.same(counts('egress_dns_questions_total'), results.map((result, i) => `{result="${result}"} ${result === 'denied' ? 3 : i + 1}`))
  t.same(counts('egress_policy_denied_total'), ['{reason="default-denies"} 2', '{reason="rule-denies"} 1'])
  t.same(counts('egress_dns_query_duration_seconds_count'), [' 26'], 'denied questions take no time')
  const shut = (['floor', 'special-use-address', 'floor'] as const).map((reason) => ({ address: '10.0.0.1', reason }))
  metrics.outcome({ ...allowed, shut })
  t.same(counts('egress_addresses_refused_total'), ['{reason="floor"} 2', '{reason="special-use-address"} 1'])
  t.same(counts('egress_packets_denied_total'), [' 0'])
  t.notMatch(metrics.text({ learned: 0, rules: 0, elements: 0, updates: 0, refused: null }), /egress_packets_denied/, 'the kernel did not say')
})

t.test('each metric says once what it is', async (t) => {
  const lines = createMetrics(new Map()).text({ learned: 0, rules: 0, elements: 0, updates: 0, refused: 0 }).split('\n')
  const types = lines.filter((line) => line.startsWith('# TYPE ')).map((line) => line.slice(7))
  t.same(types, [
    'egress_dns_questions_total counter', 'egress_policy_denied_total counter', 'egress_addresses_refused_total counter', 'egress_packets_denied_total counter', 'egress_dns_query_duration_seconds histogram', 'egress_policy_updates_total counter', 'egress_policy_rules gauge',
    'egress_learned_addresses gauge', 'egress_nftables_updates_count_total counter', 'egress_nftables_rules_count gauge', 'egress_system_memory_usage_bytes gauge', 'egress_system_cpu_utilization gauge',
  ])
  t.same(lines.filter((line) => line.startsWith('# HELP ')).map((line) => line.split(' ')[2]), types.map((type) => type.split(' ')[0]))
  t.equal(lines.at(-1), '', 'ends with a line feed')
})

t.test('what is counted, and under which names', async (t) => {
  const metrics = createMetrics(new Map([['sandbox_id', 'a"b\n']]))
  for (const outcome of [allowed, allowed, denied, { ...allowed, result: 'no-upstream', took: 6000 } as const]) metrics.outcome(outcome)
  metrics.policyChanged()
  const lines = metrics.text({ learned: 7, rules: 3, elements: 5, updates: 9, refused: 4 }).split('\n')
  const common = 'sandbox_id="a\\"b\\n"'
  const rows: [line: string, of: string][] = [
    [`egress_dns_questions_total{result="answered",${common}} 2`, 'ours'],
    [`egress_dns_questions_total{result="denied",${common}} 1`, 'ours'],
    [`egress_policy_denied_total{reason="default-denies",${common}} 1`, 'egress.policy.denied_total'],
    [`egress_dns_query_duration_seconds_bucket{le="0.002",${common}} 0`, 'egress.dns.query.duration'],
    [`egress_dns_query_duration_seconds_bucket{le="0.005",${common}} 2`, 'egress.dns.query.duration'],
    [`egress_dns_query_duration_seconds_bucket{le="+Inf",${common}} 3`, 'allowed questions only, those that failed too'],
    [`egress_dns_query_duration_seconds_count{${common}} 3`, 'egress.dns.query.duration'],
    [`egress_dns_query_duration_seconds_sum{${common}} 6.006`, 'egress.dns.query.duration'],
    [`egress_policy_updates_total{${common}} 1`, 'ours'],
    [`egress_packets_denied_total{${common}} 4`, 'ours'],
    [`egress_policy_rules{${common}} 3`, 'ours'],
    [`egress_learned_addresses{${common}} 7`, 'ours'],
    [`egress_nftables_updates_count_total{${common}} 9`, 'egress.nftables.updates.count'],
    [`egress_nftables_rules_count{${common}} 5`, 'egress.nftables.rules.count'],
  ]
  for (const [line, of] of rows) t.ok(lines.includes(line), `${line} (${of})`)
  const number = (name: string): number => Number(lines.find((line) => line.startsWith(`${name}{`))?.split(' ').at(-1))
  t.ok(number('egress_system_memory_usage_bytes') > 1e6, 'egress.system.memory.usage_bytes')
  t.ok(number('egress_system_cpu_utilization') >= 0, 'egress.system.cpu.utilization')
  for (const line of lines.filter((line) => line !== '' && !line.startsWith('#'))) t.match(line, /^[a-z_]+\{[^\n]*\} -?[\d.e+-]+$/, 'a line that Prometheus reads')
})
