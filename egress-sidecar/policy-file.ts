/** The policy document on disk: read once at start, replaced as a whole at every change. */
import { open, readFile, realpath, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { formatProblems } from '#policies/problem.ts'
import { isTakenByOriginal, readNetworkPolicy, type NetworkPolicy } from '#policies/document.ts'

export type FoundPolicy = { readonly policy: NetworkPolicy | null; readonly warning: string | null }

/**
 * Null when there is none, or one that the original does not take either: blank, not JSON, not a policy (with a warning). Then the environment's holds.
 * @throws when it cannot be read; and for a policy that the original enforces and we refuse: what holds instead may be wider, and the next change would
 * overwrite what its author wrote
 */
export async function readPolicyFile(path: string): Promise<FoundPolicy> {
  if (path === '') return { policy: null, warning: null }
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw new Error(`the policy file ${path} (OPENSANDBOX_EGRESS_POLICY_FILE) cannot be read: ${(error as Error).message}`, { cause: error })
    const folder = await stat(dirname(path)).catch(() => null)
    return { policy: null, warning: folder === null ? `the folder of the policy file ${path} is not there: until it is, no change of the policy can be made` : null }
  }
  const unused = (why: string): FoundPolicy => ({ policy: null, warning: `policy file not used: ${path}${why}` })
  if (text.trim() === '') return unused(' is empty')
  let document: unknown
  try {
    document = JSON.parse(text)
  } catch (error) {
    return unused(`: ${(error as Error).message}`)
  }
  const read = readNetworkPolicy(document, '')
  if (read.ok) return { policy: read.policy, warning: null }
  const problems = formatProblems(read.problems)
  if (!isTakenByOriginal(document)) return unused(`: ${problems}`)
  throw new Error(`the policy file ${path} is refused, and left as it is: ${problems}`)
}

/** A new content that is on disk but does not count yet. */
export type PreparedFile = { commit(): Promise<void>; abandon(): Promise<void> }

/**
 * Writes beside the file, so that `commit` only renames: a crash leaves the old content or the new one. A file that is a mount of its own cannot be
 * replaced, only written anew; its folder may be read-only. Without a path it does nothing.
 */
export async function preparePolicyFile(wanted: string, policy: NetworkPolicy): Promise<PreparedFile> {
  if (wanted === '') return { commit: async () => undefined, abandon: async () => undefined }
  const text = `${JSON.stringify({ egress: policy.egress, defaultAction: policy.defaultAction }, null, 2)}\n`
  // A link stays one.
  const path = await realpath(wanted).catch(() => wanted)
  const mode = await stat(path).then((found) => found.mode & 0o777, () => 0o600)
  const inPlace = (): Promise<void> => rewrite(path, text)
  const temporary = `${path}.new`
  try {
    await writeNew(temporary, text, mode)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EROFS') throw error
    await (await open(path, 'r+')).close()
    return { commit: inPlace, abandon: async () => undefined }
  }
  const abandon = (): Promise<void> => rm(temporary, { force: true })
  const commit = async (): Promise<void> => {
    try {
      await rename(temporary, path)
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY') throw error
      await inPlace()
      await abandon()
    }
  }
  return { commit, abandon }
}

async function writeNew(path: string, text: string, mode: number): Promise<void> {
  const file = await open(path, 'w', mode)
  try {
    // Not by the umask's leave, and also where a crash has left the file behind.
    await file.chmod(mode)
    await file.writeFile(text)
    await file.sync()
  } finally {
    await file.close()
  }
}

/** A new content that is shorter than the old is filled up with blanks first: cut off or not, it is a document. Where there is no room, the old one is written back. */
async function rewrite(path: string, text: string): Promise<void> {
  const file = await open(path, 'r+')
  try {
    const old = await file.readFile()
    const wanted = Buffer.from(text)
    try {
      await file.write(Buffer.concat([wanted, Buffer.alloc(Math.max(0, old.length - wanted.length), ' ')]), 0, undefined, 0)
    } catch (error) {
      await file.write(old, 0, undefined, 0)
      await file.truncate(old.length)
      throw error
    }
    await file.truncate(wanted.length)
    await file.sync()
  } finally {
    await file.close()
  }
}
