/** Rules for sandbox metadata: those of Kubernetes labels, so that one set of filters works on every runtime. Pure. */
import type { Problem } from '#policies/problem.ts'

const reservedPrefix = 'opensandbox.io/'
/** Ours: an instance label in metadata would hand a sandbox to another server. */
const ownPrefix = 'sallyport.io/'
const name = /^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$/
const dnsLabel = /^[a-z0-9]([-a-z0-9]*[a-z0-9])?$/

export function isReserved(key: string): boolean {
  return key.startsWith(reservedPrefix) || key.startsWith(ownPrefix)
}

/** Everything that is wrong with a map of labels; a null value (delete this key) is not looked at. */
export function metadataProblems(metadata: Readonly<Record<string, string | null>>, path = 'metadata'): Problem[] {
  const problems: Problem[] = []
  for (const [key, value] of Object.entries(metadata)) {
    const at = `${path}[${JSON.stringify(key.slice(0, 80))}]`
    if (isReserved(key)) problems.push({ path: at, reason: 'uses a reserved prefix' })
    else if (value !== null && !isLabelKey(key)) problems.push({ path: at, reason: 'is not a label key: [prefix/]name, name of 1 to 63 letters, digits, -, _ and .' })
    else if (value !== null && !isLabelValue(value)) problems.push({ path: at, reason: 'is not a label value: at most 63 letters, digits, -, _ and .' })
  }
  return problems
}

/** RFC 7396 on a flat map: null deletes, everything else sets. */
export function patchMetadata(base: Readonly<Record<string, string>>, patch: Readonly<Record<string, string | null>>): Record<string, string> {
  const merged = new Map(Object.entries(base))
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) merged.delete(key)
    else merged.set(key, value)
  }
  return Object.fromEntries(merged)
}

function isLabelKey(key: string): boolean {
  const slash = key.indexOf('/')
  const prefix = slash === -1 ? null : key.slice(0, slash)
  const rest = key.slice(slash + 1)
  if (prefix !== null && (prefix.length > 253 || !prefix.split('.').every((label) => dnsLabel.test(label)))) return false
  return rest.length >= 1 && rest.length <= 63 && name.test(rest)
}

function isLabelValue(value: string): boolean {
  return value === '' || (value.length <= 63 && name.test(value))
}
