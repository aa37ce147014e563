/** The query of `GET /sandboxes`, and the page it selects. Pure. */
import type { Problem } from '#policies/problem.ts'
import { ApiError } from './api-error.ts'
import { invalid } from './create-request.ts'
import type { Group } from './group.ts'
import { statusOf, toSandbox } from './sandbox-view.ts'

export type ListQuery = {
  /** Lower case; null: any. */
  readonly states: ReadonlySet<string> | null
  readonly metadata: ReadonlyMap<string, string>
  readonly page: number
  readonly pageSize: number
}

/** @throws ApiError 400 */
export function readListQuery(raw: Readonly<Record<string, unknown>>): ListQuery {
  const problems: Problem[] = []
  const number = (name: string, most: number, otherwise: number): number => {
    const given = raw[name]
    if (given === undefined) return otherwise
    const value = typeof given === 'string' && /^\s*\d{1,9}\s*$/.test(given) ? Number(given) : Number.NaN
    if (!(value >= 1 && value <= most)) problems.push({ path: `query.${name}`, reason: `must be a whole number from 1 to ${most}` })
    return value
  }
  const states = raw.state === undefined ? null : new Set([raw.state].flat().map((state) => String(state).toLowerCase()))
  const metadata = readMetadataFilter([raw.metadata].flat().at(-1))
  const query = { states, metadata, page: number('page', 999_999_999, 1), pageSize: number('pageSize', 200, 20) }
  if (problems.length > 0) throw invalid(problems)
  return query
}

/** @param groups newest first */
export function selectPage(groups: readonly Group[], { states, metadata, page, pageSize }: ListQuery): { items: unknown[]; pagination: Record<string, unknown> } {
  const matching = groups.filter((group) => {
    if (states !== null && !states.has(statusOf(group).state.toLowerCase())) return false
    for (const [key, value] of metadata) if (group.record.metadata?.[key] !== value) return false
    return true
  })
  const totalItems = matching.length
  return {
    items: matching.slice((page - 1) * pageSize, page * pageSize).map(toSandbox),
    pagination: { page, pageSize, totalItems, totalPages: Math.ceil(totalItems / pageSize), hasNextPage: page * pageSize < totalItems },
  }
}

/** `k=v&k2=v2`, all must match. One SDK encodes twice: keys and values of labels hold no `%`, so decoding again is safe. */
function readMetadataFilter(raw: unknown): Map<string, string> {
  const wanted = new Map<string, string>()
  if (typeof raw !== 'string' || raw === '') return wanted
  for (const segment of raw.split('&')) {
    const at = segment.indexOf('=')
    if (at === -1) throw new ApiError('INVALID_METADATA_FORMAT', `Invalid metadata format: bad query field: ${JSON.stringify(segment.slice(0, 80))}`)
    wanted.set(decodeAll(segment.slice(0, at)), decodeAll(segment.slice(at + 1)))
  }
  return wanted
}

function decodeAll(text: string): string {
  let decoded = text.replaceAll('+', ' ')
  for (let round = 0; round < 3 && decoded.includes('%'); round++) {
    try {
      decoded = decodeURIComponent(decoded)
    } catch {
      return decoded
    }
  }
  return decoded
}
