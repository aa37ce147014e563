/**
 * What root in the sandbox can do to the sidecar beside it: keep its owner out, end it, lend a connection a mark. In real namespaces; what counts is what
 * the other side saw.
 */
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { needs } from '../support/abilities.ts'
import { createNamespaces, policy, type Namespaces } from './egress-namespaces.ts'

await needs('root', 'nft', 'netns', 'curl', 'python3')
t.setTimeout(120_000)

/** The owner changes the policy from outside for some seconds; how long each change took in ms. */
async function changeFromOutside(space: Namespaces, seconds: number): Promise<number[]> {
  const lines = await space.runOn('internet', 'python3', '-c', `
import http.client,json,time
end=time.time()+${seconds}; times=[]
print("started",flush=True)
while time.time()<end:
  begun=time.time()
  try:
    c=http.client.HTTPConnection("198.51.100.2",18080,timeout=8); c.request("PATCH","/policy",'[{"action":"allow","target":"x.example"}]'); c.getresponse().read(); c.close()
  except OSError: pass
  times.append(round((time.time()-begun)*1000)); time.sleep(0.1)
print(json.dumps(times),flush=True)`)
  for (const deadline = Date.now() + seconds * 1000 + 20_000; lines.length < 2 && Date.now() < deadline; await delay(50));
  return JSON.parse(lines[1] ?? '[]') as number[]
}

/** Connects to a port of the loopback as fast as three processes can, and waits for nothing. */
const knock = (port: number, seconds: number): string => `
import os,socket,time
end=time.time()+${seconds}
for _ in range(2): os.fork()
held=[]
while time.time()<end:
  s=socket.socket(); s.setblocking(False)
  try: s.connect(("127.0.0.1",${port}))
  except OSError: pass
  held.append(s)
  if len(held)>200: held.pop(0).close()`

t.test('knocking at the policy API without a pause does not keep its owner out', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  // Any port without our rule shows that it is a flood: what waits for a server that takes nothing is soon too much.
  const overflows = async (): Promise<number> => Number(/TcpExtListenOverflows\s+(\d+)/.exec(await space.run('nstat', '-asz', 'TcpExtListenOverflows'))?.[1] ?? 0)
  await space.runOn('inside', 'python3', '-c', 'import socket,time\ns=socket.socket(); s.bind(("127.0.0.1",9999)); s.listen(128); print("listens",flush=True); time.sleep(60)')
  await space.run('python3', '-c', knock(9999, 1))
  t.ok((await overflows()) > 1000, 'elsewhere it fills the queue')
  const before = await overflows()
  const [times] = await Promise.all([changeFromOutside(space, 6), space.run('python3', '-c', knock(18080, 6))])
  t.ok(times.length >= 15, `${times.length} changes: ${times.join(' ')} ms`)
  t.ok(Math.max(...times) < 1000, 'each within a second')
  t.ok((await overflows()) - before < 100, 'the queue of the policy API has room')
})

t.test('a datagram from port 0', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.run('python3', '-c', `
import socket,struct
q=b"\\1\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4evil\\7example\\0\\0\\1\\0\\1"
s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_UDP)
for _ in range(3): s.sendto(struct.pack("!HHHH",0,15353,8+len(q),0)+q,("127.0.0.1",0))`)
  t.same((await space.ask({ ask: 'ip-198-18-7-7.ok.example' })).map(({ rcode }) => rcode), [0], 'it still answers')
})

t.test('an error message about a connection that somebody else began lends it no way past the refusals', async (t) => {
  await using space = await createNamespaces()
  await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policy('*.ok.example') })
  await space.ask({ ask: 'ip-198-18-7-7.ok.example' })
  await space.runOn('internet', 'python3', '-c', `
import socket,struct
s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_UDP); s.bind(("198.18.7.7",0))
for port in (8443,853): s.sendto(struct.pack("!HHHH",port,4466,12,0)+b"poke",("198.51.100.2",0))
print("poked",flush=True)`)
  await delay(200)
  await space.run('python3', '-c', `
import socket
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("198.51.100.2",4466))
for port in (8443,853):
  try: s.sendto(b"secret",("198.18.7.7",port))
  except OSError: pass`)
  await delay(200)
  t.same(space.seen.filter(({ saw }) => saw === 'udp').map(({ port }) => port), [8443], 'port 853 hears nothing, though it spoke first')
})
