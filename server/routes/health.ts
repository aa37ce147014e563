/** Is the server alive, and is it ready? Bare only, and not under the API key. */
import type { FastifyInstance } from 'fastify'
import type { ServerDeps } from '../server.ts'

/** What must hold before this server can make sandboxes that are kept in. */
export type Readiness = {
  readonly ready: boolean
  /** Words for people; `isolation` says openly when neighbours or the host are in reach. */
  readonly checks: Readonly<Record<'engine' | 'store' | 'host_guard' | 'isolation', string>>
}

export function addHealthRoutes(app: FastifyInstance, { readiness }: ServerDeps): void {
  app.get('/health', async () => ({ status: 'healthy' }))

  app.get('/health/ready', async (_request, reply) => {
    const { ready, checks } = await readiness()
    return reply.code(ready ? 200 : 503).send({ status: ready ? 'ready' : 'not ready', checks })
  })
}
