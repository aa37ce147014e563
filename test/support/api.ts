/** A small client of the lifecycle API, as plain as an SDK's transport: JSON in, status and JSON out. */
import { request, type Dispatcher } from 'undici'
import { headerNames } from '#policies/wire.ts'

export type SandboxBody = {
  readonly id: string
  readonly status: { readonly state: string; readonly reason?: string; readonly message?: string }
  readonly metadata?: Record<string, string>
  readonly expiresAt?: string
  readonly createdAt: string
  readonly entrypoint?: readonly string[]
}
export type Endpoint = { readonly endpoint: string; readonly headers?: Record<string, string> }
export type Reply<T> = { readonly status: number; readonly headers: Record<string, string | string[] | undefined>; readonly body: T }
export type ErrorBody = { readonly code: string; readonly message: string }

export interface Api {
  readonly url: string
  call<T>(method: string, path: string, body?: unknown, headers?: Record<string, string>): Promise<Reply<T>>
  list(): Promise<SandboxBody[]>
  /** undefined when there is none of that id. */
  get(id: string): Promise<SandboxBody | undefined>
  endpoint(id: string, port: number): Promise<Endpoint>
}

export function createApi(url: string, key: string): Api {
  const call = async <T>(method: string, path: string, body?: unknown, headers: Record<string, string> = {}): Promise<Reply<T>> => {
    const json = body === undefined ? {} : { 'content-type': 'application/json' }
    const answer = await request(`${url}${path}`, {
      method: method as Dispatcher.HttpMethod,
      headers: { [headerNames.apiKey]: key, ...json, ...headers },
      body: body === undefined ? null : JSON.stringify(body),
      headersTimeout: 60_000,
      bodyTimeout: 60_000,
    })
    const text = await answer.body.text()
    return { status: answer.statusCode, headers: answer.headers, body: readBody(text) as T }
  }
  const wanted = async <T>(status: number, method: string, path: string): Promise<T> => {
    const reply = await call<T>(method, path)
    if (reply.status !== status) throw new Error(`${method} ${path} answered ${reply.status}: ${JSON.stringify(reply.body)}`)
    return reply.body
  }
  return {
    url,
    call,
    list: async () => (await wanted<{ items: SandboxBody[] }>(200, 'GET', '/v1/sandboxes?pageSize=200')).items,
    async get(id) {
      const reply = await call<SandboxBody>('GET', `/v1/sandboxes/${id}`)
      if (reply.status === 404) return undefined
      if (reply.status !== 200) throw new Error(`GET of a sandbox answered ${reply.status}: ${JSON.stringify(reply.body)}`)
      return reply.body
    },
    endpoint: (id, port) => wanted<Endpoint>(200, 'GET', `/v1/sandboxes/${id}/endpoints/${port}`),
  }
}

function readBody(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}
