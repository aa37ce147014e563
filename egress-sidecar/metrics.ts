/** Counters in Prometheus' text format (0.0.4). All names are here. */
import { results, type Outcome } from './answer.ts'

export type Metrics = {
  outcome(outcome: Outcome): void
  policyChanged(): void
  text(kernel: { readonly learned: number; readonly rules: number; readonly elements: number; readonly updates: number; /** null: the kernel did not say. */ readonly refused: number | null }): string
}

/** Seconds; the interesting part is what a question costs beyond its upstream. */
const buckets = [0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5] as const

type Sample = readonly [suffix: string, label: string, value: number]

/** @param attributes labels of every sample */
export function createMetrics(attributes: ReadonlyMap<string, string>): Metrics {
  const common = [...attributes].map(([name, value]) => `${labelName(name)}="${labelValue(value)}"`).join(',')
  const questions = Object.fromEntries(results.map((result) => [result, 0])) as Record<Outcome['result'], number>
  const denials = new Map<string, number>()
  const shutAddresses = new Map<string, number>()
  const counts = new Float64Array(buckets.length + 1)
  let sum = 0
  let changes = 0
  let last = { at: performance.now(), used: process.cpuUsage() }

  function utilization(): number {
    const { user, system } = process.cpuUsage(last.used)
    const share = (user + system) / 1000 / Math.max(1, performance.now() - last.at)
    last = { at: performance.now(), used: process.cpuUsage() }
    return share
  }

  return {
    outcome({ result, verdict, shut, took }) {
      questions[result]++
      for (const { reason } of shut) shutAddresses.set(reason, (shutAddresses.get(reason) ?? 0) + 1)
      if (result === 'denied') {
        denials.set(verdict.reason, (denials.get(verdict.reason) ?? 0) + 1)
        return
      }
      const seconds = took / 1000
      sum += seconds
      let bucket = 0
      while (bucket < buckets.length && seconds > (buckets[bucket] as number)) bucket++
      counts[bucket]! += 1
    },
    policyChanged: () => void changes++,
    text({ learned, rules, elements, updates, refused }) {
      const lines: string[] = []
      const metric = (name: string, type: string, help: string, samples: readonly Sample[]): void => {
        const sample = ([suffix, label, value]: Sample): string => `${name}${suffix}${braces(label, common)} ${value}`
        lines.push(`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`, ...samples.map(sample))
      }
      metric('egress_dns_questions_total', 'counter', 'DNS questions by outcome', Object.entries(questions).map(([result, count]) => ['', `result="${result}"`, count]))
      metric('egress_policy_denied_total', 'counter', 'denied DNS questions by reason', [...denials].map(([reason, count]) => ['', `reason="${reason}"`, count]))
      metric('egress_addresses_refused_total', 'counter', 'addresses left out of answers to allowed names, by reason', [...shutAddresses].map(([reason, count]) => ['', `reason="${reason}"`, count]))
      if (refused !== null) metric('egress_packets_denied_total', 'counter', 'packets that were told no', [['', '', refused]])
      let below = 0
      const histogram = buckets.map((limit, i): Sample => ['_bucket', `le="${limit}"`, (below += counts[i] as number)])
      const all = below + (counts[buckets.length] as number)
      metric('egress_dns_query_duration_seconds', 'histogram', 'time from an allowed question to its outcome', [...histogram, ['_bucket', 'le="+Inf"', all], ['_sum', '', sum], ['_count', '', all]])
      metric('egress_policy_updates_total', 'counter', 'policies put into force since the start', [['', '', changes]])
      metric('egress_policy_rules', 'gauge', "rules of the user's policy", [['', '', rules]])
      metric('egress_learned_addresses', 'gauge', 'addresses remembered from answers', [['', '', learned]])
      metric('egress_nftables_updates_count_total', 'counter', 'transactions that the kernel confirmed: policies and learned addresses', [['', '', updates]])
      metric('egress_nftables_rules_count', 'gauge', 'addresses and networks that the policy put into the kernel', [['', '', elements]])
      metric('egress_system_memory_usage_bytes', 'gauge', 'resident memory of the sidecar', [['', '', process.memoryUsage.rss()]])
      metric('egress_system_cpu_utilization', 'gauge', 'share of one processor that the sidecar used since it was asked last', [['', '', utilization()]])
      return `${lines.join('\n')}\n`
    },
  }
}

function braces(...labels: readonly string[]): string {
  const given = labels.filter((label) => label !== '')
  return given.length === 0 ? '' : `{${given.join(',')}}`
}

/** What has no place in a label's name becomes `_`. */
function labelName(text: string): string {
  return text.replaceAll(/^(?=\d)|[^a-zA-Z0-9_]/g, '_')
}

function labelValue(text: string): string {
  return text.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n')
}
