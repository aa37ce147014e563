/** Routes of OpenSandbox this server does not have: they say so, with the codes clients know. */
import type { FastifyInstance, HTTPMethods } from 'fastify'
import { ApiError, type ApiErrorCode } from '../api-error.ts'

const unbuilt: readonly (readonly [HTTPMethods | HTTPMethods[], string, ApiErrorCode, string])[] = [
  ['POST', '/sandboxes/:id/snapshots', 'SNAPSHOT::NOT_IMPLEMENTED', 'Snapshots are not available.'],
  ['GET', '/snapshots', 'SNAPSHOT::NOT_IMPLEMENTED', 'Snapshots are not available.'],
  [['GET', 'DELETE'], '/snapshots/:id', 'SNAPSHOT::NOT_IMPLEMENTED', 'Snapshots are not available.'],
  ['GET', '/sandboxes/:id/diagnostics/:kind', 'DIAGNOSTICS_NOT_IMPLEMENTED', 'Diagnostics are not available.'],
  [['GET', 'POST'], '/pools', 'KUBERNETES::POOL_NOT_SUPPORTED', 'Pools are not available on Docker.'],
  [['GET', 'PUT', 'DELETE'], '/pools/:name', 'KUBERNETES::POOL_NOT_SUPPORTED', 'Pools are not available on Docker.'],
  [['GET', 'POST', 'PUT', 'PATCH', 'DELETE'], '/sandboxes/:id/proxy/:port', 'NOT_IMPLEMENTED', 'The server proxy is not available.'],
  [['GET', 'POST', 'PUT', 'PATCH', 'DELETE'], '/sandboxes/:id/proxy/:port/*', 'NOT_IMPLEMENTED', 'The server proxy is not available.'],
]

/** Pages for people; open in the original. */
export const docsPaths = ['/docs', '/redoc', '/openapi.json'] as const

export function addDocsRoutes(app: FastifyInstance): void {
  for (const url of docsPaths) app.get(url, async () => { throw new ApiError('NOT_IMPLEMENTED', 'Pages that document the API are not available.') })
}

export function addUnbuiltRoutes(app: FastifyInstance): void {
  for (const [method, url, code, message] of unbuilt) {
    app.route({ method, url, handler: async () => { throw new ApiError(code, message) } })
  }
}
