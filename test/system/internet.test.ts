/** The tests' own internet keeps its promises: everything that leaves a sandbox ends there and is counted, and nothing of it stays behind. */
import { execa } from 'execa'
import { join } from 'node:path'
import { once } from 'node:events'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { createNetwork, exec } from '#test/support/containers.ts'
import { hostLink, netns } from '#test/support/internet-layout.ts'
import { namePrefix } from '#test/support/leftovers.ts'
import { startInternet, type Flow, type Internet } from '#test/support/internet.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const zones = {
  'one.example': { a: ['198.51.100.10'], aaaa: ['2001:db8::10'] },
  '*.wild.example': { a: ['198.51.100.11'] },
  'alias.example': { cname: 'one.example' },
  'broken.example': { rcode: 2 },
}

/** Runs in the client: talks to `place`, prints what came back. */
const client = {
  tcp: (host: string, port: number) => ['python3', '-c', `import socket;s=socket.create_connection(("${host}",${port}),3);s.sendall(b"knock");print(s.recv(99).decode())`],
  udp: (host: string, port: number) =>
    ['python3', '-c', `import socket;s=socket.socket(socket.AF_INET6 if ":" in "${host}" else socket.AF_INET,socket.SOCK_DGRAM);s.settimeout(3);s.sendto(b"knock",("${host}",${port}));print(s.recvfrom(99)[0].decode())`],
  ask: (name: string, family: 'AF_INET' | 'AF_INET6') => ['python3', '-c', `import socket;print(sorted({a[4][0] for a in socket.getaddrinfo("${name}",80,socket.${family})}))`],
  get: (url: string) => ['curl', '-sS', '-m', '3', url],
}

function sent(flows: readonly Flow[], to: string, protocol: string, port: number): number {
  return flows.filter((flow) => flow.to === to && flow.protocol === protocol && flow.port === port).reduce((sum, flow) => sum + flow.packets, 0)
}

t.test('a namespace that is attached', async (t) => {
  await using internet = await startInternet({ zones })
  const name = `${namePrefix}${process.pid}-attached`
  await execa`ip netns add ${name}`
  t.teardown(() => execa({ reject: false })`ip netns delete ${name}`)
  await internet.attach(name)
  const inside = async (command: readonly string[]): Promise<string> => (await execa`ip netns exec ${name} ${command}`).stdout
  const places: [why: string, host: string, port: number][] = [
    ['a documentation address', '198.51.100.77', 443],
    ['a benchmark address and an odd port', '198.18.3.4', 65535],
    ['IPv6', '2001:db8::77', 853],
  ]
  for (const [why, host, port] of places) {
    t.equal(await inside(client.tcp(host, port)), 'knock', `${why}, tcp`)
    t.equal(await inside(client.udp(host, port)), 'knock', `${why}, udp`)
    const flows = await internet.flows()
    t.ok(sent(flows, host, 'tcp', port) >= 4, `${why}: the tcp packets were counted`)
    t.equal(sent(flows, host, 'udp', port), 1, `${why}: the datagram was counted`)
  }
  t.match(await inside(client.get('http://198.51.100.5/x?y')), 'internet 198.51.100.5 GET /x?y')
  const last = (await internet.exchanges()).at(-1)
  t.match(last, { server: 'http', address: '198.51.100.5', port: 80, head: 'GET /x?y', host: '198.51.100.5' })
  t.equal(await inside(client.tcp('9.9.9.9', 443)), 'knock', 'here also an address that was not claimed answers')
  t.match(await inside(client.get('http://9.9.9.9/')), 'GET /')
  t.ok(sent(await internet.flows(), '9.9.9.9', 'tcp', 443) > 0, 'and is counted')
  await internet.forget()
  t.same(await internet.flows(), [], 'forgotten')
})

t.test('a container behind Docker: forwarded through policy DROP, masqueraded, fenced', async (t) => {
  await using internet = await startInternet({ zones, claims: ['8.8.8.8', '169.254.169.254'] })
  await using network = await createNetwork('internet')
  await internet.fence(network.bridge)
  const one = await network.run({ HostConfig: { Dns: ['198.51.100.53'] } })
  const run = async (command: readonly string[]): Promise<string> => (await exec(one.id, command)).stdout.trim()

  t.equal(await run(client.tcp('169.254.169.254', 80).map((word) => word.replace('knock', 'GET / HTTP/1.0\\r\\n\\r\\n'))).then((text) => text.split('\r\n')[0]), 'HTTP/1.1 200 OK', 'the metadata address')
  t.equal(await run(client.udp('8.8.8.8', 443)), 'knock', 'a public resolver')
  t.equal(await run(client.ask('one.example', 'AF_INET')), "['198.51.100.10']")
  t.equal(await run(client.ask('one.example', 'AF_INET6')), "['2001:db8::10']")
  t.equal(await run(client.ask('deep.below.wild.example', 'AF_INET')), "['198.51.100.11']")
  t.equal(await run(client.ask('alias.example', 'AF_INET')), "['198.51.100.10']", 'aliases are followed')
  t.match((await exec(one.id, client.ask('wild.example', 'AF_INET'))).stderr, 'Name or service not known', 'a wildcard does not hold its own suffix')
  const questions = await internet.questions()
  t.same([...new Set(questions.map((question) => question.name))].sort(), ['alias.example', 'deep.below.wild.example', 'one.example', 'wild.example'])
  t.same([...new Set(questions.map((question) => question.transport))], ['udp'])
  t.equal(await internet.strays(), 0, 'nothing else left the bridge so far')

  const stray = await exec(one.id, client.tcp('198.19.77.77', 443), 1)
  t.not(stray.code, 0)
  t.ok((await internet.strays()) > 0, 'what this internet does not hold is dropped by the fence, and counted')
  t.equal(sent(await internet.flows(), '198.19.77.77', 'tcp', 443), 0)
})

t.test('what the machine uses is refused', async (t) => {
  const reasons: [claim: string, why: RegExp][] = [
    ['127.0.0.1', /routed to lo/],
    ['172.17.0.0/16', /routed to docker0/],
    ['0.0.0.0/0', /overlaps/],
  ]
  for (const [claim, why] of reasons) await t.rejects(startInternet({ claims: [claim] }), { message: why }, claim)
  await isGone(t)
})

t.test('kill -9 of the test leaves no route behind, and the next internet comes up', async (t) => {
  const program = `import { startInternet } from '#test/support/internet.ts'; await startInternet({ claims: ['100.100.100.200'] }); console.log('up'); setInterval(() => {}, 1000)`
  const child = execa({ reject: false, cwd: join(import.meta.dirname, '../..'), buffer: false })`${process.execPath} --input-type=module -e ${program}`
  await once(child.stdout, 'data')
  t.match((await execa`ip route get 100.100.100.200`).stdout, hostLink, 'the route is there')
  child.kill('SIGKILL')
  await child
  const next: Internet = await startInternet()
  t.notMatch((await execa({ reject: false })`ip route get 100.100.100.200`).stdout, hostLink, 'and gone')
  await next.close()
  await isGone(t)
})

async function isGone(t: Test): Promise<void> {
  t.notMatch((await execa`ip netns list`).stdout, netns)
  t.notMatch((await execa`ip -brief link`).stdout, hostLink)
  t.notMatch((await execa`iptables -w 10 -S DOCKER-USER`).stdout, 'sp-internet')
}
