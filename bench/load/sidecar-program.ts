/** A sidecar as production has it, but for the container: flags and allocator of the image, and its packets known by its cgroup. */
import { readFile } from 'node:fs/promises'
import path from 'node:path'
import { makeGroup } from '../cgroups.ts'
import type { Island } from '../namespaces.ts'
import { runCommand, type Cleanups, type Program } from '../program.ts'

const top = path.join(import.meta.dirname, '..', '..')

/** @param env with its policy */
export async function startSidecar({ name, upstream }: Island, env: Readonly<Record<string, string>>, cleanups: Cleanups): Promise<Program> {
  const cgroup = await makeGroup('sidecar', cleanups)
  const image = await readImage()
  const healthy = async (): Promise<boolean> => (await runCommand('curl', ['--silent', '--fail', '--max-time', '2', 'http://127.0.0.1:18080/healthz'], { namespace: name })).trim() === 'ok'
  return cleanups.start(process.execPath, [...image.flags, path.join(top, 'egress-sidecar', 'main.ts')], {
    namespace: name, cgroup, ready: healthy,
    env: { ...image.allocator, OPENSANDBOX_EGRESS_MODE: 'dns+nft', OPENSANDBOX_EGRESS_DNS_UPSTREAM: `${upstream}:53`, OPENSANDBOX_EGRESS_EXEMPTION: 'cgroup', ...env },
  })
}

/** What the image tells Node before it names the program, and glibc. */
async function readImage(): Promise<{ flags: string[]; allocator: Record<string, string> }> {
  const dockerfile = await readFile(path.join(top, 'deploy', 'docker', 'egress', 'Dockerfile'), 'utf8')
  const entrypoint = JSON.parse(/^ENTRYPOINT (.*)$/m.exec(dockerfile)?.[1] ?? '') as string[]
  const allocator = Array.from(dockerfile.matchAll(/\b((?:MALLOC|GLIBC)_\w+)=(\S+)/g), ([, name, value]) => [name, value])
  return { flags: entrypoint.slice(1, -1), allocator: Object.fromEntries(allocator) as Record<string, string> }
}
