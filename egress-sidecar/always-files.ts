/** The operator's rules that stand before every user's: `deny.always` and `allow.always`, one target per line. */
import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { Action, NetworkRule } from '#policies/document.ts'
import { parseTarget } from '#policies/host.ts'

export const alwaysDirectory = '/var/egress/rules'

export type AlwaysRules = { readonly deny: readonly NetworkRule[]; readonly allow: readonly NetworkRule[] }

export type AlwaysFiles = {
  /** Both files; a missing one has no rules. @throws when a file cannot be read or a line is not a target */
  read(): Promise<AlwaysRules>
  /** Has a file come, gone or changed since the last successful `read`? */
  changed(): Promise<boolean>
}

const maxFileBytes = 4 << 20

export function createAlwaysFiles(directory = alwaysDirectory): AlwaysFiles {
  let last = ''
  return {
    async read() {
      const before = await fingerprint(directory)
      const rules = { deny: await readTargets(join(directory, 'deny.always'), 'deny'), allow: await readTargets(join(directory, 'allow.always'), 'allow') }
      last = before
      return rules
    },
    changed: async () => (await fingerprint(directory)) !== last,
  }
}

async function fingerprint(directory: string): Promise<string> {
  const parts = await Promise.all(['deny.always', 'allow.always'].map(async (name) => {
    try {
      const { mtimeMs, size, ino } = await stat(join(directory, name))
      return `${mtimeMs} ${size} ${ino}`
    } catch (error) {
      return (error as NodeJS.ErrnoException).code ?? 'error'
    }
  }))
  return parts.join(', ')
}

async function readTargets(path: string, action: Action): Promise<NetworkRule[]> {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []
    throw error
  }
  if (text.length > maxFileBytes) throw new Error(`${path}: longer than ${maxFileBytes} bytes`)
  const rules: NetworkRule[] = []
  for (const [index, line] of text.split('\n').entries()) {
    const target = line.trim()
    if (target === '' || target.startsWith('#')) continue
    const parsed = parseTarget(target)
    if ('problem' in parsed) throw new Error(`${path} line ${index + 1}: ${parsed.problem}`)
    rules.push({ action, target })
  }
  return rules
}
