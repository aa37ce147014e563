/**
 * Runs the sidecar's start-up checks in the namespace it is started in, and prints the problems that they found, as JSON. With the
 * words `loop <times>` it plays a sidecar whose exemption matches nobody, and prints what each of so many checks found.
 */
import { compilePolicy } from '#policies/compile.ts'
import { failedChecks } from '../../egress-sidecar/checks.ts'
import { listenDns } from '../../egress-sidecar/listen.ts'
import { createNft } from '../../egress-sidecar/nft.ts'
import { emptyReply, rcodes, readQuestion } from '../../egress-sidecar/packet.ts'
import { askOnce } from '../../egress-sidecar/question.ts'
import { createResolver } from '../../egress-sidecar/resolver.ts'
import { bootStatements, dnsPort, policyStatements } from '../../egress-sidecar/ruleset.ts'

const kernel = createNft()
const rules = compilePolicy({ defaultAction: 'deny', egress: [] })
const [what = '', times = '1'] = process.argv.slice(2)
const print = (found: unknown): boolean => process.stdout.write(JSON.stringify(found))
if (what === 'loop') print(await loop(Number(times)))
else print(await failedChecks({ nft: kernel, filter: true, rules, probe: { seen: new Set() }, askUpstream: async () => null }))
kernel.close()

async function loop(times: number): Promise<string[][]> {
  const upstreams = [{ address: '198.51.100.53', port: 53 }]
  const seen = new Set<string>()
  const listener = await listenDns(['127.0.0.1', '::1'], dnsPort, (message, _transport, done) => {
    const question = readQuestion(message)
    if (question === null || typeof question === 'number') return done(null)
    seen.add(question.name ?? '')
    done(emptyReply(message, question.end, rcodes.servFail))
  })
  await kernel.apply(bootStatements(0))
  const exemption = { match: 'meta mark 0x1ee7', protocols: ['udp', 'tcp'] } as const
  await kernel.apply(policyStatements({ rules, filter: true, ipv6: true, exemption, upstreams, held: { 4: [], 6: [] }, openResolvers: [], doh: { everywhere: false, addresses: [] }, control: false, apiPort: 0, generation: 1 }))
  const resolver = await createResolver({ upstreams, timeoutMs: 5000, tcp: () => false }, () => performance.now())
  const found: string[][] = []
  for (let nth = 0; nth < times; nth++) {
    found.push(await failedChecks({ nft: kernel, filter: true, rules, probe: { seen }, askUpstream: (query, end) => askOnce(resolver, query, end, 'udp') }))
    seen.clear()
  }
  resolver.close()
  await listener.close()
  return found
}
