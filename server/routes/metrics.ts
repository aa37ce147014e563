/** What SDKs tell of their own calls: written to the log, and nothing more is made of it. */
import type { FastifyInstance } from 'fastify'
import * as Type from 'typebox'
import type { Static } from 'typebox'
import { schemaProblems } from '#policies/config.ts'
import { invalid } from '../create-request.ts'
import type { ServerDeps } from '../server.ts'

const text = (most: number) => Type.String({ minLength: 1, maxLength: most })
const Event = Type.Object({
  eventType: text(128),
  sandboxId: Type.Optional(Type.Union([text(256), Type.Null()])),
  image: Type.Optional(Type.Union([text(512), Type.Null()])),
  createDurationMs: Type.Optional(Type.Union([Type.Integer({ minimum: 0 }), Type.Null()])),
  success: Type.Optional(Type.Union([Type.Boolean(), Type.Null()])),
})

export function addMetricsRoutes(app: FastifyInstance, { clientEvent }: ServerDeps): void {
  app.post('/metrics/events', async (request, reply) => {
    const problems = schemaProblems(Event, request.body, 'body')
    if (problems.length > 0) throw invalid(problems)
    const { eventType, sandboxId, image, createDurationMs, success } = request.body as Static<typeof Event>
    clientEvent({ type: eventType, sandbox: sandboxId, image, milliseconds: createDurationMs, success })
    return reply.code(204).send()
  })
}
