/** The program as a user starts it: flags, exit codes, reloads, signals, workers. */
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { mintAccessToken, parseAccessKeys, signShort } from '#policies/access.ts'
import { wholeSandbox } from '#policies/access-token.ts'
import { freePort } from '#test/support/program.ts'
import { listening, main, start, startAs, startWith } from './program.ts'
import { ask, bodyOf, eventually, get, RawClient, startHttp, startRaw, statusOf } from './support.ts'

const folder = mkdtempSync(join(tmpdir(), 'gateway-program-'))
t.teardown(() => rmSync(folder, { recursive: true }))

function routesFile(name: string, sandboxes: unknown[]): string {
  const path = join(folder, name)
  writeFileSync(path, JSON.stringify({ sandboxes }))
  return path
}

/** For each socket that listens on the port, those of the processes that hold it. */
function holders(port: number, pids: readonly number[]): number[][] {
  const targetOf = (path: string): string => {
    try {
      return readlinkSync(path)
    } catch {
      // Closed since it was listed.
      return ''
    }
  }
  const socketsOf = (pid: number): string[] => readdirSync(`/proc/${pid}/fd`).map((fd) => targetOf(`/proc/${pid}/fd/${fd}`))
  const sockets = pids.map((pid) => [pid, new Set(socketsOf(pid))] as const)
  const lines = ['/proc/net/tcp', '/proc/net/tcp6'].flatMap((path) => readFileSync(path, 'utf8').split('\n').map((line) => line.trim().split(/\s+/)))
  // The second field is the local address, the fourth the state (0A: listens), the tenth the inode.
  const listening = lines.filter(([, local = '', , state]) => state === '0A' && Number.parseInt(local.split(':')[1] ?? '', 16) === port)
  return listening.map((fields) => sockets.filter(([, held]) => held.has(`socket:[${fields[9]}]`)).map(([pid]) => pid))
}

t.test('a wrong configuration: every problem, exit 64, no port', async (t) => {
  await using program = start('--port', '70000', '--mode', 'nonsense', '--nope', '--provider', 'static')
  t.equal(await program.code, 64)
  for (const part of ['--port', '--mode', '--nope']) t.match(program.output(), part)
  await using broken = start('--port', '0', '--provider', 'static', '--routes', routesFile('broken.json', [{ id: 'a' }, { id: 'a', host: 'h' }]))
  t.equal(await broken.code, 64)
  t.match(broken.output(), 'sandboxes[0].host')
  await using keyless = start('--port', '0', '--provider', 'static', '--routes', routesFile('empty.json', []), '--secure-access-keys-file', join(folder, 'missing'))
  t.equal(await keyless.code, 64)
  t.notMatch(keyless.output(), 'listening')
})

t.test('problems of the command line, the environment and a file are reported together, before the port is opened', async (t) => {
  const wrong = join(folder, 'wrong.toml')
  writeFileSync(wrong, 'nonsense = 1\nheader_timeout = "soon"\n')
  // Whoever tried to open this port would say so, and exit with 69.
  await using taken = await startRaw(() => undefined)
  const argv = ['--nope', '--mode=nonsense', '--provider=static', `--routes=${routesFile('none.json', [])}`, `--config=${wrong}`, '--host=127.0.0.1', `--port=${taken.port}`]
  await using program = startAs([process.execPath, main, ...argv], { SALLYPORT_GATEWAY_WORKERS: 'two', SALLYPORT_GATEWAY_SERVER_TOKEN_FILE: '/nowhere' })
  t.equal(await program.code, 64)
  const paths = program.output().trimEnd().split('\n').map((line) => /^gateway: (.*?): /.exec(line)?.[1])
  t.same(paths.sort(), ['--header-timeout', '--mode', '--nope', '--workers', 'SALLYPORT_GATEWAY_SERVER_TOKEN_FILE', wrong].sort(), program.output())
})

t.test("the arguments of the original's chart alone: one line says what is missing, exit 64", async (t) => {
  const chart = ['--namespace=opensandbox', '--port=0', '--provider-type=batchsandbox', '--mode=header', '--log-level=info', '--secure-access-keys=a=c2VjcmV0LWE=']
  await using program = start(...chart)
  t.equal(await program.code, 64)
  t.match(program.output(), /^gateway: --provider: is required.*\n$/)
})

t.test("the original's arguments start it, a file reload changes routes and keys, SIGTERM ends it", async (t) => {
  await using upstream = await startHttp((request, response) => response.end(`app ${request.url}`))
  const routes = routesFile('routes.json', [{ id: 'a', host: '127.0.0.1' }])
  const keys = join(folder, 'keys')
  writeFileSync(keys, 'a=c2VjcmV0LWE=\n')
  await using program = start('--namespace=opensandbox', '--port=0', '--provider-type=batchsandbox', '--mode=header', '--log-level=info', '--provider=static', `--routes=${routes}`, '--allow-loopback-upstreams', `--secure-access-keys-file=${keys}`)
  const port = await listening(program)
  t.equal(bodyOf(await ask(port, get('/x', `OpenSandbox-Ingress-To: a-${upstream.port}`))), 'app /x')
  routesFile('routes.json', [{ id: 'b', host: '127.0.0.1', secureAccessToken: 'tok' }])
  let status = 200
  const until = Date.now() + 5_000
  while (status !== 404 && Date.now() < until) status = statusOf(await ask(port, get('/x', `OpenSandbox-Ingress-To: a-${upstream.port}`)))
  t.equal(status, 404, 'the removed sandbox is gone')
  writeFileSync(keys, 'a=c2VjcmV0LWE=\nb=c2VjcmV0LWI=\n')
  const parsed = parseAccessKeys('b=c2VjcmV0LWI=')
  const signature = signShort('b', parsed.ok ? (parsed.keys.get('b') as Uint8Array) : new Uint8Array(), 'b', upstream.port, 'x2qxvk')
  while (status !== 200 && Date.now() < until + 5_000) {
    status = statusOf(await ask(port, get('/x', `OpenSandbox-Ingress-To: b-${upstream.port}-x2qxvk-${signature}`)))
    if (status !== 200) await new Promise((resolve) => setTimeout(resolve, 300))
  }
  t.equal(status, 200, 'the new key is known')
  program.child.kill('SIGTERM')
  t.equal(await program.code, 0)
  const lines = program.output().trim().split('\n').map((line) => JSON.parse(line) as { msg: string; path?: string; sandbox_id?: string })
  // Log and access lines share one descriptor: on a full pipe a line may be written a moment later than the next.
  t.ok(lines.some((line) => line.msg === 'closed'), 'it says so')
  t.ok(lines.some((line) => line.msg === 'request' && line.sandbox_id === 'a' && line.path === '/x'), 'access lines are flushed')
  t.notMatch(program.output(), signature)
})

t.test('a key that is withdrawn takes what it signed with it', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('in'))
  const keys = join(folder, 'withdrawn')
  writeFileSync(keys, 'a=c2VjcmV0LWE=\nb=c2VjcmV0LWI=\n')
  await using program = start('--port=0', '--mode=uri', '--provider=static', `--routes=${routesFile('secured.json', [{ id: 'sec', host: '127.0.0.1', secureAccessToken: 'tok' }])}`, '--allow-loopback-upstreams', `--secure-access-keys-file=${keys}`, '--auth-failures-per-minute=0')
  const port = await listening(program)
  const proofs = (keyId: 'a' | 'b'): string[] => {
    const secret = Buffer.from(`secret-${keyId}`)
    const token = mintAccessToken({ id: 'sec', port: upstream.port, epoch: 0, scope: wholeSandbox, keyId, secret, expires: 4_000_000_000n })
    return [`/sec/${upstream.port}/x2qxvk/${signShort(keyId, secret, 'sec', upstream.port, 'x2qxvk')}/`, `/sec/${upstream.port}/${token}/`]
  }
  const statuses = (keyId: 'a' | 'b'): Promise<number[]> => Promise.all(proofs(keyId).map(async (target) => statusOf(await ask(port, get(target)))))
  // Twice: what was found good once is remembered.
  for (const time of ['first', 'second']) t.same([await statuses('a'), await statuses('b')], [[200, 200], [200, 200]], `both keys, the ${time} time`)
  writeFileSync(keys, 'b=c2VjcmV0LWI=\n')
  let seen = await statuses('a')
  for (const until = Date.now() + 10_000; seen.includes(200) && Date.now() < until; seen = await statuses('a')) await new Promise((resolve) => setTimeout(resolve, 100))
  t.same(seen, [401, 401], 'short signature and strong token')
  t.same(await statuses('b'), [200, 200], 'the other key goes on')
})

t.test('log levels, by the names of the original', async (t) => {
  for (const [level, told] of [['warning', ['warn']], ['warn', ['warn']], ['info', ['warn', 'info']], ['loud', ['warn', 'info']], ['error', []]] as const) {
    const port = await freePort()
    // A flag without effect is worth a warning; that it listens is worth an info.
    await using program = start('--namespace=opensandbox', `--log-level=${level}`, `--port=${port}`, '--host=127.0.0.1', '--access-log=off', '--provider=static', `--routes=${routesFile('none.json', [])}`)
    const answers = async (): Promise<boolean> => (await ask(port, get('/status.ok')).catch(() => '')).startsWith('HTTP/1.1 200')
    for (const until = Date.now() + 15_000; !(await answers()) && Date.now() < until; ) await new Promise((resolve) => setTimeout(resolve, 50))
    program.child.kill('SIGTERM')
    t.equal(await program.code, 0, level)
    t.same([...new Set(program.output().split('\n').filter((line) => line !== '').map((line) => (JSON.parse(line) as { level: string }).level))], told, `--log-level=${level}`)
  }
})

t.test('metrics on a listener of their own, access lines in a file', async (t) => {
  const reserved = await startRaw(() => undefined)
  const adminPort = reserved.port
  await reserved[Symbol.asyncDispose]()
  const log = join(folder, 'logs', 'access.log')
  await using program = start('--port=0', '--provider=static', `--routes=${routesFile('none.json', [])}`, `--admin-port=${adminPort}`, `--access-log=${log}`)
  const port = await listening(program)
  await ask(port, get('/nobody-80', 'OpenSandbox-Ingress-To: nobody-80'))
  const metrics = await fetch(`http://127.0.0.1:${adminPort}/metrics`)
  t.match(await metrics.text(), /ingress_http_request_count\{method="GET",status_code="404",proxy_type="http"\} 1/)
  t.equal((await fetch(`http://127.0.0.1:${adminPort}/`)).status, 404)
  t.equal((await fetch(`http://127.0.0.1:${adminPort}/metrics`, { method: 'POST' })).status, 404)
  t.equal(await (await fetch(`http://127.0.0.1:${adminPort}/readyz`)).text(), 'OK')
  program.child.kill('SIGTERM')
  t.equal(await program.code, 0)
  t.match(readFileSync(log, 'utf8'), /"code":"EDGE_NO_ROUTE"/)
})

t.test('two workers share the port, and are one gateway to who asks the admin listener', { timeout: 90_000 }, async (t) => {
  let answer: () => void = () => undefined
  await using upstream = await startHttp((_request, response) => {
    response.write('begun ')
    answer = () => void response.end('done')
  })
  const reserved = await Promise.all([startRaw(() => undefined), startRaw(() => undefined)])
  const [port, adminPort] = reserved.map((server) => server.port) as [number, number]
  for (const server of reserved) await server[Symbol.asyncDispose]()
  await using program = start(`--port=${port}`, '--workers=2', `--admin-port=${adminPort}`, '--mode=uri', '--allow-loopback-upstreams', '--provider=static', `--routes=${routesFile('two.json', [{ id: 'a', host: '127.0.0.1' }])}`)
  const pids = (): number[] => program.output().split('\n').filter((line) => line.includes('"msg":"listening"')).map((line) => (JSON.parse(line) as { pid: number }).pid)
  const ready = async (): Promise<string> => (await fetch(`http://127.0.0.1:${adminPort}/readyz`)).text()
  const readyEventually = async (wanted: RegExp): Promise<void> => {
    for (const until = Date.now() + 20_000; Date.now() < until; ) if (wanted.test(await ready())) return
    throw new Error(`never ${wanted}: ${await ready()}`)
  }
  /** Asked until every worker had the time to answer. @returns the lines that were not there in the end */
  const missing = async (...wanted: string[]): Promise<string[]> => {
    for (const until = Date.now() + 20_000; ; ) {
      const lines = (await (await fetch(`http://127.0.0.1:${adminPort}/metrics`)).text()).split('\n')
      const absent = wanted.filter((line) => !lines.includes(line))
      if (absent.length === 0 || Date.now() > until) return absent
    }
  }
  const refused = (times: number): string => `sallyport_gateway_refused_count{code="EDGE_NO_ROUTE"} ${times}`
  const refuse = async (times: number): Promise<void> => {
    for (let i = 0; i < times; i++) t.equal(statusOf(await ask(port, get('/nobody/80/'))), 404)
  }
  await eventually(() => pids().length === 2, 'both', 15_000)
  await readyEventually(/^OK$/)
  const apart = (alive: number[]): void => t.same(holders(port, [program.child.pid as number, ...alive]).sort(), alive.map((pid) => [pid]).sort(), 'each worker has a socket of its own for the port') as unknown as void
  apart(pids())
  await refuse(40)
  t.same(await missing(refused(40), 'sallyport_gateway_workers 2', 'sallyport_gateway_routes 1', 'ingress_http_request_duration_seconds_count{method="GET",proxy_type="http"} 40', '# TYPE ingress_http_request_duration_seconds histogram'), [], 'the kernel spread them, and they are counted together')
  process.kill(pids()[0] as number, 'SIGSTOP')
  await readyEventually(/^1 of 2 workers ready/)
  t.same(await missing(refused(40), 'sallyport_gateway_workers 1'), [], 'and what it said last counts')
  process.kill(pids()[0] as number, 'SIGKILL')
  await eventually(() => pids().length === 3, 'a new worker', 15_000)
  await readyEventually(/^OK$/)
  t.same(await missing(refused(40), 'sallyport_gateway_workers 2'), [], 'what the dead one counted stays')
  apart(pids().slice(1))
  await refuse(5)
  t.same(await missing(refused(45)), [])

  const running = new RawClient(port).send(get(`/a/${upstream.port}/`))
  await running.until((client) => client.received.includes('begun'))
  program.child.kill('SIGTERM')
  await readyEventually(/^draining/)
  answer()
  t.match(await running.untilClosed(), 'done', 'what runs may end')
  running.close()
  t.equal(await program.code, 0)
  t.equal(await ask(port, get('/status.ok')), '', 'nobody listens any more')
})

t.test('few descriptors: refused with 503 beyond them, and back to work after', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('ok'))
  await using program = startWith(300, '--port=0', '--mode=uri', '--provider=static', `--routes=${routesFile('few.json', [{ id: 'a', host: '127.0.0.1' }])}`, '--allow-loopback-upstreams')
  const port = await listening(program)
  t.match(program.output(), 'ulimit')
  const target = get(`/a/${upstream.port}/`)
  t.equal(statusOf(await ask(port, target)), 200)
  const idle = Array.from({ length: 55 }, () => connect(port, '127.0.0.1').on('error', () => undefined))
  await eventually(() => idle.every((socket) => !socket.connecting), 'connected')
  t.equal(statusOf(await ask(port, target)), 503)
  const flood = Array.from({ length: 400 }, () => connect(port, '127.0.0.1').on('error', () => undefined))
  await eventually(() => flood.every((socket) => !socket.connecting), 'tried')
  t.equal(program.child.exitCode, null, 'nothing crashes')
  for (const socket of [...idle, ...flood]) socket.destroy()
  let status = 0
  for (const until = Date.now() + 5_000; status !== 200 && Date.now() < until; ) status = statusOf(await ask(port, target).catch(() => ''))
  t.equal(status, 200, 'back to work')
})
