/**
 * The image as anybody starts it who knows the original: NET_ADMIN added, nothing else said, the sandbox's container joined to its network
 * namespace with Docker's own capabilities (NET_RAW among them). Where Docker gives each container a cgroup namespace of its own (cgroup v2), every
 * process is at `/` in it: the exemption must not be everybody's.
 */
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { attackTogether, packetsTo, questionsFor } from '#test/support/attack.ts'
import { createNetwork, docker } from '#test/support/containers.ts'
import { startInternet } from '#test/support/internet.ts'
import { eventually } from '#test/support/program.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns', 'curl')
t.setTimeout(120_000)

const image = 'sallyport/egress:local'
const resolver = '198.51.100.53'
const denied = '198.51.100.31'
const policy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'allowed.example' }] }
const attempts = [['ask', 'one.stolen.example', resolver], ['ask', 'two.stolen.example', resolver, '53', 'tcp'], ['ask', 'three.stolen.example', '198.18.0.53'], ['raw', denied, '443'], ['tcp', denied, '443'], ['udp', denied, '443'], ['marked', denied, '443', '7911'], ['borrow', 'four.stolen.example', resolver]]

for (const mode of ['host', 'private'] as const) t.test(`with NET_ADMIN and nothing else, in a cgroup namespace of the kind ${mode}`, async (t) => {
  await using internet = await startInternet({ zones: { 'allowed.example': { a: ['198.51.100.32'] }, 'stolen.example': { a: [denied] } } })
  await using network = await createNetwork('dropin')
  await internet.fence(network.bridge)
  const plain = await network.run()
  await attackTogether(plain.id, attempts)
  t.ok(packetsTo(await internet.flows(), denied) > 0, 'without a sidecar the place is reached')
  t.ok(questionsFor(await internet.questions(), 'stolen.example') >= 3, 'and so is the resolver')

  const { Config } = await docker.getImage(image).inspect()
  const begun = performance.now()
  const sidecar = await network.run({ Image: image, Entrypoint: Config.Entrypoint ?? [], Cmd: Config.Cmd ?? [], Env: [`OPENSANDBOX_EGRESS_RULES=${JSON.stringify(policy)}`, `OPENSANDBOX_EGRESS_DNS_UPSTREAM=${resolver}`, 'OPENSANDBOX_EGRESS_TOKEN=secret'], HostConfig: { CapAdd: ['NET_ADMIN'], CgroupnsMode: mode } as object })
  await eventually('it is ready', async () => ((await fetch(`http://${sidecar.address}:18080/healthz`).catch(() => null))?.status === 200 ? true : undefined), 30)
  t.ok(performance.now() - begun < 30_000)
  const main = await network.run({ HostConfig: { NetworkMode: `container:${sidecar.id}`, CgroupnsMode: mode } as object })
  const log = (await docker.getContainer(sidecar.id).logs({ stdout: true, stderr: true })).toString()
  t.match((await docker.getContainer(sidecar.id).inspect()).HostConfig, { CgroupnsMode: mode })

  await internet.forget()
  t.same(await attackTogether(main.id, [['tcp', 'allowed.example', '443']]), ['ok'], 'what is allowed works', { log })
  const said = await attackTogether(main.id, attempts)
  t.equal(packetsTo(await internet.flows(), denied), 0, 'what is not does not arrive', { said, log })
  t.equal(questionsFor(await internet.questions(), 'stolen.example'), 0, 'nor does a question, to whomever', { said, log })
  t.comment(/"exemption":"[^"]*"/.exec(log)?.[0] ?? 'no exemption')
  t.equal(await internet.strays(), 0)
})
