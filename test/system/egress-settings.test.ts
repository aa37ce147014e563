/** What the environment and the operator's files say arrives in the running program; and what it says of itself when it does not enforce. */
import { readFileSync } from 'node:fs'
import t from 'tap'
import { needs } from '../support/abilities.ts'
import { eventually } from '../support/program.ts'
import { createNamespaces, outside, policy } from './egress-namespaces.ts'

await needs('root', 'nft', 'netns', 'curl')
t.setTimeout(120_000)

const deadUpstream = '198.18.250.1:5399'

t.test('settings', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecarWithVar({
    OPENSANDBOX_EGRESS_RULES: policy('*.ok.example'), OPENSANDBOX_EGRESS_MAX_RULES: '1', OPENSANDBOX_EGRESS_HTTP_ADDR: '127.0.0.1:18099', OPENSANDBOX_EGRESS_METRICS_EXTRA_ATTRS: 'team=blue',
    OPENSANDBOX_LOG_OUTPUT: 'stdout,/var/log/egress.log,/dev/full', OPENSANDBOX_EGRESS_POLICY_FILE: ' /proc/nowhere.json ',
    OPENSANDBOX_EGRESS_DNS_UPSTREAM: `${deadUpstream},${outside.v4}`, OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE: 'probe.example', OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE_INTERVAL_SEC: '1', OPENSANDBOX_EGRESS_BLOCK_DOH_443: 'please',
  }, { 'log_skip.always': 'quiet.ok.example' })
  const call = (method: string, path: string, body = ''): Promise<string> => space.run('curl', '-s', '-m', '5', '-w', ' %{http_code}', '-X', method, '-d', body, `http://127.0.0.1:18099${path}`)

  t.same((await space.ask({ ask: 'loud.ok.example' }, { ask: 'quiet.ok.example' }, { ask: 'denied.example' })).map(({ rcode }) => rcode), [0, 0, 3], 'answered by the second upstream: the first is dead')
  t.match(await call('GET', '/metrics'), /\{[^}]*team="blue"[^}]*\}/, 'extra labels, at the address of the policy API')
  t.match(await call('PATCH', '/policy', '[{"action":"allow","target":"other.example"}]'), /413$/, 'one rule more than it may have')
  t.match(await call('POST', '/policy', policy('*.ok.example')), /500$/, 'a policy file that cannot be written')
  await sidecar.said(/"level":"error"[^\n]*"egress\.update_failed"/)
  const log = await eventually('the probe tells which upstream is silent', async () => (sidecar.log().includes(`no answer from ${deadUpstream}`) ? sidecar.log() : undefined), 15)
  t.ok(space.seen.some(({ saw, name }) => saw === 'dns' && name === 'probe.example'), 'probed by the name that was set')
  t.notMatch(log, new RegExp(`no answer from ${outside.v4}|no upstream answers`), 'and not the other one, from the first probe on')
  const lines = log.trim().split('\n').map((line) => JSON.parse(line) as Record<string, unknown>)
  const hosts = lines.filter((line) => line['opensandbox.event'] === 'egress.outbound').map((line) => line['target.host'])
  t.same([hosts.includes('loud.ok.example'), hosts.includes('quiet.ok.example')], [true, false], 'names of log_skip.always have no line')
  t.match(lines.filter((line) => line['opensandbox.event'] === 'egress.update_failed'), [{ level: 'warn' }, { level: 'error' }], 'a refusal is a warning, a failure an error')
  t.match(lines[0], { team: 'blue', level: 'warn', 'opensandbox.event': 'egress.config', msg: 'OPENSANDBOX_EGRESS_BLOCK_DOH_443: "please" is not understood: the default holds' }, 'what is passed over is told')
  t.match(readFileSync(`/proc/${sidecar.pid}/root/var/log/egress.log`, 'utf8'), '"egress.loaded"', 'every output has it, and one on a full disk ends nothing')
})

t.test('what is removed is said', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('a.example', 'b.example') })
  t.match(await space.run('curl', '-s', '-X', 'DELETE', '-d', '["a.example"]', 'http://127.0.0.1:18080/policy'), '"status":"ok"')
  t.match(await sidecar.said(/"egress\.updated"/), /"egress\.updated"[^\n]*"change":"delete"[^\n]*"rules":\[\{"action":"allow","target":"a\.example"\}\]/)
})

t.test('who looks for a reason finds it', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example'), OPENSANDBOX_EGRESS_FLOOR: `${outside.v4}/32`, OPENSANDBOX_EGRESS_TOKEN: 'secret' })
  const call = (...args: string[]): Promise<string> => space.run('curl', '-s', '-m', '5', '-H', 'OPENSANDBOX-EGRESS-AUTH: secret', ...args)
  const counted = async (): Promise<number> => Number(/^egress_packets_denied_total (\d+)$/m.exec(await call('http://127.0.0.1:18080/metrics'))?.[1])
  const before = await counted()
  t.equal((await space.ask({ connect: outside.other }))[0]?.result, 'ECONNREFUSED')
  const after = await counted()
  t.ok(after > before, `a connection that is refused is counted: ${before}, ${after}`)
  t.match(await call('-X', 'POST', '-d', policy('*.ok.example', 'more.example'), 'http://127.0.0.1:18080/policy'), '"status":"ok"')
  t.ok(await counted() >= after, 'whatever policies come')
  t.match(await call('http://127.0.0.1:18080/policy/effective'), `"floor":["${outside.v4}/32"]`)
  await space.run('curl', '-s', '-m', '5', 'http://127.0.0.1:18080/policy')
  t.match(await sidecar.said(/"egress\.unauthorized"/), /"egress\.unauthorized"[^\n]*a request from inside/)
})

t.test('a line of an always file that is none', async (t) => {
  const rows: [name: string, text: string, reason: string][] = [['deny.always', 'http://x/', 'deny.always line 1'], ['allow.always', '10.0.0.0/99', 'allow.always line 1'], ['log_skip.always', '10.0.0.1', 'only host/domain entries']]
  await Promise.all(rows.map(async ([name, text, reason]) => {
    await using space = await createNamespaces()
    await t.rejects(space.startSidecarWithVar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }, { [name]: text }), { message: new RegExp(`exit 1: .*${reason}`, 's') }, name)
    t.not((await space.ask({ connect: outside.other }))[0]?.result, 'open', `${name}: nothing is open instead`)
  }))
})

t.test('it is never called healthy before it enforces', async (t) => {
  await using space = await createNamespaces()
  // The proof at the start waits a second for an answer that this keeps from it.
  await space.run('nft', 'add table inet foreign; add chain inet foreign in { type filter hook input priority 0; }; add rule inet foreign in udp dport 15353 drop')
  const program = 'for i in $(seq 80); do curl -s -o /dev/null -m 1 -w "%{http_code} " http://127.0.0.1:18080/healthz; sleep 0.03; done'
  const [health] = await Promise.all([
    space.run('sh', '-c', program),
    t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }), /exit 1: .*port 53 is not redirected/s),
  ])
  const answers = new Set(health.trim().split(' '))
  t.same([...answers].sort(), ['000', '503'], 'not there, or not ready')
})

t.test('somebody takes its table away: it says so, ends, and leaves everything shut', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.run('nft', 'delete table inet opensandbox')
  t.equal((await space.ask({ connect: outside.other }))[0]?.result, 'open', 'the way is open now')
  await eventually('the end', async () => (sidecar.log().includes('the rules are not in the kernel any more') ? true : undefined), 15)
  t.equal(await sidecar.over, 1)
  t.not((await space.ask({ connect: outside.other }))[0]?.result, 'open')
  await t.rejects(space.run('curl', '-s', '-m', '2', 'http://127.0.0.1:18080/healthz'))
})
