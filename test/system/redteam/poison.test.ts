/**
 * Forged answers. A policy of names holds as long as nobody but the resolver can say where a name leads: an answer that the sidecar believes opens
 * whatever address it holds. Root in the sandbox may send from any address of the namespace, also as if the sidecar's own DNS server answered its own
 * questions, and may ask as often as it likes; so the sidecar must not hear it, however well it guesses.
 */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { needs } from '#test/support/abilities.ts'
import { packetsTo, questionsFor } from '#test/support/attack.ts'
import { createNetwork, exec } from '#test/support/containers.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'
import { startStack } from '#test/support/stack.ts'
import { cloneGroup } from './group.ts'
import { ownPlace, resolver } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(180_000)

/** With one letter, whose case is one bit to guess. */
const name = '1.2.3.x'
const honest = '198.51.100.10'
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: name }] }
/** Where the sidecar hears the forger, it takes a tenth of that. */
const seconds = 5

const program = await readFile(join(import.meta.dirname, 'poison.py'), 'utf8')

t.test('forged answers', async (t) => {
  await using internet = await startInternet({ zones: { [name]: { a: [honest] } } })
  await using network = await createNetwork('poison')
  await internet.fence(network.bridge)
  await using stack = await startStack({ internet })

  const free = await stack.create()
  const neighbour = await network.run()
  for (const [way, container, server] of [['loopback', free.main, ['127.0.0.1', '15353']], ['turned', neighbour.id, [resolver, '53']]] as const) {
    const reached = ownPlace()
    const said = await forge(container, 'alone', way, reached, server)
    t.ok(packetsTo(await internet.flows(), reached) > 0, `whoever hears the forger is led astray: ${way}`, { said })
  }

  // New ones: a channel that has not asked anything yet is no connection to the kernel, so the forger may begin it.
  const guarded = await stack.create({ networkPolicy })
  await hold(t, internet, 'a sandbox with a policy', guarded.main)
  await using group = await cloneGroup(network, stack, guarded, { OPENSANDBOX_EGRESS_EXEMPTION: 'ports' })
  await hold(t, internet, 'where source ports are held', group.main)
  // Where neighbours may talk the host sends a datagram back that went out for its sender's own address, if the policy lets it out.
  const rules = JSON.stringify({ ...networkPolicy, egress: [...networkPolicy.egress, ...['10.0.0.0/8', '172.16.0.0/12', '192.168.0.0/16'].map((target) => ({ action: 'allow', target }))] })
  await using open = await cloneGroup(network, stack, guarded, { OPENSANDBOX_EGRESS_RULES: rules }, network.name)
  // Where they were let out, one try in three led astray; that none goes out at all: senders.test.ts.
  await hold(t, internet, 'on a network that is not isolated, by way of the host', open.main, 'turned')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})

/** Judged by what arrived at the forged address, and by where the name leads afterwards. */
async function hold(t: Test, internet: Internet, where: string, container: string, way: Way = 'loopback'): Promise<void> {
  const forged = ownPlace()
  await internet.forget()
  const said = await forge(container, 'guarded', way, forged, [resolver, '53'])
  t.equal(packetsTo(await internet.flows(), forged), 0, `nothing arrives at the forged address: ${where}`, { said })
  const asked = questionsFor(await internet.questions(), name)
  t.ok(asked >= 100, `${asked} answers could have been forged: ${where}`)
  // The flood has to be dealt with first.
  const look = `import socket; a=socket.gethostbyname('${name}'); print(a); s=socket.create_connection((a,443),2); s.sendall(b'x'); s.recv(9)`
  const looked = await eventually('the name resolves', async () => {
    const { stdout, code } = await exec(container, ['python3', '-c', look], 20)
    return code === 0 ? stdout.trim() : undefined
  }, 15).catch((error: Error) => error.message)
  t.equal(looked, honest, `and the name leads to its own address, which is open: ${where}`)
}

/** Over the loopback, as the sidecar's DNS server; or as the resolver itself, by way of the host. */
type Way = 'loopback' | 'turned'

async function forge(container: string, where: 'alone' | 'guarded', way: Way, address: string, server: readonly [address: string, port: string]): Promise<string> {
  const { stdout, stderr } = await exec(container, ['python3', '-c', program, where, way, name, address, ...server, String(seconds)], seconds + 10)
  return stdout + stderr
}
