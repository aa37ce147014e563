/** One DNS question from start to end with everything but the sockets and the kernel: an upstream that answers at once, an nft that always agrees. */
import { compilePolicy } from '#policies/compile.ts'
import { answer, type AnswerDeps } from '../egress-sidecar/answer.ts'
import { createFirewall } from '../egress-sidecar/firewall.ts'
import { createAddressJudge } from '../egress-sidecar/judge.ts'
import { dnsQuestion, dnsReply } from './dns-message.ts'
import type { Micro } from './micro.ts'

const allowed = dnsQuestion('registry.some-host.example', 1)
const denied = dnsQuestion('elsewhere.example', 1)
const one = await depsWith(dnsReply(allowed, 1))
const twenty = await depsWith(dnsReply(allowed, 20))
for (const deps of [one, twenty]) await new Promise((resolve) => answer(Buffer.from(allowed), 'udp', deps, resolve))

const ignore = (): void => undefined

export const bench: Micro = {
  title: 'answer',
  cases: {
    'allowed name, 1 address, already open': () => answer(Buffer.from(allowed), 'udp', one, ignore),
    'allowed name, 20 addresses, already open': () => answer(Buffer.from(allowed), 'udp', twenty, ignore),
    'denied name': () => answer(Buffer.from(denied), 'udp', one, ignore),
  },
}

async function depsWith(reply: Buffer): Promise<AnswerDeps> {
  const rules = compilePolicy({ defaultAction: 'deny', egress: Array.from({ length: 64 }, (_, index) => ({ action: 'allow', target: index === 0 ? '*.some-host.example' : `other${index}.example` })) })
  const setting = { filter: true, ipv6: true, exemption: { match: 'meta mark 1', protocols: ['udp'] }, upstreams: [{ address: '198.51.100.53', port: 53 }], held: { 4: [], 6: [] }, openResolvers: [], doh: { everywhere: false, addresses: [] }, control: false, apiPort: 18080 } as const
  const now = (): number => performance.now()
  const mayOpen = createAddressJudge([])
  const firewall = await createFirewall(rules, { nft: { apply: async () => '', list: async () => '', close: () => undefined }, setting, mayOpen, now, firstGeneration: 1, lost: () => undefined })
  return { resolver: { ask: (_query, _end, _transport, done) => done(Buffer.from(reply)) }, firewall, mayOpen, now, report: () => undefined }
}
