/** What gateways ask of the server, under the route token: where sandboxes are, and who of them has been used. */
import type { FastifyInstance, FastifyRequest } from 'fastify'
import * as Type from 'typebox'
import { equalSecret } from '#policies/access.ts'
import { schemaProblems } from '#policies/config.ts'
import { mostRenewals, renewalsPath, renewalStaleSeconds, routeStreamPath, type Renewals } from '#policies/wire.ts'
import { ApiError, tooMany } from '../api-error.ts'
import { invalid } from '../create-request.ts'
import { RateLimit } from '../rate-limit.ts'
import type { ServerDeps } from '../server.ts'

const Report = Type.Object({ sandboxes: Type.Array(Type.Object({ id: Type.String({ maxLength: 256 }), observedAt: Type.String({ maxLength: 64 }) }), { maxItems: mostRenewals }) })

export function addInternalRoutes(app: FastifyInstance, { groups, routes, config, now }: ServerDeps): void {
  const failures = new RateLimit(config.server.auth_failures_per_minute, now)
  const requireToken = (request: FastifyRequest): void => {
    const wait = failures.wait(request.ip)
    if (wait > 0) throw tooMany('Too many wrong route tokens came from this address.', wait)
    const given = /^Bearer (.+)$/i.exec(request.headers.authorization ?? '')?.[1] ?? ''
    if (config.routeToken !== null && equalSecret(given, config.routeToken)) return
    if (given !== '') failures.count(request.ip)
    throw new ApiError('INVALID_ROUTE_TOKEN', 'The route token is missing or wrong.')
  }

  app.get(routeStreamPath, async (request, reply) => {
    requireToken(request)
    reply.hijack()
    routes.subscribe(reply.raw)
  })

  /** A gateway may lag behind: whoever is gone, or was used long ago, is passed over without a word. */
  app.post(renewalsPath, async (request, reply) => {
    requireToken(request)
    const problems = schemaProblems(Report, request.body)
    const { sandboxes = [] } = (problems.length === 0 ? request.body : {}) as Partial<Renewals>
    for (const [index, { observedAt }] of sandboxes.entries()) if (Number.isNaN(Date.parse(observedAt))) problems.push({ path: `sandboxes[${index}].observedAt`, reason: 'must be a timestamp like 2026-01-31T12:00:00Z' })
    if (problems.length > 0) throw invalid(problems)
    const stale = now() - renewalStaleSeconds * 1000
    for (const { id, observedAt } of config.renew_intent.enabled ? sandboxes : []) {
      // Each is written to disk: other requests have their turn in between.
      if (Date.parse(observedAt) >= stale && groups.used(id)) await new Promise(setImmediate)
    }
    return reply.code(204).send()
  })
}
