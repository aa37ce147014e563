/**
 * What root in a sandbox tries to get out. Each attempt first runs where no policy holds it and must be seen by the tests'
 * internet there, so that it is a real one; then it runs in a sandbox with a policy and nothing may arrive. What the attempt
 * itself reports is not trusted.
 */
import { execa } from 'execa'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attack, attackCommand, packetsTo, questionsFor } from '#test/support/attack.ts'
import { createNetwork, docker, exec } from '#test/support/containers.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { startStack, type Sandbox } from '#test/support/stack.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(230_000)

const resolver = '198.51.100.53'
const publicResolver = '8.8.8.8'
const metadata = '169.254.169.254'
const privatePlace = '10.66.7.8'
const zones = {
  'allowed.example': { a: ['198.51.100.10'], aaaa: ['2001:db8::10'] },
  '*.leak.example': { a: ['198.51.100.66'], txt: ['secret'] },
  'rebind.wild.example': { a: [privatePlace] },
  'metadata.wild.example': { a: [metadata] },
  'alias.wild.example': { cname: 'rebind.wild.example' },
}
const policy = {
  defaultAction: 'deny',
  egress: [
    { action: 'allow', target: 'allowed.example' },
    { action: 'allow', target: '*.wild.example' },
  ],
}

type Attack = {
  readonly why: string
  /** Commands that run one after the other; how they end does not matter. */
  readonly tries: readonly (readonly string[])[]
  /** Where something arrives when it works: an address of the internet, or a name asked for. */
  readonly address?: string
  readonly name?: string
  /**
   * Where it must work first. `open`: a sandbox without a policy. `plain`: a container with Docker's own capabilities, for what
   * every sandbox of ours is denied. `admin`: one with NET_ADMIN and a rule in the way.
   */
  readonly first: 'open' | 'plain' | 'admin'
}

let lastPlace = 100
const place = (): string => `198.51.100.${++lastPlace}`

/** An attempt whose success is a packet at an address of its own. */
function reach(why: string, first: Attack['first'], tries: (address: string) => string[][], address = place()): Attack {
  return { why, first, tries: tries(address), address }
}

/** An attempt whose success is a question for a name of its own. */
function resolve(why: string, first: Attack['first'], tries: (name: string) => string[][]): Attack {
  const name = `n${++lastPlace}.leak.example`
  return { why, first, tries: tries(name), name }
}

const run = attackCommand
const marks = ['0x1', '0x1ee7']
const attacks: Attack[] = [
  reach('TCP to an address by number', 'open', (to) => [run('tcp', to, '443')]),
  reach('UDP to an address by number', 'open', (to) => [run('udp', to, '443')]),
  reach('UDP in fragments', 'open', (to) => [run('udp', to, '9999', '8000')]),
  reach('IPv4 inside an IPv6 socket', 'open', (to) => [run('mapped', to, '443')]),
  reach('data in the SYN', 'open', (to) => [run('fastopen', to, '443')]),
  reach('ICMP', 'plain', (to) => [run('ping', to)]),
  reach('the address of an allowed name that nobody asked for', 'open', (to) => [run('tcp', to, '80')], '198.51.100.10'),
  reach('DNS over TLS to a public resolver', 'open', (to) => [run('tcp', to, '853')], '1.1.1.1'),
  reach('DNS over HTTPS to a public resolver', 'open', (to) => [run('tcp', to, '443')], '9.9.9.9'),
  reach('the metadata address', 'plain', (to) => [run('tcp', to, '80', 'GET / HTTP/1.0\r\n\r\n')], metadata),
  reach('a private address behind an allowed name', 'open', (to) => [run('ask', 'rebind.wild.example', '127.0.0.11'), run('tcp', to, '80'), run('udp', to, '80')], privatePlace),
  reach('the same behind an alias', 'open', (to) => [run('ask', 'alias.wild.example', '127.0.0.11'), run('tcp', to, '81')], privatePlace),
  reach('metadata behind an allowed name', 'plain', (to) => [run('ask', 'metadata.wild.example', '127.0.0.11'), run('tcp', to, '80')], metadata),
  reach('flushing every rule', 'admin', (to) => [['nft', 'flush', 'ruleset'], run('tcp', to, '443')]),
  reach("a firewall mark like the sidecar's", 'plain', (to) => marks.map((mark) => run('marked', to, '443', mark))),
  reach('a packet with headers of its own', 'plain', (to) => [run('raw', to, '443')]),
  reach('an Ethernet frame of its own', 'plain', (to) => [run('frame', to, '443')]),
  reach('the policy API without its token', 'open', (to) => [['curl', '-s', '-m', '2', '-X', 'POST', '-d', '{"defaultAction":"allow"}', 'http://127.0.0.1:18080/policy'], run('tcp', to, '443')]),
  resolve('a name nobody allowed', 'open', (name) => [run('ask', name, '127.0.0.11')]),
  resolve('a name with data in it', 'open', (name) => [run('ask', `0123456789abcdef.0123456789abcdef.${name}`, '127.0.0.11', '53', 'udp', '16')]),
  resolve('the same over TCP', 'open', (name) => [run('ask', name, '127.0.0.11', '53', 'tcp')]),
  resolve('the system resolver', 'open', (name) => [['python3', '-c', `import socket; socket.getaddrinfo("${name}", 80)`]]),
  resolve("Docker's resolver on its other port", 'open', (name) => [run('embedded', name)]),
  resolve("the sidecar's own upstream", 'open', (name) => [run('ask', name, resolver)]),
  resolve("the sidecar's own upstream, TCP", 'open', (name) => [run('ask', name, resolver, '53', 'tcp')]),
  resolve('a public resolver', 'open', (name) => [run('ask', name, publicResolver)]),
  resolve('a public resolver, TCP', 'open', (name) => [run('ask', name, publicResolver, '53', 'tcp')]),
  resolve("source ports the sidecar's packets may be known by", 'open', (name) => [run('borrow', name, resolver)]),
]

t.test('attacks from inside', async (t) => {
  await using internet = await startInternet({ zones, claims: [publicResolver, '1.1.1.1', '9.9.9.9', metadata, '10.66.0.0/16'] })
  await using network = await createNetwork('attacks')
  await internet.fence(network.bridge)
  const dns = { Dns: [resolver] }
  const plain = await network.run({ HostConfig: dns })
  const admin = await network.run({ HostConfig: { ...dns, CapAdd: ['NET_ADMIN'] } })
  await using stack = await startStack({ internet })
  const open = await stack.create()
  const guarded = await stack.create({ networkPolicy: policy })
  const first = { open: open.main, plain: plain.id, admin: admin.id }
  marks.push(...(await sidecarMarks(guarded)))

  for (const each of attacks) {
    if (each.first === 'admin') await putRuleInTheWay(admin.id)
    await internet.forget()
    const outputs = await runTries(each, first[each.first])
    t.ok((await arrivals(internet, each)) > 0, `${each.why}: works where nothing holds it`, { outputs })
  }

  await internet.forget()
  for (let at = 0; at < attacks.length; at += 8) {
    const some = attacks.slice(at, at + 8)
    const outputs = await Promise.all(some.map((each) => runTries(each, guarded.main)))
    for (const [index, each] of some.entries()) t.equal(await arrivals(internet, each), 0, `${each.why}: nothing arrives from a sandbox with a policy`, { outputs: outputs[index] })
  }

  await internet.forget()
  t.match((await guarded.run(['curl', '-sS', '-m', '5', 'http://allowed.example/still'])).stdout, 'GET /still', 'and the allowed name still connects')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

t.test('taking the place of the sidecar', async (t) => {
  await using internet = await startInternet({ zones })
  await using stack = await startStack({ internet })
  const open = await stack.create()
  const guarded = await stack.create({ networkPolicy: policy })
  const seats: [why: string, proto: string, address: string, port: string][] = [
    ['its DNS port', 'udp', '127.0.0.1', '15353'],
    ['its DNS port on every address', 'udp', '0.0.0.0', '15353'],
    ['its DNS port, TCP', 'tcp', '127.0.0.1', '15353'],
    ['its API', 'tcp', '0.0.0.0', '18080'],
    ['its API on loopback', 'tcp', '127.0.0.1', '18080'],
  ]
  for (const [why, ...seat] of seats) {
    t.equal((await attack(open.main, 'bind', ...seat)).code, 0, `${why}: free where there is no sidecar`)
    t.match(await attack(guarded.main, 'bind', ...seat), { code: 1, stdout: /Address already in use/ }, `${why}: taken`)
  }
  t.match((await guarded.run(['curl', '-sS', '-m', '5', 'http://allowed.example/'])).stdout, 'internet 198.51.100.10', 'it still answers')
  for (const method of ['GET', 'POST', 'PUT', 'PATCH', 'DELETE']) {
    for (const token of ['', 'x', 'undefined']) {
      const answer = await guarded.run(['curl', '-s', '-m', '2', '-o', '/dev/null', '-w', '%{http_code}', '-X', method, '-H', `OPENSANDBOX-EGRESS-AUTH: ${token}`, '-d', '{}', 'http://127.0.0.1:18080/policy'])
      t.equal(answer.stdout, '401', `${method} /policy with token "${token}"`)
    }
  }
  t.equal(await internet.strays(), 0)
})

async function runTries({ tries }: Attack, container: string): Promise<string[]> {
  const outputs: string[] = []
  for (const command of tries) {
    const { code, stdout, stderr } = await exec(container, command, 10)
    outputs.push(`${code} ${stdout}${stderr}`)
  }
  return outputs
}

async function arrivals(internet: Internet, { address, name }: Attack): Promise<number> {
  return address === undefined ? questionsFor(await internet.questions(), name ?? '') : packetsTo(await internet.flows(), address)
}

/** A table like a sidecar's, in the container's own namespace: without flushing it nothing gets out. */
async function putRuleInTheWay(container: string): Promise<void> {
  const { State } = await docker.getContainer(container).inspect()
  const input = 'table inet way {\n chain out {\n type filter hook output priority 0; policy drop;\n oifname "lo" accept\n }\n}\n'
  await execa({ input })`nsenter -t ${State.Pid} -n nft -f -`
}

/** The marks in the kernel's rules of a guarded sandbox: what an attacker who knows everything would set. */
async function sidecarMarks(guarded: Sandbox): Promise<string[]> {
  const { State } = await docker.getContainer(guarded.main).inspect()
  const listed = await Promise.all([
    execa({ reject: false })`nsenter -t ${State.Pid} -n iptables-save -t raw`,
    execa`nsenter -t ${State.Pid} -n nft list ruleset`,
  ])
  return [...new Set(listed.flatMap(({ stdout }) => [...stdout.matchAll(/mark[^\n]*?(0x[0-9a-f]+)/g)].map((match) => match[1]!)))]
}
