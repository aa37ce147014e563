/**
 * What a system test needs of the machine. Without it a developer's laptop skips the file by name; with `CI=true` the same lack is a
 * failure, because a gate that quietly tests less is none. First line of a system test: `await needs('root', 'docker')`.
 */
import { existsSync } from 'node:fs'
import { answers, engineAddress, findProgram } from '../../deploy/engine.mjs'

const checks = {
  root: { lack: 'root', has: () => process.getuid?.() === 0 },
  docker: { lack: 'a Docker engine', has: () => answers(engineAddress(process.env['DOCKER_HOST'])) },
  dockerd: { lack: 'dockerd', has: () => findProgram('dockerd') !== undefined },
  nft: { lack: 'nft', has: () => findProgram('nft') !== undefined },
  iptables: { lack: 'iptables', has: () => findProgram('iptables') !== undefined },
  netns: { lack: 'ip netns', has: () => findProgram('ip') !== undefined },
  sysctl: { lack: 'sysctl', has: () => findProgram('sysctl') !== undefined },
  python3: { lack: 'python3', has: () => findProgram('python3') !== undefined },
  curl: { lack: 'curl', has: () => findProgram('curl') !== undefined },
  ipv6: { lack: 'IPv6', has: () => existsSync('/proc/sys/net/ipv6') },
} satisfies Record<string, { lack: string; has: () => boolean | Promise<boolean> }>

export type Ability = keyof typeof checks

/** What of the wanted abilities this machine lacks, in words. */
export async function lacking(wanted: readonly Ability[]): Promise<string[]> {
  const found = await Promise.all(wanted.map(async (ability) => ((await checks[ability].has()) ? [] : [checks[ability].lack])))
  return found.flat()
}

/** Returns when the machine has them all. Otherwise ends this test file here: skipped, or failed under `CI=true`. */
export async function needs(...wanted: Ability[]): Promise<void> {
  const lacks = await lacking(wanted)
  if (lacks.length === 0) return
  // Imported here: tap makes whoever imports it a test, with a time limit, and the runner is none.
  const { default: t } = await import('tap')
  const reason = `this machine lacks ${lacks.join(', ')}`
  if (process.env['CI'] === 'true') t.fail(reason)
  else t.plan(0, reason)
  t.end()
  process.exit()
}
