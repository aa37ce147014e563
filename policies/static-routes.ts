/** The routes file of a gateway without a lifecycle server: `{"sandboxes":[{"id","host","state"?,"secureAccessToken"?}]}`. */
import * as Type from 'typebox'
import { Compile } from 'typebox/compile'
import { canonicalAddress } from './address.ts'
import { schemaProblems } from './config.ts'
import { isHostName } from './host.ts'
import type { Problem } from './problem.ts'
import { sandboxStates, type RouteEntry } from './wire.ts'

const StaticRouteSchema = Type.Object({
  id: Type.String({ minLength: 1, description: 'as it stands in requests' }),
  host: Type.String({ minLength: 1, description: 'IP address or name of the sandbox, without a port' }),
  state: Type.Optional(Type.Union(sandboxStates.map((state) => Type.Literal(state)), { description: 'Running when absent; any other state is answered with 503' })),
  secureAccessToken: Type.Optional(Type.String({ description: 'requests must carry it, or a signed route' })),
  epoch: Type.Optional(Type.Integer({ minimum: 0 })),
})
const DocumentSchema = Type.Object({ sandboxes: Type.Array(Type.Unknown()) })

/** Problems of one file that are told: a person mends a few and looks again. */
const mostProblems = 100

/**
 * Reads such a file bit by bit, because a long one must not keep a gateway from its requests: the list in as many parts as one likes,
 * and what stands around it. The address is the lifecycle: a new one is a new owner.
 */
export class StaticRoutesReader {
  readonly routes = new Map<string, RouteEntry>()
  /** What is wrong, an id that occurs twice and a host with a port included. */
  readonly problems: Problem[] = []
  readonly #fits = Compile(StaticRouteSchema)
  readonly #known: (entry: RouteEntry) => RouteEntry
  #count = 0

  /** @param known gives back an equal entry that is there already, where there is one: it is kept instead of the one that was read */
  constructor(known: (entry: RouteEntry) => RouteEntry = (entry) => entry) {
    this.#known = known
  }

  /** @param value the parsed JSON without the list's elements, which come in parts */
  readDocument(value: unknown): void {
    const problems = schemaProblems(DocumentSchema, value)
    if (problems.length === 0 && (value as Type.Static<typeof DocumentSchema>).sandboxes.length > 0) problems.push({ path: 'sandboxes', reason: 'must stand there once, and without escapes' })
    this.problems.unshift(...problems)
  }

  /** @param values the next sandboxes of the list */
  readSandboxes(values: readonly unknown[]): void {
    for (const value of values) {
      const path = `sandboxes[${this.#count++}]`
      if (this.problems.length >= mostProblems) return
      // Telling what is wrong costs a hundred times what finding out does.
      if (this.#fits.Check(value)) this.#readSandbox(value, path)
      else this.problems.push(...schemaProblems(StaticRouteSchema, value, path))
    }
  }

  #readSandbox(sandbox: Type.Static<typeof StaticRouteSchema>, path: string): void {
    const { id, host, state = 'Running' } = sandbox
    if (this.routes.has(id)) this.problems.push({ path: `${path}.id`, reason: 'occurs twice' })
    else if (canonicalAddress(host) === null && !isHostName(host)) this.problems.push({ path: `${path}.host`, reason: 'is neither an IP address nor a host name (ports belong to requests)' })
    else {
      const entry = this.#known({ ...sandbox, state, lifecycle: `static:${host}` })
      this.routes.set(entry.id, entry)
    }
  }
}
