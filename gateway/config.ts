/** The gateway's configuration: flags (the original's names included), environment and a file, checked as a whole. */
import { readFileSync } from 'node:fs'
import { isIP } from 'node:net'
import { parse as parseToml } from 'smol-toml'
import * as Type from 'typebox'
import type { Static } from 'typebox'
import { parseAccessKeys } from '#policies/access.ts'
import { readNetwork } from '#policies/address.ts'
import { checkConfig, ConfigError } from '#policies/config.ts'
import { isHostName, normaliseName } from '#policies/host.ts'
import type { Problem } from '#policies/problem.ts'
import { wellKnownPorts } from '#policies/wire.ts'

const milliseconds = (value: number, description: string) => Type.Integer({ minimum: 0, maximum: 86_400_000, default: value, description: `${description} (ms)` })
/** Off would mean: for ever. */
const someMilliseconds = (value: number, description: string) => Type.Integer({ minimum: 1, maximum: 86_400_000, default: value, description: `${description} (ms)` })
const count = (value: number, description: string) => Type.Integer({ minimum: 0, default: value, description })
const text = (value: string, description: string) => Type.String({ default: value, description })

/** One key per option: the flag is its name in kebab case, the environment variable SALLYPORT_GATEWAY_ and its name in upper case. */
export const GatewayConfigSchema = Type.Object({
  port: Type.Integer({ minimum: 0, maximum: 65_535, default: wellKnownPorts.gateway, description: 'listen port' }),
  host: text('', 'listen address; empty: all, IPv4 and IPv6'),
  mode: Type.Union([Type.Literal('header'), Type.Literal('wildcard'), Type.Literal('uri'), Type.Literal('auto')], { default: 'header', description: 'what names the sandbox: routing header or Host (`header`, `wildcard`), the path (`uri`), or all in that order (`auto`)' }),
  baseDomain: text('', 'only hosts below this domain name a sandbox; empty: any'),
  provider: Type.Union([Type.Literal('static'), Type.Literal('server')], { description: 'where routes come from' }),
  routes: text('', 'routes file of the static provider, read again when it changes'),
  serverUrl: text('', 'lifecycle server of the server provider'),
  serverToken: text('', 'its route token'),
  secureAccessKeys: text('', 'keys of signed routes: `a=<base64>,b=<base64>`'),
  secureAccessKeysFile: text('', 'the same from a file, read again when it changes'),
  hideMissing: Type.Boolean({ default: false, description: 'answer unknown sandboxes like refused access' }),
  uriCookies: Type.Boolean({ default: false, description: 'let a browser enter by cookie in URI mode, where all sandboxes share one origin' }),
  authFailuresPerMinute: count(30, 'refused proofs per client and minute; 0: no limit'),
  allowLoopbackUpstreams: Type.Boolean({ default: false, description: "dial loopback and this host's own addresses" }),
  trustedProxies: Type.Array(Type.String(), { default: [], description: 'networks whose X-Forwarded headers are believed, comma-separated' }),
  preserveHost: Type.Boolean({ default: false, description: "send the client's Host to the sandbox" }),
  workers: Type.Integer({ minimum: 1, maximum: 256, default: 1, description: 'processes that share the port' }),
  adminPort: Type.Integer({ minimum: -1, maximum: 65_535, default: -1, description: 'port for /metrics and /readyz; -1: none' }),
  adminHost: text('127.0.0.1', 'its address'),
  accessLog: text('stdout', '`stdout`, `stderr`, `off` or a file'),
  logLevel: text('info', 'debug, info, warn (or warning), error or fatal; anything else is info'),
  headerTimeout: someMilliseconds(30_000, 'until a request head must be complete'),
  keepAliveTimeout: milliseconds(75_000, 'how long a client connection may idle between requests'),
  connectTimeout: someMilliseconds(10_000, 'until a sandbox must accept a connection'),
  firstByteTimeout: milliseconds(600_000, 'until a sandbox must begin to answer; 0: no limit'),
  idleTimeout: milliseconds(600_000, 'silence after which an exchange is broken off, event streams excepted, and upgrades where neither side waits for the other; 0: no limit'),
  bootGrace: milliseconds(1_000, 'how long a refused connection to a port that never answered is tried again'),
  drainTimeout: milliseconds(30_000, 'until running requests are broken off at shutdown'),
  renewInterval: milliseconds(60_000, 'how often the lifecycle server is told that a sandbox with renew-on-access is used; 0: never'),
  maxHeaderBytes: Type.Integer({ minimum: 1_024, maximum: 1_048_576, default: 65_536, description: 'largest head of a request, bytes' }),
  maxConnections: Type.Integer({ minimum: 1, default: 9_000, description: 'client connections, and requests at once, beyond which requests are answered with 503' }),
  maxRequestsPerPort: Type.Integer({ minimum: 1, default: 1_024, description: 'requests at once to one port of one sandbox' }),
  maxUpgradesPerSandbox: Type.Integer({ minimum: 1, default: 10_000, description: 'upgraded connections per sandbox' }),
  maxUpgradesPerClient: Type.Integer({ minimum: 1, default: 10_000, description: 'upgraded connections per client (an IPv6 client is a /64)' }),
  maxMessageBytes: count(0, 'largest WebSocket message of a client, bytes as sent, all its frames together; 0: no limit'),
})
export type GatewayConfig = Static<typeof GatewayConfigSchema>

/** Options whose value must not stand on a command line. Each can be given by a file: `--server-token-file`. */
const secrets = new Set(['serverToken', 'secureAccessKeys'])
/** Flags of the original that mean nothing here. Accepted so that its manifests work unchanged. */
const ignored = new Set(['namespace', 'provider-type', 'secure-access-enabled', 'kubeconfig', 'renew-intent-enabled', 'renew-intent-redis-dsn', 'renew-intent-queue-key', 'renew-intent-queue-max-len', 'renew-intent-min-interval'])

export type ReadConfig = { readonly config: GatewayConfig; readonly warnings: readonly string[] }

/**
 * Flags win over the environment, which wins over the file of `--config`.
 * @param argv Go's flag syntax: `-x v`, `--x v`, `--x=v`; a boolean may stand alone
 * @throws ConfigError with every problem at once
 */
export function readGatewayConfig(argv: readonly string[], env: Readonly<Record<string, string | undefined>>): ReadConfig {
  const problems: Problem[] = []
  const warnings: string[] = []
  const flags = readFlags(argv, problems, warnings)
  const raw: Record<string, unknown> = { ...readFile(flags.get('config') ?? env['SALLYPORT_GATEWAY_CONFIG'], problems), ...readEnvironment(env, problems), ...flagValues(flags, problems) }
  if (typeof raw['trustedProxies'] === 'string') raw['trustedProxies'] = raw['trustedProxies'].split(',').map((part) => part.trim()).filter((part) => part !== '')
  const { config, sound } = checkOptions(raw, problems)
  problems.push(...contradictions(sound))
  if (problems.length > 0 || config === null) throw new ConfigError(problems)
  return { config, warnings }
}

/** @returns config: null when an option does not fit; sound: those that do, defaults filled in */
function checkOptions(raw: Record<string, unknown>, problems: Problem[]): { config: GatewayConfig | null; sound: Partial<GatewayConfig> } {
  try {
    const config = checkConfig(GatewayConfigSchema, raw)
    return { config, sound: config }
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    problems.push(...error.problems.map(({ path, reason }) => ({ path: `--${kebab(path)}`, reason })))
    const unfit = error.problems.map(({ path }) => path.replace(/[.[].*$/, '') as keyof GatewayConfig)
    return { config: null, sound: checkConfig(Type.Omit(GatewayConfigSchema, unfit), raw) }
  }
}

function readFlags(argv: readonly string[], problems: Problem[], warnings: string[]): Map<string, string> {
  const flags = new Map<string, string>()
  for (let i = 0; i < argv.length; i++) {
    const argument = argv[i] as string
    const match = /^--?([A-Za-z][A-Za-z0-9-]*)(?:=([\s\S]*))?$/.exec(argument)
    if (match === null) {
      problems.push({ path: argument, reason: 'is not a flag' })
      continue
    }
    const name = match[1] as string
    const next = argv[i + 1]
    let value = match[2]
    if (!ignored.has(name) && !isKnown(name)) {
      problems.push({ path: `--${name}`, reason: 'is not a known flag' })
      // What follows is its value as likely as not.
      if (value === undefined && next !== undefined && !next.startsWith('-')) i++
      continue
    }
    if (value === undefined) {
      if (isBoolean(name)) value = next === 'true' || next === 'false' ? (i++, next) : 'true'
      else if (next === undefined) problems.push({ path: `--${name}`, reason: 'needs a value' })
      else value = (i++, next)
    }
    if (ignored.has(name)) warnings.push(`--${name} is accepted for compatibility and has no effect`)
    else if (value !== undefined) {
      if (secrets.has(camel(name))) warnings.push(`--${name}: a secret on the command line is readable by every process; use --${name}-file`)
      flags.set(name, value)
    }
  }
  return flags
}

function isKnown(name: string): boolean {
  const key = camel(name)
  return name === 'config' || Object.hasOwn(GatewayConfigSchema.properties, key) || (key.endsWith('File') && secrets.has(key.slice(0, -4)))
}

function isBoolean(name: string): boolean {
  const schema = GatewayConfigSchema.properties[camel(name) as keyof GatewayConfig] as { type?: string } | undefined
  return schema?.type === 'boolean' || name === 'renew-intent-enabled' || name === 'secure-access-enabled'
}

function flagValues(flags: ReadonlyMap<string, string>, problems: Problem[]): Record<string, unknown> {
  const values: Record<string, unknown> = {}
  for (const [name, value] of flags) if (name !== 'config') setOption(values, camel(name), value, `--${name}`, problems)
  return values
}

function readEnvironment(env: Readonly<Record<string, string | undefined>>, problems: Problem[]): Record<string, unknown> {
  const values: Record<string, unknown> = {}
  for (const key of [...Object.keys(GatewayConfigSchema.properties), ...[...secrets].map((name) => `${name}File`)]) {
    const name = `SALLYPORT_GATEWAY_${kebab(key).replaceAll('-', '_').toUpperCase()}`
    const value = env[name]
    // Kubernetes tells every pod of a Service named `sallyport-gateway` in this way, unasked.
    const told = key === 'port' && value?.startsWith('tcp://')
    if (value !== undefined && value !== '' && !told) setOption(values, key, value, name, problems)
  }
  return values
}

/** Sets one option; a `…File` of a secret that is not an option of its own is read at once. */
function setOption(values: Record<string, unknown>, key: string, value: string, where: string, problems: Problem[]): void {
  if (Object.hasOwn(GatewayConfigSchema.properties, key)) {
    values[key] = value
    return
  }
  try {
    values[key.slice(0, -4)] = readFileSync(value, 'utf8').trim()
  } catch (error) {
    problems.push({ path: where, reason: `cannot be read: ${(error as NodeJS.ErrnoException).code}` })
  }
}

function readFile(path: string | undefined, problems: Problem[]): Record<string, unknown> {
  if (path === undefined) return {}
  try {
    const values: Record<string, unknown> = {}
    for (const [name, value] of Object.entries(parseToml(readFileSync(path, 'utf8')))) {
      const key = camel(name.replaceAll('_', '-'))
      if (Object.hasOwn(GatewayConfigSchema.properties, key)) values[key] = value
      else problems.push({ path: `${path}: ${name}`, reason: 'is not a known option' })
    }
    return values
  } catch (error) {
    problems.push({ path, reason: `cannot be read: ${(error as Error).message.split('\n')[0]}` })
    return {}
  }
}

/** What no single value can be blamed for, and what a schema cannot say. Asked of the options that fit, so that no problem hides another. */
function contradictions({ provider, routes, serverUrl = 'http://unknown', serverToken, trustedProxies = [], secureAccessKeys = '', secureAccessKeysFile = '', host = '', adminHost = '', baseDomain = '', workers = 1, port }: Partial<GatewayConfig>): Problem[] {
  const problems: Problem[] = []
  if (provider === 'static' && routes === '') problems.push({ path: '--routes', reason: 'is required with --provider static' })
  if (provider === 'server') {
    if (!/^https?:\/\/[^/]+/.test(serverUrl) || !URL.canParse(serverUrl)) problems.push({ path: '--server-url', reason: 'must be an http(s) URL with --provider server' })
    if (serverToken === '') problems.push({ path: '--server-token', reason: 'is required with --provider server' })
  }
  if (host !== '' && isIP(host) === 0 && !isHostName(host)) problems.push({ path: '--host', reason: 'is neither an IP address nor a host name' })
  if (adminHost !== '' && isIP(adminHost) === 0 && !isHostName(adminHost)) problems.push({ path: '--admin-host', reason: 'is neither an IP address nor a host name' })
  // Of the root alone nothing would be left, and that means any.
  if (baseDomain === '.' || normaliseName(baseDomain) === null) problems.push({ path: '--base-domain', reason: 'is not a domain' })
  for (const network of trustedProxies) if (readNetwork(network) === null) problems.push({ path: '--trusted-proxies', reason: `"${network}" is not an address or network` })
  if (secureAccessKeys !== '' && secureAccessKeysFile !== '') problems.push({ path: '--secure-access-keys-file', reason: 'excludes --secure-access-keys' })
  const keys = parseAccessKeys(secureAccessKeys, '--secure-access-keys')
  if (!keys.ok) problems.push(...keys.problems)
  if (workers > 1 && port === 0) problems.push({ path: '--port', reason: 'must be given when there is more than one worker' })
  return problems
}

function camel(name: string): string {
  return name.replace(/-([a-z0-9])/g, (_all, letter: string) => letter.toUpperCase())
}

function kebab(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)
}
