/**
 * Network namespaces of the bench's own: one for the upstream, one for each DNS server, joined by veth pairs. Nothing of the machine's own
 * network is touched, so the addresses inside are free to choose.
 */
import { runCommand, type Cleanups } from './program.ts'

const prefix = 'sp-bench-'

export type Island = { readonly name: string; readonly address: string; readonly upstream: string }

/**
 * Makes the namespace of the upstream and one island per name. Each island reaches the upstream under an address of its own subnet,
 * 198.51.100.0/30 and upwards, and nothing else. Leftovers of an earlier, killed run go first.
 */
export async function makeIslands(names: readonly string[], cleanups: Cleanups): Promise<{ upstream: string; islands: Island[] }> {
  const upstream = `${prefix}upstream`
  const all = [upstream, ...names.map((name) => prefix + name)]
  await removeNamespaces(all)
  cleanups.add(() => removeNamespaces(all))
  for (const name of all) {
    await ip('netns', 'add', name)
    await ip('-n', name, 'link', 'set', 'lo', 'up')
  }
  const islands: Island[] = []
  for (const [index, name] of names.entries()) islands.push(await join(upstream, prefix + name, index))
  return { upstream, islands }
}

async function join(upstream: string, name: string, index: number): Promise<Island> {
  const [near, far] = [`198.51.100.${index * 4 + 2}`, `198.51.100.${index * 4 + 1}`]
  const device = `island${index}`
  await ip('-n', upstream, 'link', 'add', device, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', name)
  await ip('-n', upstream, 'address', 'add', `${far}/30`, 'dev', device)
  await ip('-n', upstream, 'link', 'set', device, 'up')
  await ip('-n', name, 'address', 'add', `${near}/30`, 'dev', 'eth0')
  await ip('-n', name, 'link', 'set', 'eth0', 'up')
  await ip('-n', name, 'route', 'add', 'default', 'via', far)
  return { name, address: near, upstream: far }
}

async function removeNamespaces(names: readonly string[]): Promise<void> {
  const existing = new Set((await ip('netns', 'list')).split('\n').map((line) => line.split(' ')[0]))
  for (const name of names.filter((name) => existing.has(name))) {
    for (const pid of (await ip('netns', 'pids', name)).split('\n').filter((line) => line !== '')) endProcess(Number(pid))
    await ip('netns', 'delete', name)
  }
}

function endProcess(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It was faster.
  }
}

function ip(...args: string[]): Promise<string> {
  return runCommand('ip', args)
}
