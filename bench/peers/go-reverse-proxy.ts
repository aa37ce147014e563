/** Go's httputil.ReverseProxy as a yardstick, compiled once by Debian's Go, without a network and without a C compiler. */
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdtemp, readFile, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { cache, findTool } from '../debian.ts'
import { accepts, runCommand, type Cleanups, type Program } from '../program.ts'

const source = path.join(import.meta.dirname, 'reverse-proxy.go')
/** ms; the standard library's network part is compiled, too. */
const timeout = 240_000

/** One processor, as the others have: with more its collector works beside the requests. */
export async function startGoReverseProxy(port: number, backendPort: number, cleanups: Cleanups): Promise<Program> {
  return cleanups.start(await compile(), [String(port), String(backendPort)], { env: { GOMAXPROCS: '1' }, ready: accepts(port) })
}

async function compile(): Promise<string> {
  const digest = createHash('sha256').update(await readFile(source)).digest('hex').slice(0, 16)
  const program = path.join(cache, `go-reverse-proxy-${digest}`)
  if (existsSync(program)) return program
  const go = await findTool('go', 'golang-go')
  const work = await mkdtemp(path.join(tmpdir(), 'sp-bench-go-'))
  try {
    const env = { ...go.env, HOME: work, GOCACHE: path.join(work, 'cache'), GOPATH: path.join(work, 'path'), GOENV: 'off', GOFLAGS: '', GOPROXY: 'off', GO111MODULE: 'off', CGO_ENABLED: '0' }
    await runCommand(go.file, ['build', '-o', `${program}.new`, source], { env, timeout })
    await rename(`${program}.new`, program)
  } finally {
    await rm(work, { recursive: true, force: true })
  }
  return program
}
