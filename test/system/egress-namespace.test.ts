/** The sidecar as a process in a network namespace of its own, against real nft and a small internet behind a veth. */
import { existsSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { needs } from '../support/abilities.ts'
import { makeCertificate } from '../support/certificate.ts'
import { eventually } from '../support/program.ts'
import { sized } from '../support/size.ts'
import { api, cgroupTree, createNamespaces, outside, ownCgroup, policy, type Seen } from './egress-namespaces.ts'

await needs('root', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(180_000)

const namesSeen = (seen: readonly Seen[]): string[] => seen.filter((line) => line.saw === 'dns').map((line) => line.name ?? '')

t.test('what an allow list lets out, and nothing else', async (t) => {
  await using space = await createNamespaces()
  const before = await space.ask({ connect: outside.v4 }, { udp: '169.254.169.254' }, { connect: outside.v6 })
  t.same(before.map((told) => told.result), ['open', 'echo', 'open'], 'without a policy all of it works')

  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example', `${outside.other}`) })
  const start = space.seen.length
  const refused = await space.ask({ connect: outside.v4 }, { connect: outside.v6 }, { connect: '169.254.169.254' }, { udp: outside.v4, port: 443 }, { udp: '169.254.169.254' }, { udp: '224.0.0.251', port: 5353 }, { connect: '198.18.200.1', port: 443 })
  for (const told of refused) t.match(told.result, /^(ECONNREFUSED|EPERM|EHOSTUNREACH|EACCES)$/, told.result)
  t.ok(refused.every((told) => told.ms < 1000), 'refused at once, nobody waits for a timeout')
  t.same((await space.ask({ connect: outside.other }))[0]?.result, 'open', 'an address rule')
  t.same(space.seen.slice(start).filter((line) => line.saw !== 'tcp' || line.to !== `::ffff:${outside.other}`), [], 'the internet saw nothing but that')

  const [denied, deniedTcp, malformed] = await space.ask({ ask: 'secret.evil.example' }, { ask: 'secret2.evil.example', tcp: true }, { ask: 'a%00b.ok.example' })
  t.same([denied?.rcode, deniedTcp?.rcode, malformed?.rcode], [3, 3, 3], 'NXDOMAIN')
  t.same(namesSeen(space.seen.slice(start)), [], 'no denied name left')

  const [allowed, tcp, elsewhere, docker] = await space.ask({ ask: 'a.ok.example' }, { ask: 'b.ok.example', tcp: true }, { ask: 'c.ok.example', server: '192.0.0.9' }, { ask: 'd.ok.example', server: '127.0.0.11' })
  t.same([allowed, tcp, elsewhere, docker].map((told) => `${told?.result} ${told?.rcode} ${told?.answers}`), Array<string>(4).fill('answered 0 1'), 'whichever resolver was asked, over UDP and TCP')
  t.same(namesSeen(space.seen.slice(start)).sort(), ['a.ok.example', 'b.ok.example', 'c.ok.example', 'd.ok.example'])
  await space.ask({ ask: 'ip-198-51-100-53.ok.example' })
  const open = await space.ask({ connect: outside.v4 }, { udp: outside.v4, port: 443 }, { connect: outside.v4, port: 853 }, { udp: outside.v4, port: 853 })
  t.equal(open[0]?.result, 'ECONNREFUSED', 'a name that leads to the resolver itself does not open it')
  t.match(open[2]?.result, /ECONNREFUSED/)

  const [learn] = await space.ask({ ask: 'ip-198-18-99-1.ok.example' })
  t.equal(learn?.answers, 1)
  const learned = await space.ask({ connect: '198.18.99.1' }, { udp: '198.18.99.1', port: 443 }, { connect: '198.18.99.1', port: 853 }, { connect: '198.18.99.2' })
  t.same(learned.map((told) => told.result), ['open', 'echo', 'ECONNREFUSED', 'ECONNREFUSED'], 'the learned address, but not DNS over TLS, nor its neighbour')
})

t.test('IPv6 like IPv4', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  t.equal((await space.ask({ connect: outside.v6 }))[0]?.result, 'ECONNREFUSED')
  const [asked] = await space.ask({ ask: 'v6.ok.example', type: 28, server: outside.v6 })
  t.same([asked?.result, asked?.rcode, asked?.answers], ['answered', 0, 1], 'a question to an IPv6 resolver is redirected')
  t.equal((await space.ask({ connect: outside.v6 }))[0]?.result, 'open')
  t.equal((await space.ask({ connect: '2001:db8:53::99' }))[0]?.result, 'ECONNREFUSED')
})

t.test('no IPv6 loopback: IPv6 is refused, IPv4 works', async (t) => {
  await using space = await createNamespaces({ ipv6: false })
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example', '::/0') })
  t.match(await space.run('nft', 'list', 'chain', 'inet', 'opensandbox', 'egress'), /meta nfproto ipv6 goto denied/)
  t.equal((await space.ask({ ask: 'ip-198-18-99-1.ok.example' }))[0]?.answers, 1)
})

t.test('a thousand first connections right behind their first answer: none refused', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  for (let round = 0; round < 5; round++) {
    const names = Array.from({ length: 200 }, (_, i) => `ip-198-18-${round}-${i}.ok.example`)
    const answers = await space.ask(...names.map((ask) => ({ ask })))
    t.ok(answers.every((told) => told.rcode === 0 && told.answers === 1))
    const connected = await space.ask(...names.map((_, i) => ({ connect: `198.18.${round}.${i}` })))
    t.same(connected.filter((told) => told.result !== 'open'), [])
  }
})

t.test('the policy changes: at once, also for connections that are open', async (t) => {
  await using space = await createNamespaces()
  const token = 'OPENSANDBOX-EGRESS-AUTH: secret'
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example', '*.fine.example'), OPENSANDBOX_EGRESS_TOKEN: 'secret' })
  await space.ask({ ask: 'ip-198-18-0-1.ok.example' }, { ask: 'ip-198-18-0-2.fine.example' })
  const [first, second] = await space.ask({ stream: '198.18.0.1' }, { stream: '198.18.0.2' })
  t.same(await space.ask({ write: first?.stream ?? 0 }, { write: second?.stream ?? 0 }).then((list) => list.map((told) => told.result)), ['echo', 'echo'])

  t.match(await api(space, 'POST', policy()), /^unauthorized\n401$/, 'the sandbox has no token')
  t.match(await api(space, 'POST', policy(), 'OPENSANDBOX-EGRESS-AUTH: wrong'), /401$/)
  t.match(await api(space, 'POST', policy('*.fine.example'), token), /"status":"ok","mode":"enforcing","enforcementMode":"dns\+nft".*200$/s)
  const bytes = space.seen.filter((line) => line.saw === 'bytes').length
  const after = await space.ask({ write: first?.stream ?? 0 }, { write: second?.stream ?? 0 }, { connect: '198.18.0.1' }, { connect: '198.18.0.2' }, { ask: 'x.ok.example' })
  t.same(after.map((told) => told.result), ['closed', 'echo', 'ECONNREFUSED', 'open', 'answered'])
  t.equal(after[4]?.rcode, 3)
  t.equal(space.seen.filter((line) => line.saw === 'bytes').length, bytes + 1, 'nothing more arrived over the cut connection')

  const look = (path: string): Promise<string> => space.run('curl', '-s', '-m', '5', '-H', token, `http://127.0.0.1:18080${path}`)
  t.match(await look('/metrics'), /egress_dns_questions_total\{result="denied"\} 1\n/)
  t.equal(await look('/readyz'), 'ready')
  t.match(await look('/policy/effective'), /"egress":\[\{"action":"allow","target":"\*\.fine\.example"\}\]/)

  t.match(await api(space, 'PATCH', JSON.stringify([{ action: 'deny', target: '198.18.0.0/16' }]), token), /200$/)
  t.same((await space.ask({ write: second?.stream ?? 0 }, { connect: '198.18.0.2' })).map((told) => told.result), ['closed', 'ECONNREFUSED'], 'a deny of the network cuts, too')
})

t.test('many rules, many learned addresses', async (t) => {
  await using space = await createNamespaces()
  const rules = Array.from({ length: 4095 }, (_, i) => `10.${i >> 8}.${i & 255}.${i % 2 === 0 ? '1' : '0/24'}`)
  // One environment variable holds 128 KiB at most; this policy is larger.
  const directory = t.testdir({ 'policy.json': policy('*.ok.example', ...rules) })
  await space.startSidecar({ OPENSANDBOX_EGRESS_POLICY_FILE: `${directory}/policy.json` })
  const count = sized(2000, 10_000)
  const place = (i: number): string => `198.18.${(i >> 8) & 255}.${i & 255}`
  for (let i = 0; i < count; i += 250) {
    const told = await space.ask(...Array.from({ length: 250 }, (_, k) => ({ ask: `ip-${place(i + k).replaceAll('.', '-')}.ok.example` })))
    t.same(told.filter((one) => one.answers !== 1), [], `${i} to ${i + 249}`)
  }
  t.match(await space.run('curl', '-s', 'http://127.0.0.1:18080/metrics'), `egress_learned_addresses ${count}\n`)
  const [first, last] = await space.ask({ connect: place(0) }, { connect: place(count - 1) })
  t.same([first?.result, last?.result], ['open', 'open'])
  const times: number[] = []
  for (let i = 0; i < 100; i++) times.push((await space.ask({ ask: `ip-198-18-200-${i}.ok.example` }))[0]?.ms ?? NaN)
  times.sort((a, b) => a - b)
  t.comment(`first use of a name: p50 ${times[50]?.toFixed(2)} ms, p99 ${times[98]?.toFixed(2)} ms`)
  t.ok((times[50] ?? NaN) < 50)
})

t.test('a name whose 500 addresses rotate: all stay open while it is allowed, none after that', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('rotating.ok.example', '*.fine.example') })
  const places = Array.from({ length: 500 }, (_, i) => `198.18.${128 + (i >> 8)}.${i & 255}`)
  // One after the other: those that ask at the same time share an answer.
  const told = []
  for (let i = 0; i < 125; i++) told.push(...(await space.ask({ ask: 'rotating.ok.example' })))
  t.same(told.filter(({ answers }) => answers !== 4), [], 'every answer has four of them')
  t.match(await space.run('curl', '-s', 'http://127.0.0.1:18080/metrics'), 'egress_learned_addresses 500\n')
  const connected = await space.ask(...places.map((connect) => ({ connect })))
  t.same(connected.filter(({ result }) => result !== 'open'), [], 'the first as well as the last')
  t.equal((await space.ask({ connect: '198.18.129.244' }))[0]?.result, 'ECONNREFUSED', 'but not the next one')
  t.match(await api(space, 'POST', policy('*.fine.example')), /200$/)
  const after = await space.ask(...places.map((connect) => ({ connect })))
  t.same(after.filter(({ result }) => result !== 'ECONNREFUSED'), [], 'shut with the name')
})

t.test('always files are read at the start and looked at again', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecarWithVar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example', outside.other) })
  const [flow] = await space.ask({ stream: outside.other })
  t.equal((await space.ask({ write: flow?.stream ?? 0 }))[0]?.result, 'echo')
  const rules = `/proc/${sidecar.pid}/root/var/egress/rules`
  writeFileSync(`${rules}/deny.always`, `# the operator's\n${outside.other}\nip-198-18-3-3.ok.example\n`)
  writeFileSync(`${rules}/allow.always`, '198.18.200.0/24\n')
  await eventually('they are seen', async () => (sidecar.log().includes('egress.always_reloaded') ? true : undefined), 45)
  t.same((await space.ask({ write: flow?.stream ?? 0 }, { connect: outside.other }, { ask: 'ip-198-18-3-3.ok.example' }, { connect: '198.18.200.1' })).map(({ result, rcode }) => rcode ?? result), ['closed', 'ECONNREFUSED', 3, 'open'], "the operator's word stands before the user's, also for what is open already")
  t.match(await api(space, 'GET', ''), /"egress":\[[^\]]*ok\.example[^\]]*\][^\]]*200$/s)
  t.notMatch(await api(space, 'GET', ''), /198\.18\.200/, 'the policy that is told is the user\'s')
  t.match(await space.run('curl', '-s', 'http://127.0.0.1:18080/policy/effective'), /"egress":\[\{"action":"deny","target":"198\.51\.100\.77"\},\{"action":"deny","target":"ip-198-18-3-3\.ok\.example"\},\{"action":"allow","target":"198\.18\.200\.0\/24"\}/)
})

t.test('what the checks find before anything is called ready', async (t) => {
  await using space = await createNamespaces()
  const check = async <T = string[]>(...what: string[]): Promise<T> => JSON.parse(await space.run(process.execPath, 'test/system/egress-checks.ts', ...what)) as T
  const elsewhere = 'the sidecar itself can connect to anywhere'
  await space.run('nft', 'add table inet opensandbox; add chain inet opensandbox nat { type nat hook output priority -110; }; add chain inet opensandbox egress { type filter hook output priority 0; }')
  t.match(await check(), [/^the rules are not in the kernel/, 'port 53 is not redirected to the sidecar', elsewhere], 'a table without rules')
  const loops = await check<string[][]>('loop', '50')
  t.equal(loops.length, 50)
  for (const found of loops) t.match(found, [/own questions come back to it/], 'its own questions arrive at its own door, and are seen in time each time')

  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  t.same(await check(), [], 'all is')
  await space.run('nft', 'flush chain inet opensandbox nat')
  t.match(await check(), [/^the rules are not in the kernel/, 'port 53 is not redirected to the sidecar'], 'the redirect is gone')
  await space.run('nft', 'add rule inet opensandbox nat meta l4proto { tcp, udp } th dport 53 redirect to :15353; insert rule inet opensandbox egress tcp dport 443 accept')
  t.match(await check(), [elsewhere], 'there is a way out')
})

t.test('what it says of its work', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example'), OPENSANDBOX_EGRESS_SANDBOX_ID: 'box' })
  const updates = async (): Promise<number> => Number(/^egress_nftables_updates_count_total\S* (\d+)$/m.exec(await space.run('curl', '-s', 'http://127.0.0.1:18080/metrics'))?.[1])
  const before = await updates()
  await space.ask({ ask: 'ip-198-18-0-9.ok.example' })
  await space.ask({ ask: 'secret.evil.example' })
  t.equal(await updates(), before + 1, 'the kernel was told of one address')
  t.match(await api(space, 'PATCH', JSON.stringify([{ action: 'deny', target: '198.18.9.0/24' }])), /200$/)
  t.match(await api(space, 'PATCH', '[{"action":"allow","target":"http://x/"}]'), /400$/)
  const lines = (await sidecar.said(/"egress\.update_failed"/)).trim().split('\n').map((line) => JSON.parse(line) as Record<string, unknown>)
  const of = (event: string): object | undefined => lines.find((line) => line['opensandbox.event'] === event)
  t.match(of('egress.loaded'), { level: 'info', msg: 'egress policy loaded', sandbox_id: 'box', logger: 'opensandbox.egress', 'egress.default': 'deny', rules: [{ action: 'allow', target: '*.ok.example' }] })
  t.match(of('egress.outbound'), { level: 'info', msg: 'egress outbound', 'target.host': 'ip-198-18-0-9.ok.example', 'target.ips': ['198.18.0.9'] })
  t.match(of('egress.denied'), { level: 'info', 'target.host': 'secret.evil.example', reason: 'default-denies' })
  t.match(of('egress.updated'), { level: 'info', msg: 'egress policy updated', 'egress.default': 'deny', rules: [{ action: 'deny', target: '198.18.9.0/24' }] })
  t.match(of('egress.update_failed'), { level: 'warn', msg: 'egress policy update failed', error: /http:\/\/x/ })
})

t.test('nft dies: a new one takes over', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  const children = readFileSync(`/proc/${sidecar.pid}/task/${sidecar.pid}/children`, 'utf8').trim().split(' ')
  t.equal(children.length, 1, 'one child, and that is nft')
  process.kill(Number(children[0]), 'SIGKILL')
  const [told] = await space.ask({ ask: 'ip-198-18-0-1.ok.example' })
  t.ok(told?.rcode === 0 || told?.rcode === 2, 'answered, or refused because the kernel did not confirm')
  t.equal((await space.ask({ ask: 'ip-198-18-0-2.ok.example' }))[0]?.answers, 1)
  t.equal((await space.ask({ connect: '198.18.0.2' }))[0]?.result, 'open')
})

t.test('nft hangs: SERVFAIL before the client gives up, and a new one takes over', async (t) => {
  await using space = await createNamespaces()
  const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  const [nft] = readFileSync(`/proc/${sidecar.pid}/task/${sidecar.pid}/children`, 'utf8').trim().split(' ')
  process.kill(Number(nft), 'SIGSTOP')
  const begun = performance.now()
  t.equal((await space.run('python3', '-c', patientQuestion, outside.v4)).trim(), 'rcode 2', 'the kernel did not confirm')
  t.ok(performance.now() - begun < 4500, 'in time')
  t.equal((await space.ask({ connect: '198.18.0.1' }))[0]?.result, 'ECONNREFUSED', 'and nothing opened')
  t.equal((await space.ask({ ask: 'ip-198-18-0-2.ok.example' }))[0]?.answers, 1)
  t.equal((await space.ask({ connect: '198.18.0.2' }))[0]?.result, 'open')
})

t.test('a lease is renewed in the middle of a connection', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.ask({ ask: 'ip-198-18-7-8.ok.example' })
  const [flow] = await space.ask({ stream: '198.18.7.8' })
  t.equal((await space.ask({ write: flow?.stream ?? 0 }))[0]?.result, 'echo')
  // As if its packets had not been seen for long.
  await space.run('nft', 'delete element inet opensandbox dyn_allow_v4 { 198.18.7.8 }; add element inet opensandbox dyn_allow_v4 { 198.18.7.8 timeout 2s }')
  for (let i = 0; i < 6; i++) {
    t.equal((await space.ask({ write: flow?.stream ?? 0 }))[0]?.result, 'echo')
    await delay(500)
  }
  t.match(/198\.18\.7\.8 timeout \S+ expires (\S+)/.exec(await space.run('nft', 'list', 'set', 'inet', 'opensandbox', 'dyn_allow_v4'))?.[1], /^5m5\ds|^6m/, 'longer than it would have had')
})

t.test('a lease is renewed by every packet', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  const expires = async (): Promise<string> => /198\.18\.7\.7 timeout \S+ expires (\S+)/.exec(await space.run('nft', 'list', 'set', 'inet', 'opensandbox', 'dyn_allow_v4'))?.[1] ?? ''
  await space.ask({ ask: 'ip-198-18-7-7.ok.example' })
  t.match(await expires(), /^1m|^\d\ds/, 'TTL 30 and a minute')
  await space.ask({ connect: '198.18.7.7' })
  t.match(await expires(), /^5m5\ds|^6m/, 'six minutes from the last packet')

  const [flow] = await space.ask({ stream: '198.18.7.7' })
  t.equal((await space.ask({ write: flow?.stream ?? 0 }))[0]?.result, 'echo')
  await space.run('nft', 'delete element inet opensandbox dyn_allow_v4 { 198.18.7.7 }')
  const after = await space.ask({ write: flow?.stream ?? 0 }, { connect: '198.18.7.7' }, { udp: '198.18.7.7' })
  t.same(after.map(({ result }) => result), ['echo', 'ECONNREFUSED', 'EPERM'], 'a TCP connection that was silent for longer goes on, nothing new begins')
})

t.test('more addresses than the table holds: a flow keeps its own', async (t) => {
  await using space = await createNamespaces({ ipv6: false })
  const told = JSON.parse(await space.run(process.execPath, 'test/system/egress-full-table.ts', '198.18.0.1', '80')) as { learned: number; most: number; echoes: string[]; unused: string; stillOpen: string[] }
  t.ok(told.most > 32_768 && told.learned < 32_768, `the table was full and has room again: ${told.most}, ${told.learned}`)
  t.same(new Set(told.echoes), new Set(['echo']), 'the flow was answered between all the others', { echoes: told.echoes })
  t.match(told.unused, /^E/, 'an address that nobody used is shut')
  t.same(told.stillOpen, [], 'what packets put back while it was given up is shut by the next policy')
})

t.test('it ends: nothing opens', async (t) => {
  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    await using space = await createNamespaces()
    const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
    t.equal(await sidecar.end(signal), signal === 'SIGTERM' ? 0 : 'SIGKILL')
    const start = space.seen.length
    const after = await space.ask({ ask: 'a.ok.example' }, { ask: 'a.ok.example', tcp: true }, { connect: outside.v4 }, { connect: outside.v6 }, { udp: '169.254.169.254' })
    t.notOk(after.some((told) => ['answered', 'open', 'echo'].includes(told.result)), `${signal}: ${after.map((told) => told.result).join(' ')}`)
    t.same(space.seen.slice(start), [])
  }
})

t.test('rules that somebody deleted are missed', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.run('nft', 'flush', 'chain', 'inet', 'opensandbox', 'nat')
  t.match(await space.run('curl', '-s', '-m', '5', 'http://127.0.0.1:18080/readyz'), /the rules are not in the kernel/)
})

t.test('started again in the same namespace', async (t) => {
  await using space = await createNamespaces()
  const first = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await first.end('SIGKILL')
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  t.equal((await space.ask({ ask: 'ip-198-18-0-1.ok.example' }))[0]?.answers, 1)
  t.equal((await space.ask({ connect: '198.18.0.1' }))[0]?.result, 'open')
  t.equal((await space.run('nft', 'list', 'tables')).match(/opensandbox/g)?.length, 1)
})

t.test('a start that fails leaves everything refused', async (t) => {
  await using space = await createNamespaces()
  // The root of the tree is everybody's: wherever this test was started, the sidecar starts there.
  await t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_EXEMPTION: 'cgroup', OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}' }, cgroupTree()), /exit 1:.*no exemption by cgroup/s)
  t.equal((await space.ask({ connect: outside.other }))[0]?.result, 'timeout', 'even under default allow')
  await using bad = await createNamespaces()
  await t.rejects(bad.startSidecar({ OPENSANDBOX_EGRESS_MODE: 'dns+nfd', OPENSANDBOX_EGRESS_RULES: '{"egress":[{"action":"maybe","target":"*"}]}' }), /exit 64:.*OPENSANDBOX_EGRESS_MODE: must be one of.*egress\[0\]\.action.*egress\[0\]\.target/s)
  t.equal(await bad.run('nft', 'list', 'tables'), '', 'bad configuration: nothing was touched')
})

for (const [rung, tools, scheme] of [['cgroup-iptables', ['ip', 'sh', 'mount', 'nft', 'iptables-restore', 'ip6tables-restore'], 'https'], ['cgroup-nft', ['ip', 'sh', 'mount', 'nft'], 'http']] as const) {
  t.test(`exempt by cgroup, ${rung}: only the sidecar, and only to its resolver and its webhook`, async (t) => {
    const { key, cert } = makeCertificate(['ip-198-18-50-1.hook.example'])
    const tls = t.testdir({ 'key.pem': key, 'cert.pem': cert, tools: {} })
    await using space = await createNamespaces({ tls })
    await using cgroup = await ownCgroup()
    // A machine that has just these programs.
    const PATH = `${tls}/tools`
    for (const tool of tools) symlinkSync(programPath(tool), `${PATH}/${tool}`)
    const hook = '198.18.50.1'
    const sidecar = await space.startSidecar({ PATH, OPENSANDBOX_EGRESS_EXEMPTION: 'cgroup', OPENSANDBOX_EGRESS_RULES: policy('*.ok.example'), OPENSANDBOX_EGRESS_DENY_WEBHOOK: `${scheme}://ip-198-18-50-1.hook.example:8443/denied?from=us`, OPENSANDBOX_EGRESS_SANDBOX_ID: 'box', NODE_EXTRA_CA_CERTS: `${tls}/cert.pem` }, cgroup.path)
    t.match(sidecar.log(), `"exemption":"${rung}"`)
    t.equal((await space.ask({ ask: 'ip-198-18-0-1.ok.example' }))[0]?.answers, 1)
    t.equal((await space.ask({ ask: 'many-500.ok.example', tcp: true }))[0]?.answers, 500, 'truncated over UDP, asked again over TCP')
    t.same(new Set((await space.ask(...Array.from({ length: 50 }, (_, i) => ({ connect: `198.18.${i & 1}.${i * 4}` })))).map((told) => told.result)), new Set(['open']))
    const forged = await space.run('python3', '-c', forgery, outside.v4, '198.18.200.1', hook)
    t.same(forged.trim().split('\n'), ['53 3', 'tcp 3', 'refused', 'refused'], 'a mark is wiped: questions are judged, connections refused')
    t.same(space.seen.filter((line) => line.name === 'evil.example' || line.to?.endsWith('198.18.200.1')), [])

    await space.ask({ ask: 'Secret.Evil.example' }, { ask: 'secret.evil.example', type: 28 }, { ask: 'ip-198-18-50-1.hook.example' })
    const posts = (): Seen[] => space.seen.filter((line) => line.saw === 'post' && line.secure === (scheme === 'https'))
    await eventually('every denied question is told', async () => (posts().length >= 5 ? true : undefined))
    const [headers = '', body = ''] = posts()[2]?.text?.split('\r\n\r\n') ?? []
    t.match(headers, /^POST \/denied\?from=us HTTP\/1\.1\r\n[\s\S]*host: ip-198-18-50-1\.hook\.example:8443/i)
    t.match(JSON.parse(body), { hostname: 'secret.evil.example', timestamp: /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/, source: 'opensandbox-egress', sandboxId: 'box' })
    t.same(posts().map((line) => JSON.parse(line.text?.split('\r\n\r\n')[1] ?? '').hostname), ['evil.example', 'evil.example', 'secret.evil.example', 'secret.evil.example', 'ip-198-18-50-1.hook.example'], 'and nothing about our own lookups')
    t.same((await space.ask({ connect: hook, port: 8443 }, { connect: hook, port: 443 })).map((told) => told.result), ['ECONNREFUSED', 'ECONNREFUSED'], 'the sandbox does not reach it')
    t.equal(await sidecar.end('SIGTERM'), 0)
  })
}

function programPath(program: string): string {
  const directory = [...(process.env['PATH'] ?? '').split(':'), '/usr/sbin', '/sbin'].find((path) => existsSync(`${path}/${program}`))
  if (directory === undefined) throw new Error(`${program} is not installed`)
  return `${directory}/${program}`
}

/** Root of the namespace sets the sidecar's mark on its own sockets, asks the resolver and connects to anywhere. */
const forgery = `
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(1, 36, 0x1ee7); s.settimeout(2)
question = b'\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4evil\\7example\\0\\0\\1\\0\\1'
s.sendto(question, (sys.argv[1], 53))
print(53, s.recv(512)[3] & 15)
s = socket.socket(); s.setsockopt(1, 36, 0x1ee7); s.settimeout(2)
s.connect((sys.argv[1], 53)); s.send(bytes([0, len(question)]) + question)
print('tcp', s.recv(512)[5] & 15)
for place in ((sys.argv[2], 443), (sys.argv[3], 8443)):
    c = socket.socket(); c.setsockopt(1, 36, 0x1ee7); c.settimeout(2)
    try:
        c.connect(place); print('connected')
    except OSError as e: print('refused' if e.errno == 111 else e)
`

/** Asks once and waits as long as a stub resolver does. */
const patientQuestion = `
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
s.sendto(b'\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\x0dip-198-18-0-1\\2ok\\7example\\0\\0\\1\\0\\1', (sys.argv[1], 53))
print('rcode', s.recv(512)[3] & 15)
`
