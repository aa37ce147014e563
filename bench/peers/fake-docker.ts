/**
 * As much of the Docker Engine API as the lifecycle server uses, over a unix socket, with containers that are only written down: for what a
 * machine has no room for, five hundred of them. It answers at once and in the engine's own shape (API 1.41), tells events, and counts the calls.
 */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { labels } from '#policies/wire.ts'

type Container = { readonly id: string; readonly name: string; readonly image: string; readonly command: readonly string[]; readonly labels: Readonly<Record<string, string>>; readonly created: number; readonly network: string; state: 'created' | 'running'; address: string }
type Json = Readonly<Record<string, any>>

export class FakeDocker {
  readonly #containers = new Map<string, Container>()
  readonly #networks = new Map<string, Json>()
  readonly #listeners = new Set<ServerResponse>()
  readonly #server = createServer((request, response) => void this.#answer(request, response))
  #addresses = 1
  calls = 0

  /** @param path of the socket to make */
  async listen(path: string): Promise<void> {
    this.#server.listen(path)
    await once(this.#server, 'listening')
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections()
    this.#server.close()
    await once(this.#server, 'close')
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    this.calls++
    const url = new URL(request.url ?? '/', 'http://engine')
    let text = ''
    for await (const chunk of request.setEncoding('utf8')) text += chunk
    const [, kind = '', name = '', action = ''] = url.pathname.split('/')
    const found = this.#find(`${request.method} ${kind}`, decodeURIComponent(name), action, url.searchParams, text === '' ? {} : JSON.parse(text))
    if (found === 'events') {
      response.writeHead(200, { 'content-type': 'application/json' }).flushHeaders()
      this.#listeners.add(response.on('close', () => this.#listeners.delete(response)))
      return
    }
    const { status, body } = found
    response.writeHead(status, { 'content-type': 'application/json' }).end(body === null ? '' : JSON.stringify(body))
  }

  #find(asked: string, name: string, action: string, query: URLSearchParams, body: Json): 'events' | { status: number; body: unknown } {
    const ok = (value: unknown, status = 200) => ({ status, body: value })
    const missing = { status: 404, body: { message: `No such ${asked.split(' ')[1]}: ${name}` } }
    if (asked === 'GET events') return 'events'
    if (asked === 'GET info') return ok({ OSType: 'linux', Architecture: 'x86_64', NCPU: 2 })
    if (asked === 'GET images') return ok({ Id: 'sha256:0', Os: 'linux', Architecture: 'amd64' })
    if (asked === 'POST networks') return this.#networks.set(body['Name'], { Id: randomBytes(32).toString('hex'), Name: body['Name'], Driver: 'bridge', Options: body['Options'], Labels: body['Labels'], IPAM: { Config: [{ Subnet: '198.18.0.0/16' }] } }), ok({ Id: body['Name'] }, 201)
    if (asked === 'GET networks') return this.#networks.has(name) ? ok(this.#networks.get(name)) : missing
    if (asked === 'DELETE networks') return this.#networks.delete(name) ? ok(null, 204) : missing
    if (asked === 'GET containers' && name === 'json') return ok(this.#list(JSON.parse(query.get('filters') ?? '{}')))
    if (asked === 'POST containers' && name === 'create') return ok({ Id: this.#create(query.get('name') ?? '', body), Warnings: [] }, 201)
    const container = this.#containers.get(name)
    if (container === undefined) return missing
    if (asked === 'GET containers') return ok(inspected(container))
    if (asked === 'POST containers' && action === 'start') return this.#start(container), ok(null, 204)
    if (asked === 'DELETE containers') return this.#remove(container), ok(null, 204)
    return { status: 501, body: { message: `${asked} ${name} ${action} is not known here` } }
  }

  #create(name: string, body: Json): string {
    const id = randomBytes(32).toString('hex')
    this.#containers.set(id, { id, name, image: body['Image'], command: body['Cmd'] ?? [], labels: body['Labels'], created: Date.now(), network: body['HostConfig'].NetworkMode, state: 'created', address: '' })
    this.#tell('create', this.#containers.get(id)!)
    return id
  }

  #start(container: Container): void {
    this.#addresses++
    container.address = `198.18.${this.#addresses >> 8}.${this.#addresses & 255}`
    container.state = 'running'
    this.#tell('start', container)
  }

  #remove(container: Container): void {
    this.#containers.delete(container.id)
    this.#tell('die', container)
    this.#tell('destroy', container)
  }

  #list(filters: { readonly label?: readonly string[]; readonly network?: readonly string[] }): unknown[] {
    const fits = (container: Container): boolean => (filters.label ?? []).every((label) => {
      const [key = '', value] = label.split('=')
      return value === undefined ? key in container.labels : container.labels[key] === value
    }) && (filters.network ?? [container.network]).includes(container.network)
    return [...this.#containers.values()].filter(fits).map((container) => ({
      Id: container.id, Names: [`/${container.name}`], Image: container.image, Labels: container.labels, Created: Math.floor(container.created / 1000),
      State: container.state, Status: container.state === 'running' ? 'Up 2 seconds' : 'Created', Ports: [], Mounts: [], NetworkSettings: networks(container),
    }))
  }

  #tell(action: string, { id, name, image, labels: own }: Container): void {
    if (own[labels.instance] === undefined) return
    const line = `${JSON.stringify({ Type: 'container', Action: action, Actor: { ID: id, Attributes: { ...own, image, name } } })}\n`
    for (const listener of this.#listeners) listener.write(line)
  }
}

function inspected(container: Container): Json {
  const running = container.state === 'running'
  return { Id: container.id, Config: { Cmd: container.command }, State: { Status: container.state, Running: running, Paused: false, ExitCode: 0, StartedAt: new Date(container.created).toISOString() }, NetworkSettings: networks(container) }
}

function networks({ network, address }: Container): Json {
  return { Networks: { [network]: { IPAddress: address } } }
}
