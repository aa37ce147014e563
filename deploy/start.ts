/**
 * `npm start`: a lifecycle server and a gateway as two processes, until Ctrl-C. The first run writes `.sallyport/config.toml` with keys of its own;
 * later runs use it as it is, so it is the place to change things. `--state <folder>` keeps everything in another folder; `--prepare` writes
 * the files and starts nothing (for compose.yaml). Exit 0 after Ctrl-C, 64 for a wrong configuration; otherwise what the program that ended said.
 */
import { execa } from 'execa'
import { randomBytes } from 'node:crypto'
import { chmodSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { parse, stringify } from 'smol-toml'
import { wellKnownPorts } from '#policies/wire.ts'

const top = path.dirname(import.meta.dirname)
const readyTimeout = 60_000
/** Longer than the gateway lets running requests take at its shutdown. */
const endTimeout = 40_000

/** The part of the server's configuration that the gateway's command line follows from. */
type Settings = {
  server?: { host?: string; port?: number }
  ingress?: {
    route_token?: string
    gateway?: { address?: string; route?: { mode?: string } }
    secure_access?: { keys?: { key_id: string; key: string }[] }
  }
}

/** `code` is what start itself ends with when this program was the one that ended. */
type End = { text: string; code: number }
type Running = { name: string; ended: Promise<End>; stop(signal: NodeJS.Signals): void }
type Outcome = 'ready' | 'stopped' | End

process.exitCode = await main()

async function main(): Promise<number> {
  const { values } = parseArgs({ options: { state: { type: 'string', default: path.join(top, '.sallyport') }, prepare: { type: 'boolean', default: false } } })
  const configFile = ensureConfig(path.resolve(values.state))
  const settings = readSettings(configFile)
  if (settings === undefined) return 64
  const addresses = readAddresses(settings)
  const flags = () => gatewayFlags(path.dirname(configFile), settings, addresses)
  if (values.prepare) {
    flags()
    return 0
  }

  const stop = Promise.withResolvers<'stopped'>()
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stop.resolve('stopped'))
  const programs: Running[] = []
  const start = (name: string, args: readonly string[], readyUrl: string) => {
    programs.push(startProgram(name, args))
    return firstOf(programs, stop.promise, waitUntilReady(readyUrl))
  }
  let outcome = await start('server', ['server/main.ts', '--config', configFile], `${addresses.serverUrl}/health`)
  // Only now has the server looked at the whole configuration, and said what is wrong with it.
  if (outcome === 'ready') outcome = await start('gateway', ['gateway/main.ts', ...flags()], `${addresses.gatewayUrl}/status.ok`)
  if (outcome === 'ready') {
    printAddresses(configFile, addresses)
    outcome = await firstOf(programs, stop.promise)
  }

  const failure = typeof outcome === 'string' ? undefined : outcome
  if (failure !== undefined) console.error(`start: ${failure.text}${programs.length > 1 ? '; ending the other' : ''}`)
  await endAll(programs)
  return failure?.code ?? 0
}

/** What happens first: somebody wants to stop, a program ends, or (when asked for) `ready` settles. */
function firstOf(programs: readonly Running[], stopped: Promise<'stopped'>, ready?: Promise<void>): Promise<Outcome> {
  const isReady = ready?.then((): Outcome => 'ready', (error: Error): Outcome => ({ text: error.message, code: 1 }))
  return Promise.race([stopped, ...programs.map(({ ended }) => ended), ...(isReady === undefined ? [] : [isReady])])
}

/** The configuration file, made with random keys when there is none. Readable by its owner alone: it holds them. */
function ensureConfig(folder: string): string {
  const file = path.join(folder, 'config.toml')
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  if (existsSync(file)) return file
  const config = {
    server: { host: '127.0.0.1', port: wellKnownPorts.server, api_key: randomBytes(24).toString('base64url') },
    runtime: { type: 'docker' },
    docker: { network_mode: 'bridge' },
    egress: { image: 'sallyport/egress:local', mode: 'dns+nft' },
    ingress: {
      mode: 'gateway',
      route_token: randomBytes(24).toString('base64url'),
      gateway: { address: `*.sandbox.localhost:${wellKnownPorts.gateway}`, route: { mode: 'wildcard' } },
      secure_access: { active_key: 'a', keys: [{ key_id: 'a', key: randomBytes(32).toString('base64') }] },
    },
    store: { path: path.join(folder, 'sallyport.db') },
  }
  writeFileSync(file, `# Made by the first npm start. Holds secrets: keep it readable by its owner alone.\n${stringify(config)}`, { mode: 0o600, flag: 'wx' })
  console.log(`start: wrote ${path.relative(process.cwd(), file)} with new keys`)
  return file
}

function readSettings(file: string): Settings | undefined {
  try {
    return parse(readFileSync(file, 'utf8')) as Settings
  } catch (error) {
    console.error(`start: ${file}: ${(error as Error).message}`)
    return undefined
  }
}

function readAddresses({ server, ingress }: Settings) {
  // Not yet checked by the server: it may be anything.
  const address = String(ingress?.gateway?.address ?? '')
  const gateway = /^(?:\*\.)?([^/:]+)(?::(\d+))?/.exec(address)
  const serverHost = server?.host === undefined || server.host === '0.0.0.0' ? '127.0.0.1' : server.host
  const gatewayPort = Number(gateway?.[2] ?? wellKnownPorts.gateway)
  return {
    serverUrl: `http://${serverHost}:${server?.port ?? wellKnownPorts.server}`,
    gatewayUrl: `http://127.0.0.1:${gatewayPort}`,
    gatewayPort,
    baseDomain: address.startsWith('*.') ? gateway?.[1] : undefined,
  }
}

type Addresses = ReturnType<typeof readAddresses>

/** Secrets go by files that only we can read: every process of the machine can read a command line. */
function gatewayFlags(folder: string, { ingress }: Settings, { serverUrl, gatewayPort, baseDomain }: Addresses): string[] {
  const flags = ['--host', '127.0.0.1', '--port', String(gatewayPort), '--mode', 'auto', '--provider', 'server', '--server-url', serverUrl]
  if (baseDomain !== undefined) flags.push('--base-domain', baseDomain)
  flags.push('--server-token-file', writeSecret(path.join(folder, 'route-token'), ingress?.route_token ?? ''))
  const keys = ingress?.secure_access?.keys ?? []
  if (keys.length > 0) flags.push('--secure-access-keys-file', writeSecret(path.join(folder, 'access-keys'), keys.map(({ key_id, key }) => `${key_id}=${key}`).join(',')))
  return flags
}

function writeSecret(file: string, text: string): string {
  writeFileSync(file, `${text}\n`, { mode: 0o600 })
  chmodSync(file, 0o600)
  return file
}

/** In a process group of its own: Ctrl-C reaches us alone, and we end both in order. */
function startProgram(name: string, args: readonly string[]): Running {
  const child = execa(process.execPath, args, { cwd: top, stdio: ['ignore', 'inherit', 'inherit'], buffer: false, reject: false, detached: true, cleanup: true })
  const ended = child.then(({ exitCode, signal, originalMessage }) => ({
    text: `the ${name} ended with ${signal ?? (exitCode === undefined ? originalMessage : `exit ${exitCode}`)}`,
    // Its own code says more than ours: 64 for the configuration, 69 for something missing. Nothing asked it to end, so 0 is no success.
    code: exitCode || 1,
  }))
  return { name, ended, stop: (signal) => child.kill(signal) }
}

async function waitUntilReady(url: string): Promise<void> {
  for (const deadline = Date.now() + readyTimeout; Date.now() < deadline; await delay(100, undefined, { ref: false })) if ((await statusOf(url)) === 200) return
  throw new Error(`${url} did not answer 200 within ${readyTimeout / 1000} s`)
}

function statusOf(url: string): Promise<number | undefined> {
  if (!URL.canParse(url)) return Promise.resolve(undefined)
  return new Promise((resolve) => {
    const call = request(url, { timeout: 2000 }, (response) => {
      response.resume()
      resolve(response.statusCode)
    })
    call.once('timeout', () => call.destroy())
    call.once('error', () => resolve(undefined))
    call.end()
  })
}

function printAddresses(configFile: string, { serverUrl, gatewayUrl, baseDomain, gatewayPort }: Addresses): void {
  const file = path.relative(process.cwd(), configFile)
  console.log(`
  server   ${serverUrl}
  gateway  ${gatewayUrl}${baseDomain === undefined ? '' : `, sandboxes at http://<id>-<port>.${baseDomain}:${gatewayPort}/`}
  config   ${file} (API key: server.api_key)

  KEY=$(sed -n 's/^api_key = "\\(.*\\)"$/\\1/p' ${file})
  curl -H "OPEN-SANDBOX-API-KEY: $KEY" -H 'content-type: application/json' ${serverUrl}/v1/sandboxes \\
    -d '{"image":{"uri":"sallyport/sandbox:local"},"entrypoint":["node","/opt/sallyport/app.mjs"],"timeout":600,"resourceLimits":{},"networkPolicy":{"defaultAction":"deny","egress":[{"action":"allow","target":"example.com"}]}}'
  curl -H "OPEN-SANDBOX-API-KEY: $KEY" ${serverUrl}/v1/sandboxes/<id>/endpoints/8080

  Ctrl-C ends both. Sandboxes go on until their time is up.
`)
}

/** Asks all to end, and kills what does not. */
async function endAll(programs: readonly Running[]): Promise<void> {
  for (const program of programs) program.stop('SIGTERM')
  const timer = setTimeout(() => programs.forEach((program) => program.stop('SIGKILL')), endTimeout)
  await Promise.all(programs.map(({ ended }) => ended))
  clearTimeout(timer)
}
