/** A firewall whose kernel is played by the test. */
import { compilePolicy, type Rules } from '#policies/compile.ts'
import type { NetworkRule } from '#policies/document.ts'
import { createFirewall } from '../../egress-sidecar/firewall.ts'
import { createAddressJudge } from '../../egress-sidecar/judge.ts'
import { fakeNft } from './fake-nft.ts'

export const allow = (...targets: string[]): Rules => compilePolicy({ defaultAction: 'deny', egress: targets.map((target): NetworkRule => ({ action: 'allow', target })) })
export const setting = { filter: true, ipv6: true, exemption: { match: 'meta mark 0x1ee7', protocols: ['udp', 'tcp'] as const }, upstreams: [{ address: '198.51.100.53', port: 53 }], held: { 4: [], 6: [] }, openResolvers: [], doh: { everywhere: false, addresses: [] }, control: false, apiPort: 18080 }
export const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

export async function setUp(rules: Rules, now = (): number => 0) {
  const nft = fakeNft()
  const lost: string[] = []
  const firewall = await createFirewall(rules, { nft, setting, mayOpen: createAddressJudge([]), now, firstGeneration: 1, lost: (reason) => lost.push(reason) })
  return { nft, firewall, lost }
}

/** The nth of 131,072 addresses. */
export const place = (i: number): string => `198.${18 + (i >> 16)}.${(i >> 8) & 255}.${i & 255}`
