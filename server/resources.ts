/** `resourceLimits` of a create request → what Docker takes. Pure. What cannot be read is a problem, never "no limit". */
import type { Problem } from '#policies/problem.ts'

export type Limits = { readonly memory: number; readonly nanoCpus: number; readonly gpus: number }

const units: ReadonlyMap<string, number> = new Map([
  ['', 1], ['b', 1], ['k', 1e3], ['kb', 1e3], ['ki', 2 ** 10], ['m', 1e6], ['mb', 1e6], ['mi', 2 ** 20],
  ['g', 1e9], ['gb', 1e9], ['gi', 2 ** 30], ['t', 1e12], ['tb', 1e12], ['ti', 2 ** 40],
])
/** The engine refuses less. */
const leastMemory = 6 * 2 ** 20

/** Bytes, 10^-9 CPUs and GPUs (-1: all); 0 where no limit was asked for. Unknown keys are ignored, as in the original. */
export function readLimits(raw: Readonly<Record<string, string>>, problems: Problem[], path = 'resourceLimits'): Limits {
  const read = (key: string, parse: (text: string) => number | null, reason: string): number => {
    const text = raw[key]
    if (text === undefined) return 0
    const value = parse(text.trim().toLowerCase())
    if (value === null) problems.push({ path: `${path}.${key}`, reason })
    return value ?? 0
  }
  return {
    memory: read('memory', parseMemory, 'must be an amount like 512Mi or 2Gi, at least 6Mi'),
    nanoCpus: read('cpu', parseCpu, 'must be a number of CPUs like 2, 0.5 or 500m, at least 10m'),
    gpus: read('gpu', parseGpu, 'must be a positive number or "all"'),
  }
}

function parseMemory(text: string): number | null {
  const match = /^(\d+(?:\.\d+)?)\s*([a-z]*)$/.exec(text)
  const unit = units.get(match?.[2] ?? '?')
  const bytes = Math.floor(Number(match?.[1]) * (unit ?? Number.NaN))
  return bytes >= leastMemory && Number.isSafeInteger(bytes) ? bytes : null
}

function parseCpu(text: string): number | null {
  const match = /^(\d+(?:\.\d+)?)(m?)$/.exec(text)
  const nano = Math.floor(Number(match?.[1] ?? Number.NaN) * (match?.[2] === 'm' ? 1e6 : 1e9))
  return nano >= 1e7 && Number.isSafeInteger(nano) ? nano : null
}

function parseGpu(text: string): number | null {
  if (text === 'all') return -1
  return /^[1-9]\d{0,3}$/.test(text) ? Number(text) : null
}
