/**
 * Moments: the first packet against the first answer, a policy that changes while data flows, flows that the kernel still remembers.
 * "As if it had run out" is done from outside, as root of the host, so that nobody waits a minute.
 */
import { execa } from 'execa'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { packetsTo } from '#test/support/attack.ts'
import { docker, exec } from '#test/support/containers.ts'
import { netns } from '#test/support/internet-layout.ts'
import { startInternet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox } from '#test/support/stack.ts'
import { changePolicy } from './group.ts'
import { fire } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const names = 200
const connections = 1000
const crowd = Object.fromEntries(Array.from({ length: names }, (_, i) => [`n${i}.crowd.example`, { a: [`198.18.60.${i}`] }]))
/** Allowed as well, and known to nobody: their names are not asked for. */
const unasked = Object.fromEntries(Array.from({ length: 50 }, (_, i) => [`quiet${i}.crowd.example`, { a: [`198.18.61.${i}`] }]))
const zones = { ...crowd, ...unasked, 'allowed.example': { a: ['198.51.100.10'] }, 'short.example': { a: ['198.51.100.12'], ttl: 0 } }
const allow = (...targets: string[]): { defaultAction: string; egress: { action: string; target: string }[] } => ({ defaultAction: 'deny', egress: targets.map((target) => ({ action: 'allow', target })) })

t.test('a thousand first connections to two hundred names', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const guarded = await stack.create({ networkPolicy: allow('*.crowd.example') })
  const places = Object.values(crowd).map(({ a }) => a[0]!)

  // 1. before anybody asked, nothing gets out; the attempts leave conntrack and ARP as warm as they can
  await fire(guarded.main, [['steps', ...places.flatMap((place) => ['flood', place, '80', '2', '0', ';'])]])
  t.same((await internet.flows()).filter(({ to }) => to.startsWith('198.18.60.')), [], 'none early')

  // 2. everybody at once: each asks, and connects the moment it knows; all the while somebody knocks at places that nobody asked for
  await internet.forget()
  const knocking = guarded.run(['python3', '-c', knocks], 80)
  await eventually('somebody knocks', async () => ((await guarded.run(['test', '-e', '/tmp/knocking'])).code === 0 ? true : undefined))
  const { stdout, stderr } = await exec(guarded.main, ['node', '-e', crowdProgram, String(names), String(connections)], 60)
  await guarded.run(['touch', '/tmp/served'])
  const knocked = Number((await knocking).stdout)
  const result = JSON.parse(stdout || 'null') as { ok: number; errors: Record<string, number> } | null
  t.same(result, { ok: connections, errors: {} }, 'none refused', { stderr })
  const seen = await internet.flows()
  t.equal(new Set(seen.filter(({ to, protocol }) => to.startsWith('198.18.60.') && protocol === 'tcp').map(({ to }) => to)).size, names, 'and each place was reached')
  t.ok(knocked > 5, `each place that nobody asked for was knocked at ${knocked} times meanwhile, by TCP and by UDP`)
  t.same(seen.filter(({ to }) => to.startsWith('198.18.61.')), [], 'and not one packet came there')
  await fire(guarded.main, [['steps', ...Object.entries(unasked).flatMap(([name, { a }]) => ['ask', name, '127.0.0.11', ';', 'flood', a[0]!, '443', '1', '0', ';'])]])
  t.equal(new Set((await internet.flows()).filter(({ to }) => to.startsWith('198.18.61.')).map(({ to }) => to)).size, 50, 'until somebody asks')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

t.test('a policy that is tightened while data flows', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const changes: [why: string, change: (sandbox: Sandbox) => Promise<void>][] = [
    ['the rule is removed', (sandbox) => changePolicy(sandbox, 'DELETE', ['allowed.example'])],
    ['the name is denied', (sandbox) => changePolicy(sandbox, 'PATCH', [{ action: 'deny', target: 'allowed.example' }])],
    ['the address is denied', (sandbox) => changePolicy(sandbox, 'PATCH', [{ action: 'deny', target: '198.51.100.10' }])],
    ['its network is denied', (sandbox) => changePolicy(sandbox, 'PATCH', [{ action: 'deny', target: '198.51.100.0/28' }])],
    ['everything is denied', (sandbox) => changePolicy(sandbox, 'POST', {})],
  ]
  const guarded = await stack.create({ networkPolicy: allow('allowed.example') })
  for (const [why, change] of changes) {
    await changePolicy(guarded, 'POST', allow('allowed.example'))
    const running = guarded.run(['python3', '-c', transfer], 30)
    await eventually('data flows', async () => {
      const seen = await internet.exchanges()
      return seen.some(({ bytes }) => bytes > 100_000) && seen.some(({ server }) => server === 'udp-echo') ? true : undefined
    })
    await change(guarded)
    await internet.forget()
    // What is tried after this file is there is judged by what arrives after the line above.
    await guarded.run(['touch', '/tmp/tightened'])
    await delay(1000)
    await guarded.run(['touch', '/tmp/over'])
    const said = await running
    const flows = (await internet.flows()).filter(({ to }) => to === '198.51.100.10')
    t.same(flows, [], `${why}: not one packet of TCP or UDP arrives any more`, { said: said.stdout + said.stderr })
    const { datagrams, connections } = JSON.parse(said.stdout || '{}') as { datagrams?: number; connections?: number }
    t.ok(datagrams !== undefined && datagrams > 20 && connections !== undefined && connections > 2, `of ${datagrams} datagrams and ${connections} new connections that were tried`, { said: said.stdout + said.stderr })
  }
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

t.test('flows that the kernel remembers', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const guarded = await stack.create({ networkPolicy: allow('short.example') })
  const place = '198.51.100.12'

  await t.test('a lease that ran out', async (t) => {
    const flow = ['steps', 'source', '4100', 'udp', place, '5000', ';', 'source', '4101', 'tcp', place, '5000'] as const
    await fire(guarded.main, [['ask', 'short.example', '127.0.0.11']])
    await internet.forget()
    await fire(guarded.main, [flow])
    t.ok(packetsTo(await internet.flows(), place) > 4, 'while it holds, both flows go out')
    await inside(guarded, 'nft', 'delete element inet opensandbox dyn_allow_v4', `{ ${place} }`)
    await internet.forget()
    const said = await fire(guarded.main, [flow])
    t.equal(packetsTo(await internet.flows(), place), 0, 'the same ports again, after it: neither does', { said })
  })

  await t.test('a server that knocks after the policy shut it out', async (t) => {
    // Its own table full or its timeouts short, a namespace forgets a flow that the NAT of the host still knows. What comes back by
    // that way looks like a connection from outside, and answers to those are free.
    await inside(guarded, 'sysctl', '-qw', 'net.netfilter.nf_conntrack_udp_timeout=1', 'net.netfilter.nf_conntrack_tcp_timeout_syn_sent=1')
    await using knocker = await startKnocker(place)
    for (const protocol of ['udp', 'tcp'] as const) {
      await changePolicy(guarded, 'POST', allow(place))
      const running = guarded.run(['python3', '-c', answerer, protocol, place], 20)
      await eventually(`the server was reached (${protocol})`, async () => (knocker.heard().includes(`hello ${protocol}`) ? true : undefined))
      await changePolicy(guarded, 'POST', {})
      await internet.forget()
      await eventually('its knock came in', async () => ((await guarded.run(['cat', '/tmp/heard'])).stdout.includes(`knock ${protocol}`) ? true : undefined), 15)
      const said = await running
      const flows = (await internet.flows()).filter(({ to }) => to === place)
      t.same(flows, [], `${protocol}: not one packet answers it, not even half a handshake`, { said: said.stdout + said.stderr, heard: knocker.heard() })
    }
  })
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** Runs a program of the host in a sandbox's network namespace. */
async function inside(sandbox: Sandbox, ...command: readonly string[]): Promise<void> {
  const { State } = await docker.getContainer(sandbox.main).inspect()
  await execa`nsenter -t ${State.Pid} -n ${command}`
}

const crowdProgram = `
const dns = require('node:dns'), net = require('node:net')
const [names, count] = process.argv.slice(1).map(Number)
const resolver = new dns.promises.Resolver({ timeout: 4000, tries: 3 })
const errors = {}
let ok = 0
const one = async (i) => {
  const [address] = await resolver.resolve4('n' + (i % names) + '.crowd.example')
  await new Promise((resolve, reject) => {
    const socket = net.connect({ host: address, port: 443 }, () => socket.end('knock'))
    socket.setTimeout(20000, () => reject(new Error('timeout')))
    socket.on('error', reject).on('close', resolve).resume()
  })
  ok++
}
Promise.all(Array.from({ length: count }, (_, i) => one(i).catch((error) => { errors[error.code ?? error.message] = (errors[error.code ?? error.message] ?? 0) + 1 }))).then(() => console.log(JSON.stringify({ ok, errors })))
`

/** Knocks at the places whose names nobody asks for until the crowd is served; says how often at each. */
const knocks = `
import os,socket,time
rounds=0; end=time.time()+70
while not os.path.exists("/tmp/served") and time.time()<end:
  for i in range(50):
    for kind in (socket.SOCK_DGRAM,socket.SOCK_STREAM):
      s=socket.socket(socket.AF_INET,kind); s.setblocking(False)
      try: s.connect(("198.18.61.%d"%i,443)); s.send(b"knock")
      except OSError: pass
      s.close()
    time.sleep(0.002)
  rounds+=1; open("/tmp/knocking","w").close()
print(rounds)
`

/** Sends and receives over TCP and UDP, and once the policy is tightened connects anew as well, without a pause until it is told to end; says what was tried since. */
const transfer = `
import json,os,socket,threading,time
for path in ("/tmp/tightened","/tmp/over"):
  if os.path.exists(path): os.unlink(path)
address=socket.getaddrinfo("allowed.example",80,socket.AF_INET)[0][4][0]
end=time.time()+25
tightened=lambda: os.path.exists("/tmp/tightened")
def attempts(pause):
  while not os.path.exists("/tmp/over") and time.time()<end: yield tightened(); time.sleep(pause)
tried={"written":0,"datagrams":0,"connections":0}
def stream():
  s=socket.create_connection((address,5000),3); s.settimeout(2)
  threading.Thread(target=drain,args=(s,),daemon=True).start()
  try:
    for after in attempts(0.001): s.sendall(b"x"*4000); tried["written"]+=after
  except OSError as error: tried["cut"]=str(error)
def drain(s):
  try:
    while s.recv(65536): pass
  except OSError: pass
def datagrams():
  s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.setblocking(False)
  for after in attempts(0.002):
    try: s.sendto(b"x"*100,(address,5001))
    except OSError: pass
    tried["datagrams"]+=after
def connections():
  for after in attempts(0.02):
    if not after: continue
    try: socket.create_connection((address,5000),0.2).sendall(b"again")
    except OSError: pass
    tried["connections"]+=1
threads=[threading.Thread(target=each) for each in (stream,datagrams,connections)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(tried))
`

/** One packet while it is allowed, then nothing but answers. */
const answerer = `
import socket,sys,time,os
protocol,place=sys.argv[1:3]
open("/tmp/heard","w").close()
def heard(what): open("/tmp/heard","a").write(what)
if protocol=="udp":
  s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("0.0.0.0",4200)); s.settimeout(15)
  s.sendto(b"hello udp",(place,5000))
  heard(s.recv(99).decode())
  for _ in range(5):
    try: s.sendto(b"secret udp",(place,5000))
    except OSError as error: print(error)
    time.sleep(0.1)
else:
  s=socket.socket(socket.AF_INET,socket.SOCK_STREAM); s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); s.bind(("0.0.0.0",4201)); s.setblocking(False)
  try: s.connect((place,5000))
  except BlockingIOError: pass
  time.sleep(0.3); s.close()
  l=socket.socket(socket.AF_INET,socket.SOCK_STREAM); l.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); l.bind(("0.0.0.0",4201)); l.listen(); l.settimeout(10)
  try:
    c,_=l.accept(); heard("knock tcp"); c.sendall(b"secret tcp"); c.settimeout(3); print(c.recv(9))
  except OSError as error: heard("knock tcp did not come"); print(error)
`

/** A server in the internet that comes back two and a half seconds after it was spoken to, from the port it was spoken to. */
async function startKnocker(address: string): Promise<AsyncDisposable & { heard(): string }> {
  const rules = 'table ip knocker {\n chain pre {\n  type filter hook prerouting priority -301; policy accept;\n  meta l4proto { tcp, udp } th dport 5000 notrack\n }\n chain in {\n  type filter hook input priority 0; policy accept;\n  tcp dport 5000 tcp flags & (syn | ack) == syn drop\n }\n}\n'
  await execa({ input: rules })`ip netns exec ${netns} nft -f -`
  let heard = ''
  const child = execa({ reject: false, buffer: false })`ip netns exec ${netns} python3 -u -c ${knocker} ${address}`
  child.stdout.setEncoding('utf8').on('data', (text: string) => (heard += text))
  await eventually('the server listens', async () => (heard.includes('up') ? true : undefined))
  return {
    heard: () => heard,
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await child
    },
  }
}

const knocker = `
import socket,sys,threading,time
address=sys.argv[1]
def udp():
  s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind((address,5000)); print("up",flush=True)
  while True:
    data,peer=s.recvfrom(999); print(data.decode(),flush=True)
    if data.startswith(b"hello"): threading.Timer(2.5,lambda: s.sendto(b"knock udp",peer)).start()
def back(peer):
  time.sleep(2.5)
  s=socket.socket(socket.AF_INET,socket.SOCK_STREAM); s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); s.bind((address,5000)); s.settimeout(5)
  try:
    s.connect(peer); print(s.recv(99).decode(),flush=True)
  except OSError as error: print(error,flush=True)
def tcp():
  s=socket.socket(socket.AF_PACKET,socket.SOCK_DGRAM,socket.htons(0x0800))
  seen=False
  while True:
    data=s.recv(2000)
    if data[9]==6 and data[16:20]==socket.inet_aton(address) and data[22:24]==b"\\x13\\x88" and data[33]&0x12==2 and not seen:
      seen=True; peer=(socket.inet_ntoa(data[12:16]),data[20]*256+data[21]); print("hello tcp",flush=True); threading.Thread(target=back,args=(peer,)).start()
threading.Thread(target=tcp,daemon=True).start()
udp()
`
