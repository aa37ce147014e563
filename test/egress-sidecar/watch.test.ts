/** What an operator sees: the names that are not logged, attributes on log lines and metrics. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { readLogSkip } from '../../egress-sidecar/always-files.ts'
import { createLog } from '../../egress-sidecar/log.ts'
import { createMetrics } from '../../egress-sidecar/metrics.ts'

t.test('log_skip.always', async (t) => {
  const directory = t.testdir({})
  const of = (text: string): ReturnType<typeof readLogSkip> => {
    writeFileSync(join(directory, 'log_skip.always'), text)
    return readLogSkip(directory)
  }
  t.equal((await readLogSkip(directory))('a.example'), false, 'no file')
  const skip = await of('# noisy\n\n Telemetry.example. \n*.metrics.example\n')
  t.same(['telemetry.example', 'x.telemetry.example', 'a.b.metrics.example', 'metrics.example', 'other.example'].map(skip), [true, false, true, false, false])
  for (const text of ['10.0.0.0/8', '198.51.100.1', '2001:db8::1', '*', 'http://x/']) {
    await t.rejects(of(`ok.example\n${text}\n`), { message: `${directory}/log_skip.always line 2: ${JSON.stringify(text)} is not a domain pattern; only host/domain entries are supported` })
  }
  mkdirSync(join(directory, 'sub', 'log_skip.always'), { recursive: true })
  await t.rejects(readLogSkip(join(directory, 'sub')), /EISDIR/, 'unreadable is not empty')
})

t.test('attributes stand on every log line, but never in the place of our own', async (t) => {
  const file = join(t.testdir({}), 'log')
  const log = createLog({ level: 'info', outputs: [file], sandboxId: 'box', attributes: new Map([['team', 'a'], ['sandbox_id', 'other']]) })
  log.event('info', 'egress.test', 'one')
  for (let i = 0; i < 150; i++) log.limited('egress.webhook', `dropped ${i}`)
  const lines = readFileSync(file, 'utf8').trim().split('\n')
  t.match(JSON.parse(lines[0] ?? ''), { team: 'a', sandbox_id: 'box', logger: 'opensandbox.egress', level: 'info', msg: 'one' })
  t.equal(lines[0]?.match(/sandbox_id/g)?.length, 1)
  // A new second may begin in between.
  t.ok(lines.length >= 101 && lines.length <= 152, `${lines.length} lines`)
})

t.test('attributes are labels of every metric', async (t) => {
  const metrics = createMetrics(new Map([['sandbox_id', 'b"o\\x\n'], ['2nd-team', 'a']]))
  metrics.policyChanged()
  const samples = metrics.text({ learned: 3, rules: 2, elements: 7, updates: 5 }).trim().split('\n').filter((line) => !line.startsWith('#'))
  for (const line of samples) t.ok(line.includes('sandbox_id="b\\"o\\\\x\\n",_2nd_team="a"} '), line)
  t.ok(samples.includes('egress_learned_addresses{sandbox_id="b\\"o\\\\x\\n",_2nd_team="a"} 3'))
  t.ok(samples.some((line) => line.startsWith('egress_dns_query_duration_seconds_bucket{le="0.001",sandbox_id=')))
  for (const [name, value] of [['egress_nftables_rules_count', '7'], ['egress_nftables_updates_count_total', '5']] as const) t.ok(samples.includes(`${name}{sandbox_id="b\\"o\\\\x\\n",_2nd_team="a"} ${value}`), name)
  const share = (): number => Number(/^egress_system_cpu_utilization (\S+)$/m.exec(idle.text({ learned: 0, rules: 0, elements: 0, updates: 0 }))?.[1])
  const idle = createMetrics(new Map())
  for (const until = performance.now() + 100; performance.now() < until;);
  t.ok(share() > 0.3, 'busy')
  await new Promise((resolve) => setTimeout(resolve, 300))
  t.ok(share() < 0.3, 'not any more')
  t.match(createMetrics(new Map()).text({ learned: 3, rules: 2, elements: 7, updates: 5 }), /\negress_learned_addresses 3\n/)
})
