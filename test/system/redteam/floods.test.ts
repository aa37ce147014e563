/**
 * Floods from inside: questions, connections to the sidecar, and the namespace's table of connections. Whoever floods harms itself; its policy
 * holds all the while, its neighbour notices nothing, and it is served again afterwards.
 */
import t, { type Test } from 'tap'
import { request } from 'undici'
import { needs } from '#test/support/abilities.ts'
import { packetsTo, questionsFor } from '#test/support/attack.ts'
import { docker } from '#test/support/containers.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type Sandbox, type Stack } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const denied = '198.51.100.31'
const zones = { '*.allowed.example': { a: ['198.51.100.10'] }, '*.leak.example': { a: ['198.51.100.66'] } }
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: '*.allowed.example' }] }
const seconds = 2
/** Of a sidecar; a flood of questions would take twice as much. */
const cpus = 0.5

/** Each for so many seconds, without a pause, from as many threads as help; says how much it did. */
const floods: [why: string, program: string, least: number][] = [
  ['questions, allowed and denied, by UDP', `
def flood(n):
  s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.setblocking(False); s.connect(("198.51.100.53",53)); done=0
  while time.time()<end:
    for suffix in ("allowed.example","leak.example"):
      try: s.send(question("q%d-%d.%s"%(n,done,suffix))); done+=1
      except OSError: pass
  return done`, 2000],
  ['connections to its DNS and its policy API, held and half spoken', `
def flood(n):
  held=[]; done=0
  while time.time()<end:
    s=socket.socket(); s.setblocking(False)
    try: s.connect(("127.0.0.1",(15353,18080)[done%2]))
    except OSError: pass
    held.append(s); done+=1
    if len(held)>50:
      try: held[-50].send((b"\\1",b"POST /policy HTTP/1.1\\r\\n")[(done-50)%2])
      except OSError: pass
    if len(held)>200: held.pop(0).close()
  return done`, 2000],
  ['requests to its policy API, in a row on each connection', `
def flood(n):
  many=b"GET / HTTP/1.1\\r\\nhost:\\r\\n\\r\\n"*4000; done=0; open_=[]
  for i in range(30):
    s=socket.socket(); s.settimeout(1)
    try: s.connect(("127.0.0.1",18080))
    except OSError: continue
    s.setblocking(False); open_.append(s)
  while time.time()<end:
    for s in open_:
      try: done+=s.send(many)//25
      except OSError: pass
      try:
        while s.recv(65536): pass
      except OSError: pass
  return done`, 2000],
  // A connection is remembered for every address of the loopback that was sent to; the processes end when the table is full.
  ["the namespace's table of connections", `
def flood(n):
  held=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); held.bind(("0.0.0.0",6000+n))
  read=lambda name: int(open("/proc/sys/net/netfilter/nf_conntrack_"+name).read())
  if os.fork()==0:
    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)
    for i in range(1,2**20):
      try: s.sendto(b"x",("127.%d.%d.%d"%(i>>16,i>>8&255,i&255),6000+n))
      except OSError: pass
      if i%4096==0 and (read("count")>0.97*read("max") or time.time()>end+40): break
    os._exit(0)
  os.wait()
  while time.time()<end: time.sleep(0.1)
  return read("count") if n==0 else 0`, 200_000],
]

t.test('floods', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet, config: { egress: { cpus } } })
  const [flooder, neighbour] = await Promise.all([stack.create({ networkPolicy }), stack.create({ networkPolicy })])
  const free = await stack.create()
  const { HostConfig, State: before } = await docker.getContainer(flooder.sidecar!).inspect()
  t.match(HostConfig, { CapAdd: ['NET_ADMIN'], CapDrop: ['ALL'], ReadonlyRootfs: true }, 'the sidecar may do no more than it must')
  t.ok((HostConfig.Memory ?? 0) > 0 && (HostConfig.Memory ?? 0) <= 2 ** 29 && (HostConfig.PidsLimit ?? 0) > 0, 'and has limits', { memory: HostConfig.Memory, pids: HostConfig.PidsLimit })
  await run(free, ['knock'])
  t.ok(packetsTo(await internet.flows(), denied) > 0, 'without a policy the denied place is reached')
  const calm = await run(neighbour, ['look', 'slowly'])
  t.match(calm, served, `nobody floods yet: ${calm}`)
  const quiet = medianOf(calm)
  for (const [why, program, least] of floods) await t.test(why, (t) => flood(t, { internet, stack, flooder, neighbour, quiet }, program, least))
  const { State: after } = await docker.getContainer(flooder.sidecar!).inspect()
  t.same([after.Running, after.OOMKilled, after.StartedAt], [true, false, before.StartedAt], 'the sidecar lived through all of it')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

// The kernel makes room in a full table by giving up connections that nobody has answered. These were, for longer than two seconds.
t.test('a table of connections that is full to the last place', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const flooder = await stack.create({ networkPolicy })
  const ask = (): Promise<number> => request(`http://${flooder.address}:18080/healthz`, { reset: true, headersTimeout: 2000, signal: AbortSignal.timeout(3000) }).then(({ statusCode, body }) => body.dump().then(() => statusCode), () => 0)
  const filled = Number(await run(flooder, ['fill'], filler))
  t.ok(filled >= 0.99, `places taken: ${filled}`)
  t.same(await Promise.all(Array.from({ length: 10 }, ask)), Array(10).fill(200), 'its policy API is reached all the same')
  const begin = performance.now()
  const { status } = await stack.api.call('PATCH', `/v1/sandboxes/${flooder.id}/network-policy`, networkPolicy.egress)
  const took = performance.now() - begin
  t.ok(status === 200 && took < 5000, `its policy is changed within seconds: ${status}, ${took.toFixed(0)} ms`)
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

async function flood(t: Test, { internet, stack, flooder, neighbour, quiet }: { internet: Internet; stack: Stack; flooder: Sandbox; neighbour: Sandbox; quiet: number }, program: string, least: number): Promise<void> {
  await internet.forget()
  const used = await processorTime(flooder.sidecar!)
  const began = performance.now()
  const flooding = run(flooder, ['flood', 'knock'], program)
  // Whoever tightens a policy in the middle of it comes from the host, as here.
  let heard = 0
  for (let i = 0; i < 10; i++) heard += (await request(`http://${flooder.address}:18080/healthz`, { reset: true, headersTimeout: 2000 }).then(({ statusCode, body }) => body.dump().then(() => statusCode), () => 0)) === 200 ? 1 : 0
  t.equal(heard, 10, 'its policy API has room for the server all the while')
  const changing = performance.now()
  const { status } = await stack.api.call('PATCH', `/v1/sandboxes/${flooder.id}/network-policy`, networkPolicy.egress)
  const changed = performance.now() - changing
  t.ok(status === 200 && changed < 5000, `its policy is changed within seconds: ${status}, ${changed.toFixed(0)} ms`)
  const looked = await run(neighbour, ['look', 'slowly'])
  t.match(looked, served, 'the neighbour asks and connects as always')
  // Processors are shared with two threads of the flood, so it need not be as fast as before: what it shows is that nobody stands in line behind a flood.
  t.ok(medianOf(looked) < Math.max(100, 10 * quiet), `and waits ${medianOf(looked)} ms for both, ${quiet} ms when nobody floods`)
  const done = Number(await flooding)
  t.ok(done >= least, `it was a flood: ${done}`)
  const share = (await processorTime(flooder.sidecar!) - used) / (performance.now() - began)
  t.ok(share < cpus * 1.1, `its sidecar took ${share.toFixed(2)} processors of ${cpus}`)
  t.equal(packetsTo(await internet.flows(), denied), 0, 'the denied place heard nothing')
  t.equal(questionsFor(await internet.questions(), 'leak.example'), 0, 'nobody was asked for a denied name')
  await eventually('the sidecar answers for itself', async () => ((await request(`http://${flooder.address}:18080/healthz`).catch(() => undefined))?.statusCode === 200 ? true : undefined), 30)
  await eventually('whoever flooded is served again', async () => (served.test(await run(flooder, ['look'])) ? true : undefined), 60)
}

/** ms that a container has had of all processors. */
async function processorTime(id: string): Promise<number> {
  const { cpu_stats } = await docker.getContainer(id).stats({ stream: false, 'one-shot': true })
  return cpu_stats.cpu_usage.total_usage / 1e6
}

const lookups = 20
const served = new RegExp(`^${lookups} of ${lookups}, `)
/** ms of the usual question and connection, as `look` says them. */
const medianOf = (looked: string): number => Number(/ ([\d.]+) ms$/.exec(looked)?.[1] ?? NaN)

/** knock: at the denied place all the time; flood: two threads of it; look: ask and connect, so many times, slowly: all through a flood. */
async function run(sandbox: Sandbox, what: readonly ('knock' | 'flood' | 'look' | 'slowly' | 'fill')[], program = ''): Promise<string> {
  const { stdout, stderr, code } = await sandbox.run(['python3', '-c', `${prelude}${program}\n${main}`, ...what], 60)
  if (code !== 0) throw new Error(`${what.join()} ended with ${code}: ${stderr}`)
  return stdout.trim()
}

const prelude = `
import os,socket,sys,threading,time
end=time.time()+${seconds}
def question(name): return b"\\5\\5\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0"+b"".join(bytes([len(p)])+p.encode() for p in name.split("."))+b"\\0\\0\\1\\0\\1"
`
/** Two processes; each has a socket that asks itself at every address of its part of the loopback, answers once, and asks again two seconds later. */
const filler = `
import struct
def read(name): return int(open("/proc/sys/net/netfilter/nf_conntrack_"+name).read())
def fill(n):
  one=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); one.bind(("127.0.0.1",7000+n)); one.setblocking(False)
  other=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); other.bind(("0.0.0.0",6000+n)); other.setblocking(False)
  for answered in (True,False):
    for i in range(read("max")//2+1000):
      place=bytes([127,16+(i>>16)+16*n,i>>8&255,i&255])
      try:
        one.sendto(b"x",(socket.inet_ntoa(place),6000+n))
        if answered: other.sendmsg([b"y"],[(0,8,struct.pack("=I4s4s",0,place,bytes(4)))],0,("127.0.0.1",7000+n))
      except OSError: pass
    time.sleep(2.1)
if "fill" in sys.argv:
  children=[]
  for n in range(2):
    children.append(os.fork())
    if children[-1]==0:
      fill(n); os._exit(0)
  for child in children: os.waitpid(child,0)
  print(read("count")/read("max"))
`
const main = `
def knock():
  while time.time()<end:
    for kind in (socket.SOCK_DGRAM,socket.SOCK_STREAM):
      s=socket.socket(socket.AF_INET,kind); s.settimeout(0.2)
      try: s.connect(("${denied}",443)); s.send(b"x")
      except OSError: pass
      s.close()
    time.sleep(0.01)
# The upstream is one for all, and under a flood it may lose anybody's datagram.
def lookup(name):
  try: return socket.getaddrinfo(name,443,socket.AF_INET)[0][4]
  except OSError: return socket.getaddrinfo(name,443,socket.AF_INET)[0][4]
def look():
  good=0; times=[]
  for i in range(${lookups}):
    begin=time.monotonic()
    try:
      address=lookup("n%d.allowed.example"%i)
      socket.create_connection(address,5).close(); good+=1
    except OSError as error: print(error,file=sys.stderr)
    times.append(1000*(time.monotonic()-begin))
    if "slowly" in sys.argv: time.sleep(0.04)
  print("%d of ${lookups}, median %.1f ms"%(good,sorted(times)[len(times)//2]))
counts=[]
threads=[]
if "knock" in sys.argv: threads.append(threading.Thread(target=knock))
if "flood" in sys.argv: threads+=[threading.Thread(target=lambda n=n: counts.append(flood(n))) for n in range(2)]
for thread in threads: thread.start()
if "look" in sys.argv: look()
for thread in threads: thread.join()
if counts: print(sum(counts))
`
