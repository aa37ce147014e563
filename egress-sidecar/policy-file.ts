/** The policy document on disk: read once at start, replaced as a whole at every change. */
import { open, readFile, rename, rm, stat } from 'node:fs/promises'
import { formatProblems } from '#policies/problem.ts'
import { readNetworkPolicy, type NetworkPolicy } from '#policies/document.ts'

export type FoundPolicy = { readonly policy: NetworkPolicy | null; readonly warning: string | null }

/** Null when there is none, or a blank or an invalid one (with a warning): then the environment's holds. @throws when it cannot be read */
export async function readPolicyFile(path: string): Promise<FoundPolicy> {
  if (path === '') return { policy: null, warning: null }
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return { policy: null, warning: null }
    throw error
  }
  if (text.trim() === '') return { policy: null, warning: `${path} is empty` }
  try {
    const read = readNetworkPolicy(JSON.parse(text), path)
    return read.ok ? { policy: read.policy, warning: null } : { policy: null, warning: formatProblems(read.problems) }
  } catch (error) {
    return { policy: null, warning: `${path}: ${(error as Error).message}` }
  }
}

/** A new content that is on disk but does not count yet. */
export type PreparedFile = { commit(): Promise<void>; abandon(): Promise<void> }

/** Writes beside the file, so that `commit` only renames: a crash leaves the old content or the new one. Without a path it does nothing. */
export async function preparePolicyFile(path: string, policy: NetworkPolicy): Promise<PreparedFile> {
  if (path === '') return { commit: async () => undefined, abandon: async () => undefined }
  const temporary = `${path}.new`
  const mode = await stat(path).then((found) => found.mode & 0o777, () => 0o600)
  const file = await open(temporary, 'w', mode)
  try {
    // Not by the umask's leave, and also where a crash has left the file behind.
    await file.chmod(mode)
    await file.writeFile(`${JSON.stringify({ egress: policy.egress, defaultAction: policy.defaultAction }, null, 2)}\n`)
    await file.sync()
  } finally {
    await file.close()
  }
  return { commit: () => rename(temporary, path), abandon: () => rm(temporary, { force: true }) }
}
