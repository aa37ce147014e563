/**
 * A resolver that lies: answers with addresses that nobody asked for, hints of HTTPS records, encrypted hellos. It is the sidecar's
 * own upstream, on a port of its own, so that also "no name opens the upstream" is tried for a port that is not redirected.
 */
import { execa } from 'execa'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { packetsTo } from '#test/support/attack.ts'
import { netns } from '#test/support/internet-layout.ts'
import { startInternet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack } from '#test/support/stack.ts'
import { attack, fire, reaches, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const liar = { address: '198.51.100.54', port: '5000' }
const open = 'a sandbox without a policy'
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'deny', target: 'denied.wild.example' }, { action: 'allow', target: '*.wild.example' }] }

/**
 * Whom the sandbox asks: without a policy the liar itself, with one the sidecar, to which every port 53 leads. Both are asked; one of
 * them tells the lie. Not 127.0.0.11: without a policy Docker would pass the question on to the machine's own resolver.
 */
const told = (name: string, kind = '1'): string[] => ['steps', 'ask', name, '198.51.100.53', '53', 'udp', kind, ';', 'ask', name, liar.address, liar.port, 'udp', kind, ';']
const lies: Row<typeof open>[] = [
  reaches('an address of another owner in the answer', open, (to) => [...told('stray.wild.example'), 'udp', to, '80'], '198.18.88.1'),
  reaches('an address in the authority section', open, (to) => [...told('authority.wild.example'), 'udp', to, '80'], '198.18.88.2'),
  reaches('an address in the additional section', open, (to) => [...told('additional.wild.example'), 'udp', to, '80'], '198.18.88.3'),
  reaches('an address of another class', open, (to) => [...told('chaos.wild.example'), 'udp', to, '80'], '198.18.88.4'),
  reaches('the address hint of an HTTPS record', open, (to) => [...told('hint.wild.example', '65'), 'udp', to, '443'], '198.18.88.5'),
  reaches('the address hint of an SVCB record', open, (to) => [...told('service.wild.example', '64'), 'tcp', to, '443'], '198.18.88.11'),
  reaches('an alias that is in no zone of the policy but has a NUL', open, (to) => [...told('nul.wild.example'), 'udp', to, '80'], '198.18.88.6'),
  reaches('aliases in a circle, with an address', open, (to) => [...told('circle.wild.example'), 'udp', to, '80'], '198.18.88.7'),
  reaches('an address record of five bytes', open, (to) => [...told('long.wild.example'), 'udp', to, '80'], '198.18.88.8'),
  reaches('an alias of a denied name', open, (to) => [...told('alias.wild.example'), 'udp', to, '80'], '198.18.88.9'),
  reaches('the answer to another question', open, (to) => [...told('other.wild.example'), 'udp', to, '80'], '198.18.88.10'),
]
/** What such an answer says beside the lie, and one that does not lie at all. */
const truths: readonly [why: string, name: string, address: string][] = [
  ['beside an address of another owner', 'stray.wild.example', '198.18.89.1'],
  ['beside an address in the authority section', 'authority.wild.example', '198.18.89.2'],
  ['beside an address in the additional section', 'additional.wild.example', '198.18.89.3'],
  ['alone', 'honest.wild.example', '198.18.89.4'],
]

t.test('a resolver that lies', async (t) => {
  await using internet = await startInternet()
  await using server = await startLiar()
  await using stack = await startStack({ internet, config: { egress: { dns_upstreams: [`${liar.address}:${liar.port}`] } } })
  const free = await stack.create()
  const guarded = await stack.create({ networkPolicy })
  const knock = async (): Promise<number[]> => {
    await internet.forget()
    await fire(guarded.main, truths.map(([, , address]) => ['udp', address, '80']))
    const flows = await internet.flows()
    return truths.map(([, , address]) => packetsTo(flows, address))
  }
  t.same(await knock(), truths.map(() => 0), 'nothing is open before anybody asked')
  await attack(t, { internet, places: { [open]: free.main }, guarded: new Map([['a sandbox with a policy', guarded.main]]) }, lies)
  // Without a policy the sandbox told each question to the liar itself, once.
  for (const { why, words } of lies) t.ok(server.asked(words[2] ?? '') > 1, `${why}: the sidecar was told the lie`)
  await fire(guarded.main, truths.map(([, name]) => ['ask', name, '127.0.0.11']))
  const reached = await knock()
  for (const [i, [why]] of truths.entries()) t.ok((reached[i] ?? 0) > 0, `an honest address ${why} is opened`)

  await t.test('what reaches the sandbox of an HTTPS record', async (t) => {
    const [direct] = await fire(free.main, [['hints', 'hint.wild.example', liar.address, liar.port]])
    t.equal(direct, 'alpn ipv4hint ech ipv6hint', 'the resolver sends them all')
    const [held] = await fire(guarded.main, [['hints', 'hint.wild.example', '127.0.0.11', '53']])
    t.equal(held, 'alpn', 'the sandbox gets what leads nowhere else')
  })

  await t.test('the upstream itself', async (t) => {
    const before = server.asked('direct.leak.example')
    await fire(guarded.main, [['ask', 'upstream.wild.example', '127.0.0.11'], ['steps', 'ask', 'upstream.wild.example', '127.0.0.11', ';', 'sleep', '0.2', ';', 'ask', 'direct.leak.example', liar.address, liar.port, ';', 'ask', 'direct.leak.example', liar.address, liar.port, 'tcp']])
    t.same([before, server.asked('direct.leak.example')], [0, 0], 'an allowed name that leads to it opens it for nobody')
    await fire(free.main, [['ask', 'direct.leak.example', liar.address, liar.port]])
    t.ok(await eventually('it hears the question', async () => (server.asked('direct.leak.example') > 0 ? true : undefined)), 'without a policy it is open')
  })
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** A DNS server in the internet that answers by the first label of the name; packets to its port are not tracked there, so the internet's own echo does not take them. */
async function startLiar(): Promise<AsyncDisposable & { asked(name: string): number }> {
  await execa({ input: 'table ip liar {\n chain pre {\n  type filter hook prerouting priority -301; policy accept;\n  udp dport 5000 notrack\n }\n}\n' })`ip netns exec ${netns} nft -f -`
  let heard = ''
  const child = execa({ reject: false, buffer: false })`ip netns exec ${netns} python3 -u -c ${program} ${liar.address} ${liar.port}`
  child.stdout.setEncoding('utf8').on('data', (text: string) => (heard += text))
  await eventually('the liar listens', async () => (heard.includes('up\n') ? true : undefined))
  return {
    asked: (name) => heard.split('\n').filter((line) => line === name).length,
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await child
    },
  }
}

const program = `
import socket,struct,sys
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind((sys.argv[1],int(sys.argv[2]))); print("up",flush=True)
def wire(name): return b"".join(bytes([len(p)])+p for p in name.split(b"."))+b"\\0"
def rr(owner,kind,data,klass=1): return owner+struct.pack("!HHIH",kind,klass,60,len(data))+data
def a(n): return socket.inet_aton("198.18.88.%d"%n)
me=b"\\xc0\\x0c"
def true(n): return rr(me,1,socket.inet_aton("198.18.89.%d"%n))
while True:
  q,peer=s.recvfrom(999)
  at,labels=12,[]
  while q[at]: labels.append(q[at+1:at+1+q[at]]); at+=1+q[at]
  end=at+5; kind=struct.unpack("!H",q[at+1:at+3])[0]
  print(b".".join(labels).decode("latin1").lower(),flush=True)
  ask,body,counts=q[12:end],b"",[0,0,0]
  first=labels[0].lower() if labels else b""
  if (kind,first) in ((64,b"service"),(65,b"hint")):
    svc=struct.pack("!H",1)+b"\\0"+struct.pack("!HH",1,3)+b"\\2h2"+struct.pack("!HH",4,4)+a(5 if kind==65 else 11)+struct.pack("!HH",5,4)+b"\\0\\1\\2\\3"+struct.pack("!HH",6,16)+socket.inet_pton(socket.AF_INET6,"2001:db8::5")
    body,counts=rr(me,kind,svc),[1,0,0]
  elif kind==1:
    other=wire(b"bank.example")
    if first==b"stray": body,counts=true(1)+rr(other,1,a(1)),[2,0,0]
    elif first==b"authority": body,counts=true(2)+rr(me,1,a(2)),[1,1,0]
    elif first==b"additional": body,counts=true(3)+rr(me,1,a(3)),[1,0,1]
    elif first==b"honest": body,counts=true(4),[1,0,0]
    elif first==b"chaos": body,counts=rr(me,1,a(4),3),[1,0,0]
    elif first==b"nul": x=b"\\5a\\0b.c\\4wild\\7example\\0"; body,counts=rr(me,5,x)+rr(x,1,a(6)),[2,0,0]
    elif first==b"circle": x=wire(b"x.wild.example"); body,counts=rr(me,5,x)+rr(x,5,wire(b"circle.wild.example"))+rr(me,1,a(7)),[3,0,0]
    elif first==b"long": body,counts=rr(me,1,a(8)+b"x"),[1,0,0]
    elif first==b"alias": x=wire(b"denied.wild.example"); body,counts=rr(me,5,x)+rr(x,1,a(9)),[2,0,0]
    elif first==b"other": ask,body,counts=wire(b"elsewhere.wild.example")+b"\\0\\1\\0\\1",rr(me,1,a(10)),[1,0,0]
    elif first==b"upstream": body,counts=rr(me,1,socket.inet_aton(sys.argv[1])),[1,0,0]
  s.sendto(q[:2]+b"\\x81\\x80"+struct.pack("!4H",1,*counts)+ask+body,peer)
`
