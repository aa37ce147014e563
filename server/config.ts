/**
 * The server's configuration: one TOML file, one schema, and the checks that span several keys.
 * Unknown tables and keys are ignored, as in the original, so that its files load here; `ignoredKeys` names them.
 */
import { readFileSync } from 'node:fs'
import { cpus, homedir } from 'node:os'
import { parse, TomlError } from 'smol-toml'
import ipaddr from 'ipaddr.js'
import * as Type from 'typebox'
import type { Static } from 'typebox'
import { parseAccessKeys } from '#policies/access.ts'
import { canonicalAddress, formatNetwork, readNetwork } from '#policies/address.ts'
import { checkConfig, ConfigError } from '#policies/config.ts'
import type { Problem } from '#policies/problem.ts'
import { gatewayAddressProblem } from '#policies/route.ts'
import { readFailureTtl, valueProblems } from './config-values.ts'
import { hostUpstreams } from './resolvers.ts'
import { unknownKeys } from './unknown-keys.ts'

const table = { default: {} }
const text = (description: string) => Type.Optional(Type.String({ minLength: 1, description }))

const ServerSchema = Type.Object({
  host: Type.String({ minLength: 1, default: '0.0.0.0', description: 'address to listen on; in direct mode also the address sandbox ports are published on' }),
  port: Type.Integer({ minimum: 0, maximum: 65535, default: 8080, description: 'port to listen on; 0 picks a free one' }),
  api_key: Type.Optional(Type.String({ description: 'the key clients send as OPEN-SANDBOX-API-KEY' })),
  api_key_file: text('file that holds the key'),
  eip: text('address or name in direct endpoints, when clients reach this machine under another one'),
  max_sandbox_timeout_seconds: Type.Optional(Type.Integer({ minimum: 60, description: 'longest timeout a create may ask for' })),
  create_wait_seconds: Type.Number({ minimum: 0, maximum: 600, default: 10, description: 'how long POST waits for Running before it answers Pending' }),
  timeout_keep_alive: Type.Integer({ minimum: 1, default: 30, description: 'seconds an idle client connection is kept' }),
  auth_failures_per_minute: Type.Integer({ minimum: 0, default: 30, description: 'wrong keys a client address may send; 0 means no limit' }),
  creates_per_minute: Type.Integer({ minimum: 0, default: 600, description: 'creates a client address may ask for; 0 means no limit' }),
  limit_concurrency: Type.Integer({ minimum: 0, default: 1024, description: 'client connections at once; 0 means no limit' }),
  backlog: Type.Integer({ minimum: 1, default: 2048, description: 'connections the kernel holds until they are accepted' }),
  max_body_bytes: Type.Integer({ minimum: 1024, default: 1048576, description: 'largest request body' }),
}, table)

const DockerSchema = Type.Object({
  network_mode: Type.String({ minLength: 1, default: 'bridge', description: 'bridge: our own isolated network; another name: that existing Docker network' }),
  default_bridge: Type.Boolean({ default: false, description: 'bridge means docker0, where sandboxes are not isolated from neighbours' }),
  network_name: Type.String({ pattern: '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$', default: 'sallyport', description: 'name of our own network' }),
  bridge_name: Type.String({ pattern: '^[A-Za-z][A-Za-z0-9_-]{0,14}$', default: 'sallyport0', description: 'its bridge on the host' }),
  host_guard: Type.Union([Type.Literal('on'), Type.Literal('off')], { default: 'on', description: 'keeps sandboxes off the host, its published ports and the floor by nftables' }),
  floor: Type.Array(Type.String(), { default: ['169.254.0.0/16', '100.100.100.200', '168.63.129.16', 'fd00:ec2::254'], description: 'addresses no sandbox reaches, with or without a policy: cloud metadata' }),
  adopt: Type.Boolean({ default: false, description: "takes over the original server's sandboxes, found by its labels: lists them, ends them on time" }),
  instance: Type.Optional(Type.String({ pattern: '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$', description: 'whose objects these are; default: made from machine, host name and path of a new store, and kept in it; random where there is no machine id, as in most containers: give one there' })),
  api_timeout: Type.Integer({ minimum: 1, default: 180, description: 'seconds a call to the Docker engine may take' }),
  drop_capabilities: Type.Array(Type.String(), {
    default: ['AUDIT_WRITE', 'MKNOD', 'NET_ADMIN', 'NET_RAW', 'SYS_ADMIN', 'SYS_MODULE', 'SYS_PTRACE', 'SYS_TIME', 'SYS_TTY_CONFIG'],
    description: 'taken from sandboxes; NET_ADMIN and NET_RAW are always taken',
  }),
  apparmor_profile: Type.Optional(Type.String({ description: 'AppArmor profile of sandboxes' })),
  no_new_privileges: Type.Boolean({ default: true, description: 'setuid programs in a sandbox gain nothing' }),
  seccomp_profile: Type.Optional(Type.String({ description: 'file with a seccomp profile, or the profile itself' })),
  pids_limit: Type.Integer({ minimum: 1, default: 4096, description: 'processes a sandbox may have' }),
}, table)

const EgressSchema = Type.Object({
  image: text('image of the egress sidecar; without it a create with networkPolicy is refused'),
  mode: Type.Union([Type.Literal('dns'), Type.Literal('dns+nft')], { default: 'dns+nft', description: 'dns checks names only and leaves direct addresses open' }),
  disable_ipv6: Type.Boolean({ default: true, description: 'no IPv6 in sandboxes with a policy' }),
  dns_upstreams: Type.Optional(Type.Array(Type.String(), { minItems: 1, description: "resolvers, `address` or `address:port`; default: the host's, loopback stubs resolved; where there are none, a networkPolicy is refused" })),
  random_case: Type.Boolean({ default: true, description: 'names are asked for in a random case, which a forger must guess; false for domains whose servers do not know them so' }),
  max_rules: Type.Integer({ minimum: 1, default: 4096, description: 'rules a policy may have, also after changes' }),
  cpus: Type.Number({ minimum: 0, default: 1, description: 'processors a sidecar may take, however many questions its sandbox asks; 0 means no limit' }),
  memory_bytes: Type.Integer({ minimum: 33554432, default: 268435456, description: 'memory limit of a sidecar; its heap may take 128 MiB of it' }),
  pids_limit: Type.Integer({ minimum: 16, default: 128, description: 'processes a sidecar may have' }),
  probe: Type.Union([Type.Literal('on'), Type.Literal('off')], { default: 'on', description: 'proves once per boot, engine and image that a sandbox cannot pass for its sidecar; off for images without node, not with `secure_runtime.type`' }),
  ready_seconds: Type.Number({ minimum: 1, maximum: 300, default: 30, description: 'how long a sidecar may take to have its rules in the kernel, also in the proof' }),
}, table)

const IngressSchema = Type.Object({
  mode: Type.Union([Type.Literal('direct'), Type.Literal('gateway')], { default: 'direct', description: 'direct publishes host ports; gateway publishes none' }),
  route_token: text('token of the route stream for gateways; without it there is no stream'),
  route_token_file: text('file that holds it'),
  gateway: Type.Optional(Type.Object({
    address: Type.String({ minLength: 1, description: 'where clients reach the gateway: `*.example.com[:port]` (wildcard) or `host[:port]`' }),
    route: Type.Object({ mode: Type.Union([Type.Literal('wildcard'), Type.Literal('uri'), Type.Literal('header')], { description: 'how requests name the sandbox' }) }),
  })),
  secure_access: Type.Optional(Type.Object({
    active_key: Type.String({ pattern: '^[0-9a-z]$', description: 'key that signs new endpoints' }),
    keys: Type.Array(Type.Object({ key_id: Type.String({ pattern: '^[0-9a-z]$' }), key: Type.String({ minLength: 1 }) }), { minItems: 1, description: 'base64 secrets: `{ key_id, key }` each' }),
  })),
}, table)

export const ConfigSchema = Type.Object({
  server: ServerSchema,
  log: Type.Object({ level: Type.String({ minLength: 3, default: 'INFO', description: 'DEBUG, INFO, WARNING, ERROR or CRITICAL' }) }, table),
  runtime: Type.Object({
    type: Type.Literal('docker', { default: 'docker', description: 'the only one there is' }),
    execd_image: text('image that execd is taken from; without it sandboxes have no execd'),
  }, table),
  docker: DockerSchema,
  egress: EgressSchema,
  ingress: IngressSchema,
  renew_intent: Type.Object({
    enabled: Type.Boolean({ default: true, description: 'use through a gateway extends the life of sandboxes that asked for it' }),
    min_interval_seconds: Type.Integer({ minimum: 1, default: 60, description: 'a sandbox is not extended twice within this time' }),
  }, table),
  secure_runtime: Type.Object({
    type: Type.Union([Type.Literal(''), Type.Literal('gvisor'), Type.Literal('kata')], { default: '', description: 'sandboxes run under an OCI runtime with a kernel of their own, which the engine must have; no `networkPolicy` under one that sends past the network stack of the host (gVisor as it comes): a proof finds out' }),
    docker_runtime: Type.Optional(Type.String({ pattern: '^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$', description: 'its name in the engine; default: runsc for gvisor, kata-runtime for kata' })),
  }, table),
  store: Type.Object({
    type: Type.Literal('sqlite', { default: 'sqlite', description: 'the only one there is' }),
    path: Type.String({ minLength: 1, default: '~/.opensandbox/sallyport.db', description: 'database file; its folder is created' }),
  }, table),
})

type Checked = Static<typeof ConfigSchema>
export type Upstream = { readonly address: string; readonly port: number }
export type Config = Checked & {
  readonly apiKey: string | null
  readonly routeToken: string | null
  readonly upstreams: readonly Upstream[]
  /** OCI runtime of sandboxes; null: the engine's own choice. */
  readonly secureRuntime: string | null
  /** PENDING_FAILURE_TTL: how long a sandbox that failed stays visible. */
  readonly failureTtlSeconds: number
  /** Keys of the file that mean nothing, here or in the original. */
  readonly ignoredKeys: readonly string[]
}

/**
 * Reads the file and the environment.
 * @throws ConfigError with every problem found
 */
export function readConfig(path: string, env: Record<string, string | undefined>): Config {
  const raw = readToml(path)
  const { checked, problems } = checkSchema(raw)
  const found = problems.map((problem) => problem.path)
  const mode = found.some((path) => overlaps(path, 'ingress.mode')) ? null : checked.ingress.mode
  const config: Config = {
    ...checked,
    store: { ...checked.store, path: expandHome(checked.store.path) },
    docker: { ...checked.docker, floor: checked.docker.floor.map(canonicalNetwork), ...readSeccomp(checked, problems) },
    apiKey: readApiKey(checked, env, problems),
    routeToken: blankToNull(checked.ingress.route_token ?? readSecretFile('ingress.route_token_file', checked.ingress.route_token_file, problems)),
    upstreams: readUpstreams(checked, problems),
    secureRuntime: readRuntime(checked.secure_runtime, problems),
    failureTtlSeconds: readFailureTtl(env.PENDING_FAILURE_TTL, problems),
    ignoredKeys: unknownKeys(ConfigSchema, raw),
  }
  problems.push(...crossCheck(config, mode), ...valueProblems(config, mode))
  if (config.apiKey === null && env.OPENSANDBOX_INSECURE_SERVER !== 'YES') {
    problems.push({ path: 'server.api_key', reason: 'is required; set OPENSANDBOX_INSECURE_SERVER=YES to run without one' })
  }
  // A value that does not fit its schema was checked as if it were not there: only the first word on it counts.
  const own = problems.filter((problem, index) => index < found.length || !found.some((path) => overlaps(path, problem.path)))
  if (own.length > 0) throw new ConfigError(own)
  return Object.freeze(config)
}

/** Every problem of the schema, and what can be checked further: the same without the keys that have one. */
function checkSchema(raw: unknown): { checked: Checked; problems: Problem[] } {
  try {
    return { checked: checkConfig(ConfigSchema, raw), problems: [] }
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    const rest = structuredClone(raw) as Record<string, Record<string, unknown>>
    for (const { path } of error.problems) {
      const [table = '', key] = path.replaceAll(/\[\d+\]/g, '').split('.')
      if (key === undefined) delete rest[table]
      else delete rest[table]?.[key]
    }
    return { checked: checkConfig(ConfigSchema, rest), problems: [...error.problems] }
  }
}

/** One is the other, or within it. */
function overlaps(a: string, b: string): boolean {
  const within = (outer: string, inner: string): boolean => inner === outer || inner.startsWith(`${outer}.`) || inner.startsWith(`${outer}[`)
  return within(a, b) || within(b, a)
}

function readToml(path: string): unknown {
  try {
    return parse(readFileSync(path, 'utf8'))
  } catch (error) {
    const reason = error instanceof TomlError ? `is not TOML: line ${error.line}, column ${error.column}` : `cannot be read: ${(error as NodeJS.ErrnoException).code ?? String(error)}`
    throw new ConfigError([{ path, reason }])
  }
}

function readApiKey(config: Checked, env: Record<string, string | undefined>, problems: Problem[]): string | null {
  if (env.OPENSANDBOX_SERVER_API_KEY !== undefined) return blankToNull(env.OPENSANDBOX_SERVER_API_KEY)
  if (config.server.api_key !== undefined) return blankToNull(config.server.api_key)
  const named = env.OPENSANDBOX_SERVER_API_KEY_FILE
  return blankToNull(named === undefined ? readSecretFile('server.api_key_file', config.server.api_key_file, problems) : readSecretFile('OPENSANDBOX_SERVER_API_KEY_FILE', named, problems))
}

function readSecretFile(path: string, file: string | undefined, problems: Problem[]): string | undefined {
  if (file === undefined) return undefined
  try {
    return readFileSync(expandHome(file), 'utf8').trim()
  } catch (error) {
    problems.push({ path, reason: `cannot be read: ${(error as NodeJS.ErrnoException).code ?? String(error)}` })
    return undefined
  }
}

function readUpstreams(config: Checked, problems: Problem[]): Upstream[] {
  if (config.egress.dns_upstreams === undefined) return hostUpstreams()
  const upstreams: Upstream[] = []
  for (const [index, item] of config.egress.dns_upstreams.entries()) {
    const match = /^(?:\[([^\]]+)\]|([^:]+))(?::(\d{1,5}))?$/.exec(canonicalAddress(item) === null ? item : `[${item}]`)
    const address = canonicalAddress(match?.[1] ?? match?.[2] ?? '')
    const port = Number(match?.[3] ?? 53)
    if (address === null || port < 1 || port > 65535) problems.push({ path: `egress.dns_upstreams[${index}]`, reason: 'must be an IP address, or an address and a port' })
    else if (['loopback', 'unspecified'].includes(ipaddr.parse(address).range())) problems.push({ path: `egress.dns_upstreams[${index}]`, reason: 'a loopback address means another machine inside a sandbox' })
    else upstreams.push({ address, port })
  }
  return upstreams
}

/** As its rules take it; what is wrong stays as it is, and is reported. */
function canonicalNetwork(text: string): string {
  const network = readNetwork(text)
  return network === null ? text : formatNetwork(network)
}

function readRuntime({ type, docker_runtime }: Checked['secure_runtime'], problems: Problem[]): string | null {
  if (type === '' && docker_runtime !== undefined) problems.push({ path: 'secure_runtime.docker_runtime', reason: 'only goes with secure_runtime.type' })
  if (type === '') return null
  return docker_runtime ?? (type === 'gvisor' ? 'runsc' : 'kata-runtime')
}

/** The Engine API wants the profile itself, not a path (a path is only understood by the docker command). */
function readSeccomp(config: Checked, problems: Problem[]): { seccomp_profile?: string } {
  const profile = config.docker.seccomp_profile
  if (profile === undefined || profile === '' || profile === 'unconfined' || profile.trimStart().startsWith('{')) return {}
  const read = readSecretFile('docker.seccomp_profile', profile, problems)
  return read === undefined ? {} : { seccomp_profile: read }
}

/** @param mode null when it is wrong itself: then nothing is said of what goes with it */
function crossCheck(config: Config, mode: Config['ingress']['mode'] | null): Problem[] {
  const problems: Problem[] = []
  const { ingress, docker, egress } = config
  if (mode === 'gateway' && ingress.gateway === undefined) problems.push({ path: 'ingress.gateway', reason: 'is required when ingress.mode is gateway' })
  if (mode === 'direct' && ingress.gateway !== undefined) problems.push({ path: 'ingress.gateway', reason: 'only goes with ingress.mode = "gateway"' })
  if (mode === 'direct' && ingress.secure_access !== undefined) problems.push({ path: 'ingress.secure_access', reason: 'only goes with ingress.mode = "gateway"' })
  if (ingress.gateway !== undefined) {
    const reason = gatewayAddressProblem(ingress.gateway.route.mode, ingress.gateway.address)
    if (reason !== null) problems.push({ path: 'ingress.gateway.address', reason })
  }
  if (ingress.secure_access !== undefined) {
    const { active_key, keys } = ingress.secure_access
    const parsed = parseAccessKeys(keys.map((k) => `${k.key_id}=${k.key}`).join(','), 'ingress.secure_access.keys')
    if (!parsed.ok) problems.push(...parsed.problems)
    else if (!parsed.keys.has(active_key)) problems.push({ path: 'ingress.secure_access.active_key', reason: 'names no key of ingress.secure_access.keys' })
  }
  if (docker.network_mode.toLowerCase() === 'host' || docker.network_mode === 'none' || docker.network_mode.startsWith('container:')) {
    problems.push({ path: 'docker.network_mode', reason: `"${docker.network_mode}" gives a sandbox no network namespace that could be guarded; use "bridge" or the name of a network` })
  }
  // Whether rules hold a sandbox under such a runtime only the proof tells.
  if (config.secureRuntime !== null && egress.image !== undefined && egress.probe === 'off') {
    problems.push({ path: 'egress.probe', reason: 'must be "on" with secure_runtime.type: without the proof a policy might hold nothing back. Sandboxes without a policy need no egress.image' })
  }
  const processors = cpus().length
  if (processors > 0 && egress.cpus > processors) problems.push({ path: 'egress.cpus', reason: `is more than the ${processors} processors of this machine` })
  for (const [index, item] of docker.floor.entries()) {
    if (readNetwork(item) === null) problems.push({ path: `docker.floor[${index}]`, reason: 'must be an IP address or a CIDR network' })
  }
  return problems
}

function blankToNull(value: string | undefined): string | null {
  return value === undefined || value.trim() === '' ? null : value
}

function expandHome(path: string): string {
  return path === '~' || path.startsWith('~/') ? homedir() + path.slice(1) : path
}
