/**
 * The few calls to the Docker Engine API that building images needs, over node:http. The command line client may be missing, and
 * dockerode belongs to the server alone. API 1.41 is what Debian 12's engine speaks; later engines still accept it.
 */
import { request, type IncomingMessage } from 'node:http'
import { pipeline } from 'node:stream/promises'
import { engineAddress } from './engine.mjs'

const version = '/v1.41'

export type EngineCall = {
  method?: 'GET' | 'POST' | 'DELETE'
  /** Path below the version, with its query: `/images/create?fromSrc=-`. */
  path: string
  body?: AsyncIterable<unknown> | Buffer
  contentType?: string
  /** Milliseconds until the call is given up; a build on a slow machine takes minutes. */
  timeout?: number
}

export type EngineAnswer = { status: number; text: string }

/** One call, its whole answer as text. Build and import answer 200 first and report failure in the stream: see `checkStream`. */
export async function callEngine({ method = 'GET', path, body, contentType = 'application/json', timeout = 600_000 }: EngineCall): Promise<EngineAnswer> {
  const answered = Promise.withResolvers<IncomingMessage>()
  const call = request({ ...engineAddress(process.env['DOCKER_HOST']), method, path: version + path, headers: body === undefined ? {} : { 'content-type': contentType }, signal: AbortSignal.timeout(timeout) })
  call.once('response', answered.resolve)
  call.once('error', answered.reject)
  if (body === undefined || Buffer.isBuffer(body)) call.end(body)
  else pipeline(body, call).catch(answered.reject)
  const response = await answered.promise
  const chunks: Buffer[] = []
  for await (const chunk of response) chunks.push(chunk as Buffer)
  return { status: response.statusCode ?? 0, text: Buffer.concat(chunks).toString('utf8') }
}

/** Throws with the engine's own words when a call failed, at once or later in its stream of JSON lines. */
export function checkStream(what: string, { status, text }: EngineAnswer): void {
  const lines = text.split('\n').filter((line) => line.startsWith('{'))
  const failure = lines.map((line) => JSON.parse(line) as { error?: string; message?: string }).find((line) => line.error !== undefined || status >= 300)
  if (status < 300 && failure === undefined) return
  throw new Error(`${what}: the Docker engine answered ${status}: ${failure?.error ?? failure?.message ?? text.slice(-500)}`)
}

/** Id and labels of a local image, or undefined when there is none of that name. */
export async function findImage(name: string): Promise<{ id: string; labels: Record<string, string> } | undefined> {
  const answer = await callEngine({ path: `/images/${name}/json` })
  if (answer.status === 404) return undefined
  checkStream(`image ${name}`, answer)
  const image = JSON.parse(answer.text) as { Id: string; Config?: { Labels?: Record<string, string> | null } }
  return { id: image.Id, labels: image.Config?.Labels ?? {} }
}
