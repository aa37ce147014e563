/** Revocation: no access token of ours that was minted so far opens the sandbox any more. Gateways hear of it by the route stream. */
import type { FastifyInstance } from 'fastify'
import { ApiError } from '../api-error.ts'
import type { ServerDeps } from '../server.ts'

export function addAccessRoutes(app: FastifyInstance, { groups }: ServerDeps): void {
  app.post<{ Params: { id: string } }>('/sandboxes/:id/access/revoke', async (request) => {
    const { record } = groups.get(request.params.id)
    if (record.secureAccessToken === null) throw new ApiError('SANDBOX::API_NOT_SUPPORTED', 'The sandbox was created without secureAccess: nothing guards it that could be revoked.')
    return { epoch: groups.revokeAccess(request.params.id).accessEpoch }
  })
}
