/** Create, read, list, end, pause, resume, renew and relabel sandboxes. */
import type { FastifyInstance } from 'fastify'
import * as Type from 'typebox'
import { schemaProblems } from '#policies/config.ts'
import { ApiError, tooMany } from '../api-error.ts'
import { invalid, readCreateRequest } from '../create-request.ts'
import { isReserved, metadataProblems } from '../metadata.ts'
import type { RateLimit } from '../rate-limit.ts'
import { readListQuery, selectPage } from '../list-query.ts'
import { statusOf, toSandbox, toTimestamp } from '../sandbox-view.ts'
import type { ServerDeps } from '../server.ts'

type WithId = { Params: { id: string } }
const Patch = Type.Record(Type.String(), Type.Union([Type.String(), Type.Null()]))
const openDns = 'egress.mode is "dns": names are checked, direct addresses are open'

export function addSandboxRoutes(app: FastifyInstance, { groups, config, now }: ServerDeps, creates: RateLimit): void {
  app.post('/sandboxes', async (request, reply) => {
    const wait = creates.wait(request.ip)
    if (wait > 0) throw tooMany('Too many sandboxes were asked for from this address.', wait)
    creates.count(request.ip)
    const wanted = readCreateRequest(request.body, config, now())
    const group = await groups.create(wanted)
    const { record } = group
    const status = statusOf(group)
    const message = status.state === 'Running' ? 'Sandbox container started successfully.' : status.message
    return reply.code(202).send({
      id: record.id,
      status: { ...status, message, lastTransitionAt: toTimestamp(record.createdAt) },
      ...(record.metadata === null ? {} : { metadata: record.metadata }),
      ...(record.platform === null ? {} : { platform: record.platform }),
      ...(record.expiresAt === null ? {} : { expiresAt: toTimestamp(record.expiresAt) }),
      createdAt: toTimestamp(record.createdAt),
      entrypoint: wanted.entrypoint,
      ...(record.egress !== null && config.egress.mode === 'dns' ? { warnings: [openDns] } : {}),
    })
  })

  app.get('/sandboxes', async (request) => {
    const query = readListQuery(request.query as Record<string, unknown>)
    return selectPage(groups.list(), query)
  })

  app.get<WithId>('/sandboxes/:id', async (request) => toSandbox(groups.get(request.params.id)))

  app.delete<WithId>('/sandboxes/:id', async (request, reply) => {
    await groups.remove(request.params.id)
    return reply.code(204).send()
  })

  app.post<WithId>('/sandboxes/:id/pause', async (request, reply) => {
    await groups.pause(request.params.id)
    return reply.code(202).send()
  })

  app.post<WithId>('/sandboxes/:id/resume', async (request, reply) => {
    await groups.resume(request.params.id)
    return reply.code(202).send()
  })

  app.post<WithId>('/sandboxes/:id/renew-expiration', async (request) => {
    groups.get(request.params.id)
    const { expiresAt } = groups.renew(request.params.id, readMoment(request.body))
    return { expiresAt: toTimestamp(expiresAt ?? 0) }
  })

  app.patch<WithId>('/sandboxes/:id/metadata', async (request) => {
    const problems = schemaProblems(Patch, request.body, 'body')
    if (problems.length > 0) throw invalid(problems)
    const patch = request.body as Record<string, string | null>
    groups.get(request.params.id)
    const reserved = Object.keys(patch).find(isReserved)
    if (reserved !== undefined) throw new ApiError('INVALID_METADATA_LABEL', `metadata: the key ${JSON.stringify(reserved.slice(0, 80))} uses a reserved prefix`)
    const labelProblems = metadataProblems(patch)
    if (labelProblems.length > 0) throw invalid(labelProblems, 'SANDBOX::INVALID_METADATA_LABEL')
    return toSandbox(groups.patch(request.params.id, patch))
  })
}

/** RFC 3339 with any offset; without one it is UTC. Milliseconds since 1970. */
function readMoment(body: unknown): number {
  const fields = (typeof body === 'object' && body !== null ? body : {}) as { expiresAt?: unknown; expires_at?: unknown }
  const text = fields.expiresAt ?? fields.expires_at
  const match = typeof text === 'string' ? /^(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:?\d\d)?$/.exec(text.trim()) : null
  const offset = (match?.[4] ?? 'Z').toUpperCase().replace(/^([+-]\d\d)(\d\d)$/, '$1:$2')
  const moment = match === null ? Number.NaN : Date.parse(`${match[1]}T${match[2]}.${(match[3] ?? '0').padEnd(3, '0').slice(0, 3)}${offset}`)
  if (Number.isNaN(moment)) throw invalid([{ path: 'expiresAt', reason: 'must be a timestamp like 2026-01-31T12:00:00Z' }])
  return moment
}
