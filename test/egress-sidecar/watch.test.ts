/** What an operator sees: the names that are not logged, attributes on log lines and metrics. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { execa } from 'execa'
import t from 'tap'
import { compilePolicy } from '#policies/compile.ts'
import { readLogSkip } from '../../egress-sidecar/always-files.ts'
import type { Outcome } from '../../egress-sidecar/answer.ts'
import { createLog } from '../../egress-sidecar/log.ts'
import { createMetrics } from '../../egress-sidecar/metrics.ts'
import { eventually, root } from '../support/program.ts'

type Line = Record<string, unknown>

const linesOf = (path: string): Line[] => readFileSync(path, 'utf8').split('\n').filter((line) => line !== '').map((line) => JSON.parse(line) as Line)
const outcome: Outcome = { question: { name: 'a.example', type: 1, class: 1, end: 0, judged: { policy: 0, verdict: null } }, verdict: { action: 'allow', reason: 'rule-allows', rule: 0 }, rules: compilePolicy({ defaultAction: 'allow', egress: ['a.example', 'b.example', 'c.example', '*.Example'].map((target) => ({ action: 'deny', target })) }), result: 'answered', addresses: [], shut: [], rcode: 0, took: 1.2345 }
const denied: Outcome = { ...outcome, verdict: { action: 'deny', reason: 'rule-denies', rule: 3 }, result: 'denied' }

t.test('log_skip.always', async (t) => {
  const directory = t.testdir({})
  const of = (text: string): ReturnType<typeof readLogSkip> => {
    writeFileSync(join(directory, 'log_skip.always'), text)
    return readLogSkip(directory)
  }
  t.equal((await readLogSkip(directory))('a.example'), false, 'no file')
  const skip = await of('# noisy\n\n Telemetry.example. \n*.metrics.example\n')
  t.same(['telemetry.example', 'x.telemetry.example', 'a.b.metrics.example', 'metrics.example', 'other.example'].map(skip), [true, false, true, false, false])
  const written = await of('a.example\r\n\t# indented\r\nB.Example.\r\n*.Example.org')
  t.same(['a.example', 'b.example', 'x.example.org', 'example.org', ''].map(written), [true, true, true, false, false], 'as on Windows, without an end of line')
  t.same(['a.example', ''].map(await of('# nothing\n\n')), [false, false])
  for (const text of ['10.0.0.0/8', '198.51.100.1', '2001:db8::1', '*', 'http://x/']) {
    await t.rejects(of(`ok.example\n${text}\n`), { message: `${directory}/log_skip.always line 2: ${JSON.stringify(text)} is not a domain pattern; only host/domain entries are supported` })
  }
  mkdirSync(join(directory, 'sub', 'log_skip.always'), { recursive: true })
  await t.rejects(readLogSkip(join(directory, 'sub')), /EISDIR/, 'unreadable is not empty')
})

t.test('a level, and what is below it', async (t) => {
  const directory = t.testdir({})
  const levels = ['debug', 'info', 'warn', 'error', 'fatal'] as const
  for (const [at, level] of levels.entries()) {
    const file = join(directory, level)
    const log = createLog({ level, outputs: [file], sandboxId: '', attributes: new Map() })
    for (const each of levels) log.event(each, `egress.${each}`, each)
    log.outcome(outcome)
    log.outcome(denied)
    log.limited('egress.webhook', 'limited')
    log.flush()
    const questions = at <= 1 ? ['info egress.outbound', 'info egress.denied'] : []
    t.same(linesOf(file).map((line) => `${line['level']} ${line['opensandbox.event']}`), [...levels.slice(at).map((each) => `${each} egress.${each}`), ...questions, ...(at <= 2 ? ['warn egress.webhook'] : [])], level)
  }
})

t.test('every output gets every line, in a folder that is made for it, behind what is there', async (t) => {
  const directory = t.testdir({ old: '{"msg":"before"}\n' })
  const outputs = [join(directory, 'old'), join(directory, 'new', 'folder', 'log')]
  const log = createLog({ level: 'info', outputs, sandboxId: 'box', attributes: new Map() })
  log.event('info', 'egress.test', 'one')
  log.event('warn', 'egress.test', 'two', { more: [1] })
  const [old, made] = outputs.map((output) => linesOf(output).map((line) => `${line['msg']}`))
  t.same([old, made], [['before', 'one', 'two'], ['one', 'two']])
  t.match(linesOf(outputs[1] as string)[1], { level: 'warn', ts: /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/, logger: 'opensandbox.egress', msg: 'two', sandbox_id: 'box', 'opensandbox.event': 'egress.test', more: [1] })
  t.same(Object.keys(linesOf(outputs[0] as string)[1] ?? {}).sort(), ['level', 'logger', 'msg', 'opensandbox.event', 'sandbox_id', 'ts'])
})

t.test('stdout is stdout and stderr is stderr', async (t) => {
  const file = join(t.testdir({}), 'log')
  for (const [outputs, want] of [[['stdout'], ['one\n', '', '']], [['stderr'], ['', 'one\n', '']], [['stdout', 'stderr', file], ['one\n', 'one\n', 'one\n']]] as const) {
    writeFileSync(file, '')
    const program = `import { createLog } from './egress-sidecar/log.ts'\ncreateLog({ level: 'info', outputs: ${JSON.stringify(outputs)}, sandboxId: '', attributes: new Map() }).event('info', 'egress.test', 'one')`
    const { stdout, stderr } = await execa({ cwd: root, stripFinalNewline: false })`${process.execPath} --input-type=module --eval ${program}`
    const said = (text: string): string => text.split('\n').map((line) => (line === '' ? line : `${(JSON.parse(line) as Line)['msg']}`)).join('\n')
    t.same([stdout, stderr, readFileSync(file, 'utf8')].map(said), want, outputs.join())
  }
})

t.test('one line for each question', async (t) => {
  const file = join(t.testdir({}), 'log')
  const log = createLog({ level: 'info', outputs: [file], sandboxId: '', attributes: new Map() })
  const asked = (name: string | null, type: number): Outcome['question'] => ({ ...outcome.question, name, type })
  const many = Array.from({ length: 20 }, (_, i) => `198.51.100.${i}`)
  const rows: { why: string; outcome: Outcome; want: Line }[] = [
    { why: 'answered', outcome: { ...outcome, addresses: many.slice(0, 2) }, want: { 'opensandbox.event': 'egress.outbound', msg: 'egress outbound', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, 'target.ips': many.slice(0, 2) } },
    { why: 'without addresses', outcome: { ...outcome, question: asked('', 65) }, want: { 'opensandbox.event': 'egress.outbound', msg: 'egress outbound', 'target.host': '', qtype: 'HTTPS', took_ms: 1.23 } },
    { why: 'more addresses than a line holds', outcome: { ...outcome, question: asked('a.example', 28), addresses: many }, want: { 'opensandbox.event': 'egress.outbound', msg: 'egress outbound', 'target.host': 'a.example', qtype: 'AAAA', took_ms: 1.23, 'target.ips': many.slice(0, 16) } },
    { why: 'allowed, but not answered', outcome: { ...outcome, question: asked('a.example', 16), result: 'no-upstream' }, want: { 'opensandbox.event': 'egress.outbound', msg: 'egress outbound', 'target.host': 'a.example', qtype: 'TYPE16', took_ms: 1.23, error: 'no-upstream' } },
    { why: 'denied by a rule', outcome: denied, want: { 'opensandbox.event': 'egress.denied', msg: 'egress denied', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, reason: 'rule-denies', rule: 3, target: '*.Example' } },
    { why: 'denied for a name it led to', outcome: { ...denied, alias: 'b.example' }, want: { 'opensandbox.event': 'egress.denied', msg: 'egress denied', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, reason: 'rule-denies', rule: 3, target: '*.Example', via: 'b.example' } },
    { why: 'for one that is no name', outcome: { ...denied, verdict: { action: 'deny', reason: 'malformed-name' }, alias: null }, want: { 'opensandbox.event': 'egress.denied', msg: 'egress denied', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, reason: 'malformed-name', via: '(malformed)' } },
    { why: "by an operator's rule", outcome: { ...denied, verdict: { action: 'deny', reason: 'rule-denies' } }, want: { 'opensandbox.event': 'egress.denied', msg: 'egress denied', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, reason: 'rule-denies' } },
    { why: 'a name that does not exist', outcome: { ...outcome, rcode: 3 }, want: { 'opensandbox.event': 'egress.outbound', msg: 'egress outbound', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, rcode: 3 } },
    { why: 'addresses that stay shut', outcome: { ...outcome, shut: [{ address: 'fd00:0:0:0:0:0:0:1', reason: 'special-use-address' }, ...many.map((address) => ({ address, reason: 'floor' as const }))] }, want: { 'opensandbox.event': 'egress.outbound', msg: 'egress outbound', 'target.host': 'a.example', qtype: 'A', took_ms: 1.23, left_out: [{ ip: 'fd00::1', reason: 'special-use-address' }, ...many.slice(0, 15).map((ip) => ({ ip, reason: 'floor' }))] } },
    { why: 'no name at all', outcome: { ...denied, question: asked(null, 1), verdict: { action: 'deny', reason: 'malformed-name' } }, want: { 'opensandbox.event': 'egress.denied', msg: 'egress denied', 'target.host': '(malformed)', qtype: 'A', took_ms: 1.23, reason: 'malformed-name' } },
  ]
  for (const { outcome } of rows) log.outcome(outcome)
  for (const [i, { why, want }] of rows.entries()) {
    const { level, ts, logger, ...line } = linesOf(file)[i] ?? {}
    t.same([level, typeof ts, logger], ['info', 'string', 'opensandbox.egress'], why)
    t.same(line, want, why)
  }
})

t.test('of more than 100 of a kind in a second the rest is counted, and told', async (t) => {
  const file = join(t.testdir({}), 'log')
  let now = 5_000_300
  t.intercept(Date, 'now', { value: () => now })
  const log = createLog({ level: 'info', outputs: [file], sandboxId: '', attributes: new Map() })
  for (let i = 0; i < 140; i++) log.outcome(outcome)
  log.event('info', 'egress.test', 'a line of its own')
  t.equal(linesOf(file).length, 101, 'whatever the sandbox cannot cause is never left out')
  now += 699
  log.outcome(outcome)
  t.equal(linesOf(file).length, 101, 'the same second')
  now += 1
  log.outcome(outcome)
  log.flush()
  const lines = linesOf(file).slice(101).reverse()
  t.match(lines, [{ level: 'warn', 'opensandbox.event': 'egress.lines_dropped', dropped: 41 }, { 'opensandbox.event': 'egress.outbound' }])
  t.equal(lines.length, 2)
  now += 1000
  log.outcome(outcome)
  t.equal(linesOf(file).length, 104, 'nothing was left out, nothing is told')
})

t.test('nobody hides one kind of line behind another', async (t) => {
  const file = join(t.testdir({}), 'log')
  t.intercept(Date, 'now', { value: () => 9000 })
  const log = createLog({ level: 'info', outputs: [file], sandboxId: '', attributes: new Map() })
  const kinds: [kind: string, tell: () => void][] = [
    ['egress.outbound', () => log.outcome(outcome)],
    ['egress.denied', () => log.outcome(denied)],
    ['egress.outbound no-upstream', () => log.outcome({ ...outcome, result: 'no-upstream' })],
    ...['egress.unauthorized', 'egress.webhook', 'egress.heartbeat'].map((event): [string, () => void] => [event, () => log.limited(event, 'limited')]),
  ]
  for (const [, tell] of kinds) for (let i = 0; i < 120; i++) tell()
  // The failed ones have one budget, whatever the failure.
  log.outcome({ ...outcome, result: 'bad-answer' })
  const counts = new Map<string, number>()
  for (const line of linesOf(file)) {
    const kind = [line['opensandbox.event'], line['error'] ?? ''].join(' ').trim()
    counts.set(kind, (counts.get(kind) ?? 0) + 1)
  }
  t.same([...counts], kinds.map(([kind]) => [kind, 100]), 'each has its own, bounded')
  log.flush()
  t.match(linesOf(file).at(-1), { 'opensandbox.event': 'egress.lines_dropped', dropped: 121 })
})

t.test('what was left out is told a second later when nobody asks any more, and at the end', async (t) => {
  const file = join(t.testdir({}), 'log')
  const dropped = (): unknown[] => linesOf(file).filter((line) => line['opensandbox.event'] === 'egress.lines_dropped').map((line) => line['dropped'])
  t.intercept(Date, 'now', { value: () => 7000 })
  const log = createLog({ level: 'info', outputs: [file], sandboxId: '', attributes: new Map() })
  for (let i = 0; i < 107; i++) log.outcome(outcome)
  t.same(dropped(), [])
  await eventually('told', async () => (dropped().length > 0 ? true : undefined))
  t.same(dropped(), [7])
  for (let i = 0; i < 103; i++) log.outcome(outcome)
  log.flush()
  t.same(dropped(), [7, 103], 'the same second still')
})

t.test('a flood that goes on has 100 lines a second, not more with every second', async (t) => {
  const file = join(t.testdir({}), 'log')
  const log = createLog({ level: 'info', outputs: [file], sandboxId: '', attributes: new Map() })
  let asked = 0
  for (const until = performance.now() + 3500; performance.now() < until; await new Promise((resolve) => setTimeout(resolve, 5))) for (let i = 0; i < 5; i++, asked++) log.outcome(outcome)
  log.flush()
  const lines = linesOf(file)
  const seconds = new Map<string, number>()
  for (const line of lines) if (line['opensandbox.event'] === 'egress.outbound') seconds.set(String(line['ts']).slice(0, 19), (seconds.get(String(line['ts']).slice(0, 19)) ?? 0) + 1)
  t.ok(seconds.size >= 4 && Math.max(...seconds.values()) <= 100, [...seconds.values()].join(', '))
  const dropped = lines.reduce((sum, line) => sum + (line['opensandbox.event'] === 'egress.lines_dropped' ? Number(line['dropped']) : 0), 0)
  t.equal(dropped + [...seconds.values()].reduce((a, b) => a + b, 0), asked, 'and every other is counted')
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
  const samples = metrics.text({ learned: 3, rules: 2, elements: 7, updates: 5, refused: 6 }).trim().split('\n').filter((line) => !line.startsWith('#'))
  for (const line of samples) t.ok(line.includes('sandbox_id="b\\"o\\\\x\\n",_2nd_team="a"} '), line)
  t.ok(samples.includes('egress_learned_addresses{sandbox_id="b\\"o\\\\x\\n",_2nd_team="a"} 3'))
  t.ok(samples.some((line) => line.startsWith('egress_dns_query_duration_seconds_bucket{le="0.001",sandbox_id=')))
  for (const [name, value] of [['egress_nftables_rules_count', '7'], ['egress_nftables_updates_count_total', '5']] as const) t.ok(samples.includes(`${name}{sandbox_id="b\\"o\\\\x\\n",_2nd_team="a"} ${value}`), name)
  const share = (): number => Number(/^egress_system_cpu_utilization (\S+)$/m.exec(idle.text({ learned: 0, rules: 0, elements: 0, updates: 0, refused: 0 }))?.[1])
  const idle = createMetrics(new Map())
  // A machine under load gives us less of it.
  const compare = async (what: string, work: () => unknown): Promise<void> => {
    const before = { at: performance.now(), used: process.cpuUsage() }
    share()
    await work()
    const { user, system } = process.cpuUsage(before.used)
    const [want, got] = [(user + system) / 1000 / (performance.now() - before.at), share()]
    t.ok(Math.abs(got - want) < 0.2, `${what}: ${got.toFixed(2)} of a processor, in truth ${want.toFixed(2)}`)
  }
  await compare('busy', () => {
    for (const until = performance.now() + 600; performance.now() < until;);
  })
  await compare('not any more', () => new Promise((resolve) => setTimeout(resolve, 600)))
  t.match(createMetrics(new Map()).text({ learned: 3, rules: 2, elements: 7, updates: 5, refused: 6 }), /\negress_learned_addresses 3\n/)
})
