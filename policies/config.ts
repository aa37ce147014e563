/** Checks a program's configuration against its one TypeBox schema. Pure: the caller brings the raw values. */
import { type Static, type TSchema } from 'typebox'
import { Settings } from 'typebox/system'
import { Value } from 'typebox/value'
import { formatProblems, type Problem } from './problem.ts'

// The default stops at eight; a person wants to mend everything in one go. Bounded, for a hostile document.
Settings.Set({ maxErrors: 100 })

/** Every problem of a configuration at once. `main.ts` prints it and exits 64 (EX_USAGE) before any port is opened. */
export class ConfigError extends Error {
  readonly problems: readonly Problem[]
  constructor(problems: readonly Problem[]) {
    super(formatProblems(problems))
    this.name = 'ConfigError'
    this.problems = problems
  }
}

/**
 * `raw` with defaults filled in and texts converted to numbers and booleans, frozen.
 * @throws ConfigError naming every path that does not fit
 */
export function checkConfig<S extends TSchema>(schema: S, raw: unknown): Static<S> {
  const value: unknown = Value.Default(schema, Value.Convert(schema, structuredClone(raw)))
  const problems = schemaProblems(schema, value)
  if (problems.length > 0) throw new ConfigError(problems)
  return deepFreeze(value) as Static<S>
}

/** Of a key that somebody else chose. */
const longestKey = 80

/** What the schema has against `value`, with paths in the form `a.b[2].c` below `at`. */
export function schemaProblems(schema: TSchema, value: unknown, at = ''): Problem[] {
  const found = new Map<string, Problem>()
  const choices = new Map<string, string[]>()
  for (const error of Value.Errors(schema, value)) {
    // A union of literals reports each literal on its own: say them together.
    if (error.keyword === 'const') {
      const path = joinPath(at, error.instancePath, '')
      const allowed = [...(choices.get(path) ?? []), JSON.stringify((error.params as { allowedValue: unknown }).allowedValue)]
      choices.set(path, allowed)
      found.set(path, { path, reason: `must be ${allowed.length > 1 ? 'one of ' : ''}${allowed.join(', ')}` })
      continue
    }
    // A superfluous property is reported twice, the second time with its name.
    if (error.keyword === 'boolean') continue
    // A missing or superfluous property is reported at its parent: name the property itself.
    const params = error.params as { requiredProperties?: string[]; additionalProperties?: string[] }
    const names = params.requiredProperties ?? params.additionalProperties ?? ['']
    for (const name of names) {
      const path = joinPath(at, error.instancePath, name.slice(0, longestKey))
      const reason = params.requiredProperties !== undefined ? `is required${error.instancePath === '' ? choicesFor(schema, name) : ''}` : params.additionalProperties !== undefined ? 'is not a known key' : error.message
      if (!found.has(path)) found.set(path, { path, reason })
    }
  }
  return [...found.values()]
}

/** `: one of …` for a property of the document that takes a few words only. */
function choicesFor(schema: TSchema, name: string): string {
  const property = (schema as { properties?: Record<string, { anyOf?: { const?: unknown }[] }> }).properties?.[name]
  const words = property?.anyOf?.map((choice) => choice.const) ?? []
  return words.length === 0 || words.includes(undefined) ? '' : `: one of ${words.map((word) => JSON.stringify(word)).join(', ')}`
}

function joinPath(at: string, pointer: string, name: string): string {
  let path = at
  for (const segment of [...pointer.split('/').slice(1), ...(name === '' ? [] : [name])]) {
    const key = segment.replaceAll('~1', '/').replaceAll('~0', '~')
    if (/^\d+$/.test(key)) path += `[${key}]`
    else path += path === '' ? key : `.${key}`
  }
  return path
}

function deepFreeze(value: unknown): unknown {
  if (typeof value === 'object' && value !== null && !Object.isFrozen(value)) {
    Object.freeze(value)
    for (const inner of Object.values(value)) deepFreeze(inner)
  }
  return value
}
