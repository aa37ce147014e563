/** Keys of a configuration that nobody reads: a guard that was misspelt must not be believed to stand. Pure. */
import type { TSchema } from 'typebox'

/** The original's own, a table or a key each, that mean nothing here: its files load without a word about them. */
const originals: ReadonlySet<string> = new Set([
  'server.thread_pool_size', 'server.loop', 'server.http', 'server.log_level',
  'log.file_enabled', 'log.file_path', 'log.access_file_path', 'log.file_max_bytes', 'log.file_backup_count',
  'docker.host_ip', 'docker.port_range_min', 'docker.port_range_max', 'secure_runtime.k8s_runtime_class', 'renew_intent.redis',
  'storage', 'proxy', 'pause', 'kubernetes', 'agent_sandbox',
])

/** Paths of what the schema does not know, tables as a whole. */
export function unknownKeys(schema: TSchema, value: unknown, at = ''): string[] {
  const { properties } = schema as { properties?: Readonly<Record<string, TSchema>> }
  if (properties === undefined || typeof value !== 'object' || value === null || Array.isArray(value)) return []
  return Object.entries(value).flatMap(([key, inner]) => {
    const path = at === '' ? key : `${at}.${key}`
    const known = Object.hasOwn(properties, key) ? properties[key] : undefined
    if (known !== undefined) return unknownKeys(known, inner, path)
    return originals.has(path) ? [] : [path]
  })
}
