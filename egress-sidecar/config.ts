/** The sidecar's configuration: environment variables, named as the original names them, to one checked value. */
import { readFileSync } from 'node:fs'
import * as Type from 'typebox'
import type { Static } from 'typebox'
import { canonicalAddress, formatNetwork, readNetwork } from '#policies/address.ts'
import { checkConfig, ConfigError } from '#policies/config.ts'
import { readNetworkPolicy, type NetworkPolicy } from '#policies/document.ts'
import { normaliseName } from '#policies/host.ts'
import type { Problem } from '#policies/problem.ts'
import type { Upstream } from './ruleset.ts'

const prefix = 'OPENSANDBOX_EGRESS_'

const ConfigSchema = Type.Object({
  mode: Type.Union([Type.Literal('dns+nft'), Type.Literal('dns')], { default: 'dns+nft', description: 'dns+nft filters names and addresses; dns filters names only' }),
  policyFile: Type.String({ default: '', description: 'policy document; wins over RULES, every change is written back' }),
  token: Type.String({ default: '', description: 'what the header OPENSANDBOX-EGRESS-AUTH must hold; empty means no check' }),
  maxRules: Type.Integer({ default: 4096, minimum: 0, description: 'rules a policy may have; 0 means any number' }),
  logLevel: Type.Union([Type.Literal('debug'), Type.Literal('info'), Type.Literal('warn'), Type.Literal('error'), Type.Literal('fatal')], { default: 'info' }),
  logOutput: Type.String({ default: 'stdout', description: 'comma list of stdout, stderr and files' }),
  sandboxId: Type.String({ default: '', description: 'sandbox_id of every log line' }),
  upstreamTimeoutSeconds: Type.Integer({ default: 5, minimum: 1, maximum: 120 }),
  probeSeconds: Type.Integer({ default: 30, minimum: 1, maximum: 3600, description: 'between two probes of the upstreams' }),
  blockDoh: Type.Boolean({ default: false, description: 'refuse port 443 of the DoH block list, or everywhere when the list is empty' }),
  randomCase: Type.Boolean({ default: true, description: 'names are asked for in a random case (0x20)' }),
  exemption: Type.Union([Type.Literal('auto'), Type.Literal('cgroup'), Type.Literal('ports')], { default: 'auto', description: "how the kernel knows the sidecar's own packets" }),
})

export type Config = Static<typeof ConfigSchema> & {
  readonly rules: NetworkPolicy
  readonly http: { readonly host: string; readonly port: number }
  readonly upstreams: readonly Upstream[]
  /** Resolvers the sandbox may ask unfiltered. */
  readonly openResolvers: readonly string[]
  readonly dohAddresses: readonly string[]
  /** Addresses and networks that no rule opens. */
  readonly floor: readonly string[]
  /** What hears of denied names. */
  readonly denyWebhook: URL | null
  /** What the upstreams are asked to see whether they live; '' for the root. */
  readonly probeName: string
  /** Beside our own on every log line and metric. */
  readonly attributes: ReadonlyMap<string, string>
  /** What stands in a variable and is passed over, as the original does: told at the start, or its author would rely on it. */
  readonly ignored: readonly Problem[]
}

type Environment = Readonly<Record<string, string | undefined>>

/** @throws ConfigError with every problem at once */
export function readConfig(env: Environment, resolvConf = '/etc/resolv.conf'): Config {
  const text = (name: string): string => env[prefix + name] ?? ''
  const problems: Problem[] = []
  const keep = <T>(read: () => T, fallback: T): T => {
    try {
      return read()
    } catch (error) {
      problems.push(...(error as ConfigError).problems)
      return fallback
    }
  }
  const ignored: Problem[] = []
  const passOver = (name: string, value: string, why: string): void => void ignored.push({ path: prefix + name, reason: `${JSON.stringify(value)} ${why}` })
  const lenient = <T>(name: string, read: (text: string) => T | undefined): T | undefined => {
    const value = read(text(name))
    if (value === undefined && text(name).trim() !== '') passOver(name, text(name), 'is not understood: the default holds')
    return value
  }
  const entries = (name: string, read: (item: string) => string | null): string[] => unique(list(text(name)).flatMap((item) => {
    const entry = read(item)
    if (entry === null) passOver(name, item, 'is no address: left out')
    return entry ?? []
  }))
  const raw = {
    ...given('mode', readMode(text('MODE'))),
    policyFile: text('POLICY_FILE').trim(),
    token: text('TOKEN'),
    ...given('maxRules', lenient('MAX_RULES', integerOf(0, Infinity))),
    ...given('logLevel', lenient('LOG_LEVEL', levelOf)),
    ...given('logOutput', list(env['OPENSANDBOX_LOG_OUTPUT'] ?? '').join(',')),
    sandboxId: text('SANDBOX_ID'),
    ...given('upstreamTimeoutSeconds', lenient('DNS_UPSTREAM_TIMEOUT', integerOf(1, 120))),
    ...given('probeSeconds', lenient('DNS_UPSTREAM_PROBE_INTERVAL_SEC', integerOf(1, 3600))),
    ...given('blockDoh', lenient('BLOCK_DOH_443', switchOf)),
    ...(text('DNS_RANDOM_CASE').trim() === '' ? {} : given('randomCase', lenient('DNS_RANDOM_CASE', switchOf))),
    ...given('exemption', text('EXEMPTION').trim().toLowerCase()),
  }
  const base = keep(() => checkConfig(ConfigSchema, raw), checkConfig(ConfigSchema, {}))
  const config: Config = {
    ...base,
    rules: keep(() => readRules(text('RULES')), { defaultAction: 'deny', egress: [] }),
    http: keep(() => readListenAddress(text('HTTP_ADDR').trim() || ':18080'), { host: '', port: 0 }),
    upstreams: keep(() => readUpstreams(text('DNS_UPSTREAM'), resolvConf), []),
    openResolvers: entries('NAMESERVER_EXEMPT', canonicalAddress),
    dohAddresses: entries('DOH_BLOCKLIST', (item) => {
      const network = readNetwork(item)
      return network === null ? null : formatNetwork(network)
    }),
    floor: keep(() => readFloor(text('FLOOR')), []),
    denyWebhook: keep(() => readWebhook(text('DENY_WEBHOOK').trim()), null),
    probeName: keep(() => readProbeName(text('DNS_UPSTREAM_PROBE').trim()), ''),
    attributes: keep(() => readAttributes(text('METRICS_EXTRA_ATTRS')), new Map()),
    ignored,
  }
  // Whoever asks for interception must not believe that it happens.
  const interception = { MITMPROXY_TRANSPARENT: switchOf(text('MITMPROXY_TRANSPARENT')) === true, MITMPROXY_SSL_INSECURE: switchOf(text('MITMPROXY_SSL_INSECURE')) === true, MITMPROXY_SCRIPT: text('MITMPROXY_SCRIPT').trim() !== '' }
  for (const [name, wanted] of Object.entries(interception)) if (wanted) problems.push({ path: prefix + name, reason: 'is set, but TLS interception is not part of this sidecar: unset it' })
  if (problems.length > 0) throw new ConfigError(problems.map(({ path, reason }) => ({ path: variables[path] ?? path, reason })))
  return Object.freeze(config)
}

/** A schema speaks of its keys; whoever set a variable looks for its name. */
const variables: Readonly<Record<string, string>> = { mode: `${prefix}MODE`, exemption: `${prefix}EXEMPTION` }

/** Absent, so that the schema's default holds. */
function given(key: string, value: unknown): Record<string, unknown> {
  return value === undefined || value === '' ? {} : { [key]: value }
}

function list(text: string): string[] {
  return text.split(',').map((item) => item.trim()).filter((item) => item !== '')
}

function unique(items: readonly string[]): string[] {
  return [...new Set(items)]
}

function switchOf(text: string): boolean | undefined {
  const word = text.trim().toLowerCase()
  if (['1', 'true', 'yes', 'y', 'on'].includes(word)) return true
  return ['', '0', 'false', 'no', 'n', 'off'].includes(word) ? false : undefined
}

/** Numbers of the original fall back to their default when they make no sense; a larger one than allowed is cut. */
function integerOf(least: number, most: number): (text: string) => number | undefined {
  return (text) => {
    const value = /^[+-]?\d+$/.test(text.trim()) ? Number(text) : NaN
    return value >= least ? Math.min(value, most) : undefined
  }
}

function levelOf(text: string): string | undefined {
  const level = text.trim().toLowerCase()
  if (level === 'warning') return 'warn'
  return ['debug', 'info', 'warn', 'error', 'fatal'].includes(level) ? level : undefined
}

/** Tokens joined by `+` in any order. Anything unknown stays as it is and is refused by the schema: a typing error must not weaken the mode. */
function readMode(text: string): string | undefined {
  const tokens = text.toLowerCase().split('+').map((token) => token.trim()).filter((token) => token !== '')
  if (tokens.length === 0) return text.trim() === '' ? undefined : text
  if (!tokens.includes('dns') || tokens.some((token) => token !== 'dns' && token !== 'nft')) return text
  return tokens.includes('nft') ? 'dns+nft' : 'dns'
}

function readFloor(text: string): string[] {
  const items = unique(list(text))
  const wrong = items.filter((item) => readNetwork(item) === null)
  if (wrong.length > 0) throw new ConfigError(wrong.map((item) => ({ path: `${prefix}FLOOR`, reason: `${JSON.stringify(item)} is neither an address nor a network` })))
  return items
}

function readRules(text: string): NetworkPolicy {
  const path = `${prefix}RULES`
  let value: unknown = null
  try {
    if (text.trim() !== '') value = JSON.parse(text)
  } catch (error) {
    throw new ConfigError([{ path, reason: (error as Error).message }])
  }
  const read = readNetworkPolicy(value, path)
  if (!read.ok) throw new ConfigError(read.problems)
  return read.policy
}

function readWebhook(text: string): URL | null {
  if (text === '') return null
  const url = URL.parse(text)
  if (url === null || !['http:', 'https:'].includes(url.protocol)) throw new ConfigError([{ path: `${prefix}DENY_WEBHOOK`, reason: 'is not an http:// or https:// URL' }])
  return url
}

function readProbeName(text: string): string {
  const name = normaliseName(text)
  if (name === null) throw new ConfigError([{ path: `${prefix}DNS_UPSTREAM_PROBE`, reason: `${JSON.stringify(text)} is not a name` }])
  return name
}

/** Keys of our own log lines and labels of our own metrics: a second value under the same key would hide the first. */
const ownKeys = new Set(['level', 'ts', 'logger', 'msg', 'opensandbox.event', 'le', 'result', 'reason'])

/** `key=value,key2=value2`; an entry without a key or without a value is left out, as the original does. */
function readAttributes(text: string): Map<string, string> {
  const attributes = new Map<string, string>()
  for (const item of list(text)) {
    const at = item.indexOf('=')
    const [key, value] = [item.slice(0, Math.max(at, 0)).trim(), item.slice(at + 1).trim()]
    if (key !== '' && value !== '') attributes.set(key, value)
  }
  const problems = [...attributes.keys()].filter((key) => ownKeys.has(key)).map((key) => ({ path: `${prefix}METRICS_EXTRA_ATTRS`, reason: `${JSON.stringify(key)} is the sidecar's own` }))
  if (problems.length > 0) throw new ConfigError(problems)
  return attributes
}

/** `:18080`, `127.0.0.1:18080`, `[::1]:18080`; without a host all addresses. */
function readListenAddress(text: string): { host: string; port: number } {
  const match = /^(?:\[([^\]]*)\]|([^:]*)):(\d{1,5})$/.exec(text)
  const host = match?.[1] ?? match?.[2] ?? ''
  const port = Number(match?.[3])
  if (match === null || port > 65535 || (host !== '' && canonicalAddress(host) === null)) throw new ConfigError([{ path: `${prefix}HTTP_ADDR`, reason: `${JSON.stringify(text)} is not [address]:port` }])
  return { host, port }
}

const maxResolvConf = 10
const dockerResolver = '127.0.0.11'
/** As the original does where nothing at all is configured. */
const lastResort: Upstream = { address: '8.8.8.8', port: 53 }

/** Literal addresses from the environment, else those of resolv.conf that can be reached from a namespace of our own. */
function readUpstreams(text: string, resolvConf: string): Upstream[] {
  const path = `${prefix}DNS_UPSTREAM`
  if (text.trim() !== '') {
    const problems: Problem[] = []
    const upstreams = list(text).flatMap((item) => {
      const upstream = readUpstream(item)
      if (upstream === null) problems.push({ path, reason: `${JSON.stringify(item)} is not an IP address with an optional port` })
      else if (upstream.address === dockerResolver) problems.push({ path, reason: `${dockerResolver} would send every question back to the sidecar: name the resolver behind it` })
      else if (isOwn(upstream.address)) problems.push({ path, reason: `${upstream.address} is in the sandbox's own network namespace: the sandbox could answer in its place` })
      return upstream ?? []
    })
    if (upstreams.length === 0 && problems.length === 0) problems.push({ path, reason: 'names no resolver' })
    if (problems.length > 0) throw new ConfigError(problems)
    return upstreams
  }
  const listed = nameservers(resolvConf)
  const usable = listed.filter((address) => !isOwn(address)).slice(0, maxResolvConf)
  if (listed.length > 0 && usable.length === 0) throw new ConfigError([{ path, reason: `is needed: ${resolvConf} names only resolvers on the loopback (${listed.join(', ')})` }])
  return usable.length === 0 ? [lastResort] : usable.map((address) => ({ address, port: 53 }))
}

/** Loopback, and the unspecified address, which means the same. */
function isOwn(address: string): boolean {
  return address.startsWith('127.') || ['::1', '0.0.0.0', '::'].includes(address)
}

function nameservers(resolvConf: string): string[] {
  let text = ''
  try {
    text = readFileSync(resolvConf, 'utf8')
  } catch {
    return []
  }
  return unique(text.split('\n').flatMap((line) => canonicalAddress(/^\s*nameserver\s+(\S+)/.exec(line)?.[1] ?? '') ?? []))
}

/** `198.51.100.53`, `198.51.100.53:5353`, `2001:db8::1`, `[2001:db8::1]:5353`. */
function readUpstream(text: string): Upstream | null {
  const bare = canonicalAddress(text)
  if (bare !== null) return { address: bare, port: 53 }
  const match = /^(?:\[([^\]]+)\]|([^:]+))(?::(\d{1,5}))?$/.exec(text)
  const address = canonicalAddress(match?.[1] ?? match?.[2] ?? '')
  const port = Number(match?.[3] ?? 53)
  return address === null || port < 1 || port > 65535 ? null : { address, port }
}
