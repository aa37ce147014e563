/** The routes file of a gateway without a lifecycle server: `{"sandboxes":[{"id","host","state"?,"secureAccessToken"?}]}`. */
import Type from 'typebox'
import { canonicalAddress } from './address.ts'
import { schemaProblems } from './config.ts'
import { isHostName } from './host.ts'
import type { Problem } from './problem.ts'
import { sandboxStates, type RouteEntry } from './wire.ts'

export const StaticRoutesSchema = Type.Object({
  sandboxes: Type.Array(Type.Object({
    id: Type.String({ minLength: 1, description: 'as it stands in requests' }),
    host: Type.String({ minLength: 1, description: 'IP address or name of the sandbox, without a port' }),
    state: Type.Optional(Type.Union(sandboxStates.map((state) => Type.Literal(state)), { description: 'Running when absent; any other state is answered with 503' })),
    secureAccessToken: Type.Optional(Type.String({ description: 'requests must carry it, or a signed route' })),
    epoch: Type.Optional(Type.Integer({ minimum: 0 })),
  })),
})

/** Reads the file's parsed JSON; every problem at once, also an id that occurs twice and a host with a port. The address is the lifecycle: a new one is a new owner. */
export function readStaticRoutes(value: unknown): { ok: true; routes: readonly RouteEntry[] } | { ok: false; problems: readonly Problem[] } {
  const problems = schemaProblems(StaticRoutesSchema, value)
  if (problems.length > 0) return { ok: false, problems }
  const seen = new Set<string>()
  const routes = (value as Type.Static<typeof StaticRoutesSchema>).sandboxes.map((sandbox, index): RouteEntry => {
    if (seen.has(sandbox.id)) problems.push({ path: `sandboxes[${index}].id`, reason: 'occurs twice' })
    seen.add(sandbox.id)
    if (canonicalAddress(sandbox.host) === null && !isHostName(sandbox.host)) problems.push({ path: `sandboxes[${index}].host`, reason: 'is neither an IP address nor a host name (ports belong to requests)' })
    return { ...sandbox, state: sandbox.state ?? 'Running', lifecycle: `static:${sandbox.host}` }
  })
  return problems.length > 0 ? { ok: false, problems } : { ok: true, routes }
}
