/**
 * Pretending to be the sidecar. Its packets are exempt from the rules, and root in the sandbox shares its network namespace; so
 * whatever the kernel knows the sidecar by must be something the sandbox cannot have.
 */
import { execa } from 'execa'
import { existsSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { questionsFor } from '#test/support/attack.ts'
import { createNetwork, docker, exec } from '#test/support/containers.ts'
import { startInternet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack, type NetworkPolicyBody } from '#test/support/stack.ts'
import { cloneGroup } from './group.ts'
import { arrivals, asks, attack, fire, hold, ownName, ownPlace, reaches, resolver, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

const zones = { 'allowed.example': { a: ['198.51.100.10'] }, '*.leak.example': { a: ['198.51.100.66'] } }
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'allowed.example' }] }
/** The mark the rules use, the original's, and a bit more. */
const marks = ['0x1ee7', '0x1', '0xffffffff']

type Place = 'a sandbox without a policy' | 'a plain container' | 'a container without seccomp' | 'inside the namespace, with NET_RAW'
const open = 'a sandbox without a policy'
/** Every sandbox of ours is denied NET_ADMIN and NET_RAW, with or without a policy. */
const plain = 'a plain container'
const loose = 'a container without seccomp'
const joined = 'inside the namespace, with NET_RAW'

/**
 * A held port can still be bound on another address, and IP_PKTINFO lets a datagram leave with the sidecar's own. If the kernel remembers a
 * connection of the sidecar there, it is taken for one of it and goes past the redirect of port 53; so it is tried with and without. A new sidecar
 * has asked from one or two of its sixteen ports.
 */
const named = (name: string): string[] => ['from_port', 'packet-info', name, resolver]
const ways: readonly ((where: string) => Row<Place>)[] = [
  (where) => asks(`the sidecar's address and ports, hardly used yet: ${where}`, open, named),
  (where) => asks(`the same, after every channel has carried a question: ${where}`, open, (name) => ['steps', 'busy', '80', 'allowed.example', resolver, ';', ...named(name)]),
]
/** Under the first, the rules hold what gets past the redirect; the others' let it go. */
const policies: [why: string, networkPolicy: NetworkPolicyBody][] = [
  ['a sandbox that may reach one name', networkPolicy],
  ["one that may also reach the resolver's network", { defaultAction: 'deny', egress: [...networkPolicy.egress, { action: 'allow', target: '198.51.100.0/24' }] }],
  ['one that may reach everything but some names', { defaultAction: 'allow', egress: [{ action: 'deny', target: '*.leak.example' }] }],
]

const rows: Row<Place>[] = [
  ...marks.map((mark) => reaches(`SO_MARK ${mark}`, plain, (to) => ['marked', 'socket', mark, to, '443'])),
  ...marks.map((mark) => reaches(`SO_MARK ${mark} as ancillary data`, plain, (to) => ['marked', 'message', mark, to, '443'])),
  asks('SO_MARK, towards the resolver', open, (name) => ['steps', 'marked', 'socket', '0x1ee7', '198.51.100.53', '9', ';', 'ask', name, resolver]),
  ...['650', '10042', '101', '65534'].map((uid) => reaches(`setuid ${uid}`, open, (to) => ['as_user', 'real', uid, to, '443'])),
  reaches('seteuid 650', open, (to) => ['as_user', 'effective', '650', to, '443']),
  reaches('setfsuid 650', open, (to) => ['as_user', 'filesystem', '650', to, '443']),
  ...['650', '10042'].map((uid) => reaches(`a set-uid program of ${uid}`, plain, (to) => ['set_uid', uid, to, '443'])),
  asks("the sidecar's source ports, bound as they are", open, (name) => ['from_port', 'bare', name, resolver]),
  asks('the same with SO_REUSEADDR', open, (name) => ['from_port', 'address', name, resolver]),
  asks('the same with SO_REUSEPORT', open, (name) => ['from_port', 'port', name, resolver]),
  asks('the same with both', open, (name) => ['from_port', 'both', name, resolver]),
  asks('the same on the one address of the interface', open, (name) => ['from_port', 'specific', name, resolver]),
  asks('the same from an IPv6 socket', open, (name) => ['from_port', 'mapped', name, resolver]),
  asks('raw packets from those ports', plain, (name) => ['raw_ports', name, resolver]),
  reaches('a raw packet to elsewhere', plain, (to) => ['raw', '17', to]),
  reaches('an Ethernet frame', joined, (to) => ['frame', to, '443']),
  reaches("an Ethernet frame from the resolver's port", joined, (to) => ['frame', to, '443', '53']),
  reaches("somebody else's address as source (IP_TRANSPARENT)", plain, (to) => ['steps', 'option', 'transparent', to, '443', ';', 'udp', to, '443']),
  reaches('a foreign address as source (IP_FREEBIND)', open, (to) => ['steps', 'option', 'freebind', to, '443', ';', 'udp', to, '443']),
  reaches('a user namespace', loose, (to) => ['unshared', '0x10000000', to, '443']),
  reaches('a user and a cgroup namespace', loose, (to) => ['unshared', '0x12000000', to, '443']),
  reaches('every cgroup that can be seen or mounted', open, (to) => ['cgroups', to, '443']),
  reaches('kernel settings of the namespace', open, (to) => ['settings', to, '443']),
  asks('whoever listens on an abstract socket', open, (name) => ['unix', name, resolver]),
]

t.test('forged exemptions', async (t) => {
  await using internet = await startInternet({ zones })
  await using network = await createNetwork('exemption')
  await internet.fence(network.bridge)
  await using stack = await startStack({ internet })
  const free = await stack.create()
  const guarded = await stack.create({ networkPolicy })
  const seam = await stack.create({ networkPolicy })
  const dns = { Dns: [resolver] }
  const places = {
    [open]: free.main,
    [plain]: (await network.run({ HostConfig: dns })).id,
    [loose]: (await network.run({ HostConfig: { ...dns, SecurityOpt: ['seccomp=unconfined'] } })).id,
    [joined]: (await network.run({ HostConfig: { NetworkMode: `container:${seam.sidecar}` } })).id,
  }
  await attack(t, { internet, places, guarded: new Map([['a sandbox with a policy', guarded.main]]) }, rows)
  t.match((await guarded.run(['curl', '-sS', '-m', '5', 'http://allowed.example/still'])).stdout, 'GET /still', 'and the allowed name still connects')

  // With NET_RAW the frame above went past the rules: that is why no sandbox has it. What does pass the rules is held even then.
  const forgeries = rows.filter(({ words }) => ['marked', 'raw', 'raw_ports', 'from_port', 'as_user', 'set_uid'].includes(words[0] ?? ''))
  await hold(t, internet, [`even ${joined}`, places[joined]], forgeries)

  for (const [kind, container, uid] of [[plain, places[plain], '650'], [joined, places[joined], '650'], ['a sandbox with a policy', guarded.main, '0']] as const) {
    const [said] = await fire(container, [['set_uid', '650', ownPlace(), '443']])
    t.match(said, new RegExp(`^as ${uid},`), `a set-uid program of 650 is run by root as ${uid}: ${kind}`)
  }

  await t.test('held source ports, where cgroups cannot be told apart', async (t) => {
    await using group = await cloneGroup(network, stack, guarded, { OPENSANDBOX_EGRESS_EXEMPTION: 'ports' })
    const ours = rows.filter(({ first, words }) => first === open || ['marked', 'set_uid'].includes(words[0] ?? ''))
    await hold(t, internet, ['where source ports are held', group.main], ours)
    await internet.forget()
    await fire(group.main, [['ask', 'allowed.example', '127.0.0.11']])
    t.ok(questionsFor(await internet.questions(), 'allowed.example') > 0, 'while its own questions get out')
  })

  await t.test("the sidecar's own address and ports", async (t) => {
    await attack(t, { internet, places, guarded: new Map() }, ways.map((way) => way('with its own ports')))
    // A sandbox for each: what the first try leaves in the kernel's memory is in the second's way. Held ports leave nothing there.
    const made = policies.flatMap(([where, networkPolicy]) => ways.map(async (way) => ({ rows: [way(`nothing arrives from ${where}`)], container: (await stack.create({ networkPolicy })).main })))
    await using group = await cloneGroup(network, stack, guarded, { OPENSANDBOX_EGRESS_EXEMPTION: 'ports' })
    const tries = [...(await Promise.all(made)), { rows: ways.map((way) => way('nothing arrives where source ports are held')), container: group.main }]
    await internet.forget()
    const said = await Promise.all(tries.map(async ({ rows, container }) => {
      const lines: string[] = []
      for (const { words } of rows) lines.push(...(await fire(container, [words])))
      return lines
    }))
    const rows = tries.flatMap(({ rows }) => rows)
    const seen = await arrivals(internet, rows)
    for (const [i, { why }] of rows.entries()) t.equal(seen[i], 0, why, { said: said.flat()[i] })
  })

  await t.test("the sidecar's cgroup", async (t) => {
    const [before, after] = [ownName(), ownName()]
    const asker = `import os,time
while not os.path.exists('/tmp/moved'): time.sleep(0.05)
import socket,struct
n=open('/tmp/moved').read().encode()
q=struct.pack('!6H',1,256,1,0,0,0)+b''.join(bytes([len(p)])+p for p in n.split(b'.'))+b'\\0\\0\\1\\0\\1'
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(1); s.sendto(q,('${resolver}',53)); print(s.recv(512)[3]&15)`
    await internet.forget()
    const running = guarded.run(['python3', '-c', asker], 10)
    const pid = await eventually('the asker runs', async () => {
      const { Processes } = (await docker.getContainer(guarded.main).top({ ps_args: '-eo pid,args' })) as { Processes: string[][] }
      return Processes.find(([, args]) => args?.startsWith('python3 -c import os,time'))?.[0]
    })
    await fire(guarded.main, [['cgroups', '198.51.100.1', '9'], ['ask', before, resolver]])
    t.equal(questionsFor(await internet.questions(), before), 0, 'not from inside')
    await writeFile(await cgroupOf(guarded.sidecar ?? ''), pid)
    await exec(guarded.main, ['sh', '-c', `printf ${after} > /tmp/moved`])
    await running
    t.ok(questionsFor(await internet.questions(), after) > 0, 'but the host can put a process in there, and then the resolver is open: the rule is real')
  })
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** The file that moves a process into a container's group of the cgroup2 tree. */
async function cgroupOf(container: string): Promise<string> {
  const { State } = await docker.getContainer(container).inspect()
  const { stdout } = await execa`cat /proc/${String(State.Pid)}/cgroup`
  const path = stdout.split('\n').find((line) => line.startsWith('0::'))?.slice(3) ?? ''
  const tree = ['/sys/fs/cgroup/unified', '/sys/fs/cgroup'].find((top) => existsSync(`${top}${path}/cgroup.procs`))
  return `${tree}${path}/cgroup.procs`
}
