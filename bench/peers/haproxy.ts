/** HAProxy as the yardstick of WebSockets: one thread, HTTP mode, kept upstream connections, no log, no inspection. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { findTool } from '../debian.ts'
import { accepts, type Cleanups, type Program } from '../program.ts'

/** `maxconn` is the gateway's limit of client connections; HAProxy refuses to start when the descriptors for it are not there. */
const config = (port: number, backendPort: number): string => `
global
  nbthread 1
  maxconn 9000
defaults
  mode http
  timeout connect 10s
  timeout client 600s
  timeout server 600s
  timeout tunnel 1h
  option forwardfor
frontend clients
  bind 127.0.0.1:${port} backlog 4096
  default_backend sandbox
backend sandbox
  server one 127.0.0.1:${backendPort}
`

export async function startHaproxy(port: number, backendPort: number, cleanups: Cleanups): Promise<Program> {
  const haproxy = await findTool('haproxy', 'haproxy')
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-haproxy-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const file = path.join(folder, 'haproxy.cfg')
  await writeFile(file, config(port, backendPort))
  // -db: stays in the foreground as one process.
  return cleanups.start(haproxy.file, ['-db', '-f', file], { env: haproxy.env, ready: accepts(port) })
}
