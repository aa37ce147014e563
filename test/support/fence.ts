/**
 * For tests that need no internet: whatever a sandbox sends beyond its own bridge is counted and dropped. Stands where the tests'
 * internet would, of which there is one on a machine, so such tests need not queue for it. Needs root and nft.
 */
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { execa } from 'execa'
import { readFlows, type Flow } from './internet-rules.ts'
import type { Internet } from './internet.ts'

export interface Fence extends Pick<Internet, 'dns' | 'fence' | 'forget'>, AsyncDisposable {
  /** Every IPv4 packet with a port that left a sandbox since the last forget(), wherever it was going: counted on its bridge, before anything else. */
  flows(): Promise<Flow[]>
}

const prefix = 'sp_test_fence_'

export async function startFence(): Promise<Fence> {
  await removeLeftovers()
  const table = `${prefix}${process.pid}_${randomBytes(3).toString('hex')}`
  await execa({ input: rules(table) })`nft -f -`
  return {
    dns: '198.51.100.53:53',
    async fence(bridge) {
      await execa`nft add rule inet ${table} forward iifname ${bridge} counter drop`
      await execa`nft add rule inet ${table} record iifname ${bridge} meta l4proto { tcp, udp } update @flows { ip saddr . ip daddr . meta l4proto . th dport counter }`
    },
    flows: async () => readFlows((await execa`nft -j list set inet ${table} flows`).stdout),
    forget: async () => void (await execa`nft flush set inet ${table} flows`),
    async [Symbol.asyncDispose]() {
      await execa`nft delete table inet ${table}`
    },
  }
}

function rules(table: string): string {
  return `table inet ${table} {
  set flows { type ipv4_addr . ipv4_addr . inet_proto . inet_service; size 65535; flags dynamic; }
  chain record { type filter hook prerouting priority -400; policy accept; }
  chain forward { type filter hook forward priority -1; policy accept; }
}
`
}

/** Tables of tests that were killed. */
async function removeLeftovers(): Promise<void> {
  const { stdout } = await execa`nft list tables inet`
  for (const [, name, owner] of stdout.matchAll(new RegExp(`^table inet (${prefix}(\\d+)_\\w+)$`, 'gm'))) {
    if (!existsSync(`/proc/${owner}`)) await execa({ reject: false })`nft delete table inet ${name!}`
  }
}
