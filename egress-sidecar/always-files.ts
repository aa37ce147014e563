/**
 * The operator's rules that stand before every user's: `deny.always` and `allow.always`, one target per line;
 * and `log_skip.always`, names that are not worth a log line.
 */
import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { compilePolicy } from '#policies/compile.ts'
import { decideName } from '#policies/decide.ts'
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

/** Names in `log_skip.always` whose allowed lookups are not worth a log line. @throws when the file cannot be read or has anything but names */
export async function readLogSkip(directory = alwaysDirectory): Promise<(name: string) => boolean> {
  const path = join(directory, 'log_skip.always')
  const lines = await readLines(path)
  for (const { number, text } of lines) {
    const target = parseTarget(text)
    if (!('kind' in target) || (target.kind !== 'name' && target.kind !== 'wildcard')) throw new Error(`${path} line ${number}: ${JSON.stringify(text)} is not a domain pattern; only host/domain entries are supported`)
  }
  if (lines.length === 0) return () => false
  const rules = compilePolicy({ defaultAction: 'deny', egress: lines.map(({ text }) => ({ action: 'allow', target: text })) })
  return (name) => decideName(rules, name).action === 'allow'
}

async function readTargets(path: string, action: Action): Promise<NetworkRule[]> {
  return (await readLines(path)).map(({ number, text }) => {
    const parsed = parseTarget(text)
    if ('problem' in parsed) throw new Error(`${path} line ${number}: ${parsed.problem}`)
    return { action, target: text }
  })
}

/** Lines that are neither blank nor comments; none when there is no file. */
async function readLines(path: string): Promise<{ number: number; text: string }[]> {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []
    throw error
  }
  if (text.length > maxFileBytes) throw new Error(`${path}: longer than ${maxFileBytes} bytes`)
  return text.split('\n').map((line, index) => ({ number: index + 1, text: line.trim() })).filter((line) => line.text !== '' && !line.text.startsWith('#'))
}
