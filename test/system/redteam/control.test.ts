/**
 * The sidecar itself: its policy API, which shares the loopback with the sandbox, its rules, which stand in the sandbox's namespace, and its
 * places, which come free when it dies.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { execa } from 'execa'
import t, { type Test } from 'tap'
import { request } from 'undici'
import { headerNames } from '#policies/wire.ts'
import { needs } from '#test/support/abilities.ts'
import { packetsTo, questionsFor } from '#test/support/attack.ts'
import { createNetwork, docker, exec, type TestNetwork } from '#test/support/containers.ts'
import { fetchThrough, openDoor } from '#test/support/doors.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox, type Stack } from '#test/support/stack.ts'
import { changePolicy, cloneGroup, policyToken } from './group.ts'
import { fire, ownName, ownPlace, resolver } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(200_000)

const zones = { 'allowed.example': { a: ['198.51.100.10'] }, '*.leak.example': { a: ['198.51.100.66'] } }
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'allowed.example' }] }
const allowAll = '{"defaultAction":"allow"}'

/** curl's words for requests that mean to change the policy or to read it. */
const requests: readonly [why: string, ...words: string[]][] = [
  ['POST', '-X', 'POST', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['PUT', '-X', 'PUT', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['PATCH', '-X', 'PATCH', '-d', '[{"action":"allow","target":"198.18.0.0/16"}]', 'http://127.0.0.1:18080/policy'],
  ['DELETE', '-X', 'DELETE', '-d', '["allowed.example"]', 'http://127.0.0.1:18080/policy'],
  ['reading it', 'http://127.0.0.1:18080/policy'],
  ['HEAD', '-I', 'http://127.0.0.1:18080/policy'],
  ['another address of the loopback', '-d', allowAll, 'http://127.6.6.6:18080/policy'],
  ['an empty token', '-H', 'OPENSANDBOX-EGRESS-AUTH;', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['a guessed token', '-H', 'OPENSANDBOX-EGRESS-AUTH: undefined', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['two tokens', '-H', 'OPENSANDBOX-EGRESS-AUTH: a', '-H', 'OPENSANDBOX-EGRESS-AUTH: b', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['a token of 15,000 bytes', '-H', `OPENSANDBOX-EGRESS-AUTH: ${'x'.repeat(15_000)}`, '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['a token as query', '-d', allowAll, 'http://127.0.0.1:18080/policy?token=x&OPENSANDBOX-EGRESS-AUTH=x'],
  ['a foreign Host (DNS rebinding)', '-H', 'Host: allowed.example', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['a Host that is an address', '-H', 'Host: 169.254.169.254', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ["a browser's cross-site request", '-H', 'Origin: http://allowed.example', '-H', 'Content-Type: text/plain', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['pretending to be a proxy', '-H', 'X-Forwarded-For: 172.17.0.1', '-H', 'X-Real-IP: 127.0.0.1', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['HTTP/1.0', '-0', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['the whole URL as target', '-x', 'http://127.0.0.1:18080', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['a double slash', '--path-as-is', '-d', allowAll, 'http://127.0.0.1:18080//policy'],
  ['dots', '--path-as-is', '-d', allowAll, 'http://127.0.0.1:18080/healthz/../policy'],
  ['an escaped letter', '-d', allowAll, 'http://127.0.0.1:18080/%70olicy'],
  ['method override', '-H', 'X-HTTP-Method-Override: POST', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
  ['a body without end', '-H', 'Transfer-Encoding: chunked', '-d', allowAll, 'http://127.0.0.1:18080/policy'],
]

/** Programs that would take the rules away or lead around them; the last one leaves nothing of them. */
const changes: readonly [why: string, ...words: string[]][] = [
  ["a rule before the sidecar's, iptables", 'iptables', '-I', 'OUTPUT', '-j', 'ACCEPT'],
  ['the rules that wipe marks', 'iptables', '-t', 'raw', '-F'],
  ["Docker's rules", 'iptables', '-t', 'nat', '-F'],
  ["a rule before the sidecar's, nft", 'nft', 'insert', 'rule', 'inet', 'opensandbox', 'egress', 'accept'],
  ['an address among the learned ones', 'nft', 'add', 'element', 'inet', 'opensandbox', 'dyn_allow_v4', '{ 198.18.0.9 }'],
  ['a chain of its own before all', 'nft', 'add table inet own; add chain inet own out { type filter hook output priority -400; }'],
  ["the resolver's address on the loopback", 'ip', 'address', 'add', '198.51.100.53/32', 'dev', 'lo'],
  ['another address of the interface', 'ip', 'address', 'add', '10.66.6.6/8', 'dev', 'eth0'],
  ['another hardware address', 'ip', 'link', 'set', 'eth0', 'address', '02:42:ac:66:66:66'],
  ['packets of another size', 'ip', 'link', 'set', 'eth0', 'mtu', '600'],
  ['a pair of interfaces', 'ip', 'link', 'add', 'own0', 'type', 'veth', 'peer', 'name', 'own1'],
  ['a route', 'ip', 'route', 'add', '198.18.0.9', 'dev', 'lo'],
  ['a rule for routes', 'ip', 'rule', 'add', 'pref', '9', 'lookup', 'main'],
  ['a queue', 'tc', 'qdisc', 'add', 'dev', 'eth0', 'root', 'pfifo'],
  ['the loopback put down', 'ip', 'link', 'set', 'lo', 'down'],
  ["the sidecar's table", 'nft', 'delete', 'table', 'inet', 'opensandbox'],
  ['every rule there is', 'nft', 'flush', 'ruleset'],
]

t.test('the policy API and the rules, from inside', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet, gateways: ['auto'] })
  const guarded = await stack.create({ networkPolicy })
  await using network = await createNetwork('control')
  await using bare = await cloneGroup(network, stack, guarded, { OPENSANDBOX_EGRESS_TOKEN: '' })
  const token = await policyToken(guarded)
  const before = await readPolicy(guarded, token)

  const place = ownPlace()
  await internet.forget()
  await exec(bare.main, ['curl', '-s', '-m', '3', ...requests[0]!.slice(1)])
  await fire(bare.main, [['udp', place, '443']])
  t.ok(packetsTo(await internet.flows(), place) > 0, 'without a token any of these opens everything')

  const ways = [guarded.address, 'localhost', '0.0.0.0'].map((address): [string, ...string[]] => [`by way of ${address}`, '-d', allowAll, `http://${address}:18080/policy`])
  const all = [...requests, ...ways]
  const codes = await fire(guarded.main, all.map(([, ...words]) => ['curl', ...words]))
  for (const [i, [why]] of all.entries()) t.match(codes[i], /^(400|401|403|404|431)$/, `${why}: refused`)
  await internet.forget()
  await fire(guarded.main, [['udp', place, '443']])
  t.equal(packetsTo(await internet.flows(), place), 0, 'nothing is open')
  t.same(await readPolicy(guarded, token), before, 'and the policy is what it was')

  const gateway = stack.gateways.get('auto')!.url.replace('http://', '')
  for (const headers of [{}, { [headerNames.egressAuth]: '' }, { [headerNames.egressAuth]: 'x' }, { origin: 'http://allowed.example' }]) {
    for (const mode of ['wildcard', 'uri', 'header'] as const) {
      const { status } = await fetchThrough(openDoor(mode, gateway, guarded.id, 18080), '/policy', { method: 'POST', body: Buffer.from(allowAll), headers })
      t.ok([401, 403].includes(status), `through the gateway, ${mode}, with ${JSON.stringify(headers)}: ${status}`)
    }
  }
  t.same(await readPolicy(guarded, token), before)

  await t.test('rules, addresses, links and routes', (t) => tryChanges(t, stack, internet, network, guarded))
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

t.test('strangers at the policy API, who come again whenever they are cut off', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const guarded = await stack.create({ networkPolicy })
  using strangers = spawn(process.execPath, ['-e', crowd, guarded.address], { stdio: ['ignore', 'pipe', 'inherit'] })
  await once(strangers.stdout, 'data')
  const through: string[] = []
  for (let i = 0; i < 20; i++) through.push(await changePolicy(guarded, 'PATCH', [{ action: i % 2 === 0 ? 'allow' : 'deny', target: '198.18.0.9' }]).then(() => 'changed', String))
  t.same(through, Array(20).fill('changed'), 'each of 20 changes of the owner comes through')
})

t.test('the places of a dead sidecar', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const free = await stack.create()
  const baseline = await squat(free, () => Promise.resolve())
  t.ok(baseline.seen > 100, 'the squatter gets out where there is no sidecar', baseline)
  for (const signal of ['SIGKILL', 'SIGTERM', 'SIGSTOP'] as const) await takeOver(t, signal)
  // With nobody there to end the group the squatter lives on, and has the ports for itself.
  const left = await stack.create({ networkPolicy })
  await stack.server.stop('SIGKILL')
  const { seen, said } = await squat(left, () => docker.getContainer(left.sidecar!).kill({ signal: 'SIGKILL' }))
  const output = (said as { stdout?: string }).stdout ?? ''
  for (const port of [15353, 18080]) t.match(output, new RegExp(`took \\S+ ${port}`), `port ${port} was taken`)
  t.match(output, 'answered itself', 'and questions of the sandbox found the squatter')
  t.equal(seen, 0, 'nothing gets out even then')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')

  async function takeOver(t: Test, signal: string): Promise<void> {
    const guarded = await stack.create({ networkPolicy })
    const { seen, said } = await squat(guarded, () => docker.getContainer(guarded.sidecar!).kill({ signal }))
    t.equal(seen, 0, `${signal}: nothing gets out before, while or after the sidecar ends`, { said })
    // A sidecar that only hangs keeps its rules and its sandbox.
    if (signal !== 'SIGSTOP') t.ok(await eventually('the group is gone', async () => ((await stack.containers()).some(({ Id }) => Id === guarded.main) ? undefined : true)), `${signal}: the sandbox goes with its sidecar`)
  }

  async function squat(sandbox: Sandbox, kill: () => Promise<unknown>): Promise<{ seen: number; said: unknown }> {
    const [place, name] = [ownPlace(), ownName()]
    await internet.forget()
    const running = sandbox.run(['timeout', '4', 'python3', '-c', squatter, place, name], 10)
    await eventually('the squatter runs', async () => ((await exec(sandbox.main, ['test', '-e', '/tmp/squatting'])).code === 0 ? true : undefined))
    await kill()
    const said = await running.catch((error: Error) => error.message)
    return { seen: packetsTo(await internet.flows(), place) + questionsFor(await internet.questions(), name), said }
  }
})

/** 200 loops that say half a head; tells when they are more than all the places. */
const crowd = `
let made=0
const again=()=>{
  const s=require("node:net").connect(18080,process.argv[1],()=>{ s.write("POST /policy HTTP/1.1\\r\\nhost: x\\r\\n"); if(++made===1000) console.log("crowded") })
  s.on("error",()=>{}).on("close",again).resume()
}
for(let i=0;i<200;i++) again()`

/** Takes the sidecar's ports the moment they are free, answers its questions, and tries the way out without a pause. */
const squatter = `
import socket,sys,os,threading,time
place,name=sys.argv[1:3]
def dns(n): return b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0"+b"".join(bytes([len(p)])+p.encode() for p in n.split("."))+b"\\0\\0\\1\\0\\1"
def take(kind,port):
  while True:
    s=socket.socket(socket.AF_INET,kind); s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)
    try:
      s.bind(("0.0.0.0",port))
      if kind==socket.SOCK_STREAM: s.listen()
      print("took",kind,port,flush=True)
      while kind==socket.SOCK_DGRAM:
        asked,peer=s.recvfrom(512); s.sendto(asked[:2]+b"\\x81\\x80"+asked[4:6]+b"\\0\\1\\0\\0\\0\\0"+asked[12:]+b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4"+socket.inet_aton(place),peer)
      time.sleep(9)
    except OSError: time.sleep(0.001)
    s.close()
for kind,port in ((socket.SOCK_DGRAM,15353),(socket.SOCK_STREAM,15353),(socket.SOCK_STREAM,18080)): threading.Thread(target=take,args=(kind,port),daemon=True).start()
open("/tmp/squatting","w").close()
u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); u.setblocking(False)
end=time.time()+2
heard=False
while time.time()<end:
  for to in ((place,443),("${resolver}",53),("127.0.0.1",15353)):
    try: u.sendto(dns(name),to)
    except OSError: pass
  try: heard=heard or socket.inet_aton(place) in u.recv(512)[-4:]
  except OSError: pass
  time.sleep(0.002)
if heard: print("answered itself",flush=True)
`

async function readPolicy(sandbox: Sandbox, token: string): Promise<unknown> {
  const answer = await request(`http://${sandbox.address}:18080/policy`, { headers: { [headerNames.egressAuth]: token } })
  return answer.body.json()
}

async function tryChanges(t: Test, stack: Stack, internet: Internet, network: TestNetwork, guarded: Sandbox): Promise<void> {
  const victim = await stack.create({ networkPolicy })
  const admin = await network.run({ HostConfig: { NetworkMode: `container:${victim.sidecar}`, CapAdd: ['NET_ADMIN'] } })
  const lone = await network.run({ HostConfig: { NetworkMode: 'none', PidMode: 'host', CapAdd: ['SYS_ADMIN', 'SYS_PTRACE'], SecurityOpt: ['seccomp=unconfined', 'apparmor=unconfined'] } })
  const [place, hosts] = [ownPlace(), ownPlace()]
  const enter = ['1', String(process.pid)].map((pid) => ['entered', pid, hosts, '443'])

  for (const [why, ...words] of changes) {
    const before = await namespaceOf(victim)
    const { code, stderr } = await exec(admin.id, words)
    t.ok(code === 0 && (await namespaceOf(victim)) !== before, `${why}: changed by whoever has NET_ADMIN`, { code, stderr })
  }
  await internet.forget()
  await fire(admin.id, [['udp', place, '443']])
  const said = await fire(lone.id, enter.slice(1))
  const flows = await internet.flows()
  t.ok(packetsTo(flows, place) > 0, 'and then everything is open')
  t.ok(packetsTo(flows, hosts) > 0, "and whoever may look into the host's processes leaves by their namespace", { said })

  const before = await namespaceOf(guarded)
  await internet.forget()
  const refused = await fire(guarded.main, [...changes.map(([, ...words]) => ['command', ...words]), ...enter])
  await fire(guarded.main, [['udp', place, '443'], ['tcp', place, '443']])
  for (const [i, [why]] of changes.entries()) t.match(refused[i], /^[1-9]/, `${why}: refused in a sandbox with a policy`)
  t.equal(await namespaceOf(guarded), before, 'everything is as it was')
  const after = await internet.flows()
  t.same([packetsTo(after, place), packetsTo(after, hosts)], [0, 0], 'and nothing is open', { refused })
}

/** Everything that decides where a packet of a sandbox goes, read from the host; without counters and clocks. */
async function namespaceOf(sandbox: Sandbox): Promise<string> {
  const { State } = await docker.getContainer(sandbox.main).inspect()
  const list = 'nft -s list ruleset; ip -o link; ip -o address; ip route show table all; ip rule'
  return (await execa`nsenter -t ${State.Pid} -n sh -c ${list}`).stdout
}
