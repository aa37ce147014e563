/** A sidecar as production has it, but for the container: flags of the image, and its packets known by its cgroup. */
import { readFile } from 'node:fs/promises'
import path from 'node:path'
import { makeGroup } from '../cgroups.ts'
import type { Island } from '../namespaces.ts'
import { runCommand, type Cleanups, type Program } from '../program.ts'

const top = path.join(import.meta.dirname, '..', '..')

/** @param env with its policy */
export async function startSidecar({ name, upstream }: Island, env: Readonly<Record<string, string>>, cleanups: Cleanups): Promise<Program> {
  const cgroup = await makeGroup('sidecar', cleanups)
  const healthy = async (): Promise<boolean> => (await runCommand('curl', ['--silent', '--fail', '--max-time', '2', 'http://127.0.0.1:18080/healthz'], { namespace: name })).trim() === 'ok'
  return cleanups.start(process.execPath, [...(await imageFlags()), path.join(top, 'egress-sidecar', 'main.ts')], {
    namespace: name, cgroup, ready: healthy,
    env: { OPENSANDBOX_EGRESS_MODE: 'dns+nft', OPENSANDBOX_EGRESS_DNS_UPSTREAM: `${upstream}:53`, OPENSANDBOX_EGRESS_EXEMPTION: 'cgroup', ...env },
  })
}

/** What the image tells Node before it names the program. */
async function imageFlags(): Promise<string[]> {
  const dockerfile = await readFile(path.join(top, 'deploy', 'docker', 'egress', 'Dockerfile'), 'utf8')
  return (JSON.parse(/^ENTRYPOINT (.*)$/m.exec(dockerfile)?.[1] ?? '') as string[]).slice(1, -1)
}
