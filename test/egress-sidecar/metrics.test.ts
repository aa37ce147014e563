/** The original's quantities under Prometheus' spelling of their names: what an operator's dashboards and alerts look for. */
import t from 'tap'
import type { Outcome } from '../../egress-sidecar/answer.ts'
import { createMetrics } from '../../egress-sidecar/metrics.ts'

const question = { name: 'a.example', type: 1, class: 1, end: 0, judged: { policy: 0, verdict: null } }
const allowed: Outcome = { question, verdict: { action: 'allow', reason: 'rule-allows' }, result: 'answered', addresses: [], took: 3 }
const denied: Outcome = { question, verdict: { action: 'deny', reason: 'default-denies' }, result: 'denied', addresses: [], took: 1 }

t.test('what is counted, and under which names', async (t) => {
  const metrics = createMetrics(new Map([['sandbox_id', 'a"b\n']]))
  for (const outcome of [allowed, allowed, denied, { ...allowed, result: 'no-upstream', took: 6000 } as const]) metrics.outcome(outcome)
  metrics.policyChanged()
  const lines = metrics.text({ learned: 7, rules: 3, elements: 5, updates: 9 }).split('\n')
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
