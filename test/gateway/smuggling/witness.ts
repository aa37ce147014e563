/** The sandbox behind a gateway under test: it keeps every byte of every connection and answers each whole request that it reads strictly. */
import type { Socket } from 'node:net'
import { startRaw, type TestServer } from '../support.ts'
import { readRequests, type SeenRequest } from '../strict-parser.ts'

export type Connection = {
  /** All that came, latin1; what follows a 101 stands in `tunnel`. */
  bytes: string
  /** How many of them make whole requests. */
  read: number
  tunnel: string | null
  open: boolean
}

export type Witness = TestServer & {
  readonly connections: Connection[]
  /** What is wrong with what came, ever. */
  readonly problems: string[]
  /** Whole requests since the last call, in the order they were complete. */
  take(): SeenRequest[]
  /** Connections with bytes that make no whole request, each of them once. */
  takeLoose(): Connection[]
}

/** @param answer the answer to a whole request: a 101 makes the connection a tunnel, `connection: close` ends it */
export async function startWitness(answer: (request: SeenRequest) => string): Promise<Witness> {
  const connections: Connection[] = []
  const problems: string[] = []
  const told = new Set<Connection>()
  let arrived: SeenRequest[] = []
  const server = await startRaw((socket) => {
    const connection: Connection = { bytes: '', read: 0, tunnel: null, open: true }
    connections.push(connection)
    socket.on('data', (chunk: Buffer) => {
      const text = chunk.toString('latin1')
      if (connection.tunnel !== null) connection.tunnel += text
      else {
        connection.bytes += text
        readOn(connection, socket)
      }
    })
    socket.on('end', () => socket.end())
    socket.on('close', () => (connection.open = false))
  })

  function readOn(connection: Connection, socket: Socket): void {
    while (connection.tunnel === null) {
      const seen = readRequests(connection.bytes.slice(connection.read), 1)
      if (seen.problems.length > 0) {
        problems.push(...seen.problems)
        socket.destroy()
      }
      const request = seen.complete[0]
      if (request === undefined) return
      arrived.push(request)
      connection.read = connection.bytes.length - seen.rest.length
      const text = answer(request)
      socket.write(text, 'latin1')
      if (text.startsWith('HTTP/1.1 101 ')) {
        connection.tunnel = seen.rest
        connection.bytes = connection.bytes.slice(0, connection.read)
      } else if (text.includes('\r\nconnection: close\r\n')) socket.end()
    }
  }

  return {
    ...server,
    connections,
    problems,
    take() {
      const taken = arrived
      arrived = []
      return taken
    },
    takeLoose() {
      const loose = connections.filter((connection) => connection.bytes.length > connection.read && !told.has(connection))
      for (const connection of loose) told.add(connection)
      return loose
    },
  }
}

/** Names what was asked, so that a client sees when it gets the answer of another request. */
export function echo({ method, target }: SeenRequest, ...fields: string[]): string {
  const body = `${method} ${target}`
  return `HTTP/1.1 200 OK\r\n${[`content-length: ${body.length}`, ...fields].join('\r\n')}\r\n\r\n${method === 'HEAD' ? '' : body}`
}
