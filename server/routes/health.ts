/** Is the server alive, is it ready, and the stream of routes for gateways. Each bare, none under the API key. */
import type { FastifyInstance } from 'fastify'
import { equalSecret } from '#policies/access.ts'
import { routeStreamPath } from '#policies/wire.ts'
import { ApiError } from '../api-error.ts'
import type { ServerDeps } from '../server.ts'

/** What must hold before this server can make sandboxes that are kept in. */
export type Readiness = {
  readonly ready: boolean
  /** Words for people; `isolation` says openly when neighbours or the host are in reach. */
  readonly checks: Readonly<Record<'engine' | 'store' | 'host_guard' | 'isolation', string>>
}

export function addHealthRoutes(app: FastifyInstance, { readiness, routes, config }: ServerDeps): void {
  app.get('/health', async () => ({ status: 'healthy' }))

  app.get('/health/ready', async (_request, reply) => {
    const { ready, checks } = await readiness()
    return reply.code(ready ? 200 : 503).send({ status: ready ? 'ready' : 'not ready', checks })
  })

  app.get(routeStreamPath, async (request, reply) => {
    const given = /^Bearer (.+)$/i.exec(request.headers.authorization ?? '')?.[1] ?? ''
    if (config.routeToken === null || !equalSecret(given, config.routeToken)) throw new ApiError('INVALID_ROUTE_TOKEN', 'The route token is missing or wrong.')
    reply.hijack()
    routes.subscribe(reply.raw)
  })
}
