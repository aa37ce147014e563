/** Reads and changes what a running sandbox may reach, through its egress sidecar. */
import type { FastifyInstance } from 'fastify'
import { readNetworkRules } from '#policies/document.ts'
import { ApiError } from '../api-error.ts'
import { invalid } from '../create-request.ts'
import type { Group } from '../group.ts'
import { addressOf, statusOf } from '../sandbox-view.ts'
import type { ServerDeps } from '../server.ts'

type WithId = { Params: { id: string } }
const openDns = 'the sidecar runs in mode "dns": names are checked, direct addresses are open'

export function addNetworkPolicyRoutes(app: FastifyInstance, { groups, askPolicy }: ServerDeps): void {
  /** All of it as the sidecar says: the server's configuration may be another by now than the one it was started with. */
  const answer = async (group: Group, rules: Parameters<typeof askPolicy>[2]): Promise<unknown> => {
    const { policy, mode, enforcementMode, floor } = await askPolicy(addressOf(group), group.record.egress?.token ?? '', rules)
    return { policy, mode, enforcementMode, floor, ...(enforcementMode === 'dns' ? { warnings: [openDns] } : {}) }
  }

  app.get<WithId>('/sandboxes/:id/network-policy', async (request) => answer(guarded(groups.get(request.params.id)), null))

  /** Body: an array of rules, put before those that are there; a rule for the same target replaces it. */
  app.patch<WithId>('/sandboxes/:id/network-policy', async (request) => {
    const group = guarded(groups.get(request.params.id))
    if (!Array.isArray(request.body)) throw invalid([{ path: 'body', reason: 'must be an array of rules' }])
    const read = readNetworkRules(request.body, 'body')
    if (!read.ok) throw invalid(read.problems)
    if (read.rules.length === 0) throw invalid([{ path: 'body', reason: 'must hold at least one rule' }])
    return answer(group, read.rules)
  })
}

function guarded(group: Group): Group {
  if (group.record.egress === null) throw new ApiError('SANDBOX::NO_NETWORK_POLICY', 'The sandbox was created without a networkPolicy.')
  const { state } = statusOf(group)
  if (state !== 'Running' && state !== 'Paused') throw new ApiError('DOCKER::SANDBOX_NOT_RUNNING', `Sandbox ${group.record.id} is not running.`)
  return group
}
