/**
 * For tests that need no internet: whatever a sandbox sends beyond its own bridge is dropped. Stands where the tests' internet
 * would, of which there is one on a machine, so such tests need not queue for it. Needs root and nft.
 */
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { execa } from 'execa'
import type { Internet } from './internet.ts'

export interface Fence extends Pick<Internet, 'dns' | 'fence'>, AsyncDisposable {}

const prefix = 'sp_test_fence_'

export async function startFence(): Promise<Fence> {
  await removeLeftovers()
  const table = `${prefix}${process.pid}_${randomBytes(3).toString('hex')}`
  await execa({ input: `table inet ${table} { chain forward { type filter hook forward priority -1; policy accept; }\n}\n` })`nft -f -`
  return {
    dns: '198.51.100.53:53',
    async fence(bridge) {
      await execa`nft add rule inet ${table} forward iifname ${bridge} counter drop`
    },
    async [Symbol.asyncDispose]() {
      await execa`nft delete table inet ${table}`
    },
  }
}

/** Tables of tests that were killed. */
async function removeLeftovers(): Promise<void> {
  const { stdout } = await execa`nft list tables inet`
  for (const [, name, owner] of stdout.matchAll(new RegExp(`^table inet (${prefix}(\\d+)_\\w+)$`, 'gm'))) {
    if (!existsSync(`/proc/${owner}`)) await execa({ reject: false })`nft delete table inet ${name!}`
  }
}
