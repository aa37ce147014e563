/**
 * The body of `POST /sandboxes`: read, checked in every field, turned into what the rest of the server works with.
 * All problems are reported together, each with the path of the field. The input itself is never echoed: it holds
 * registry passwords. Pure.
 */
import * as Type from 'typebox'
import type { Static } from 'typebox'
import { schemaProblems } from '#policies/config.ts'
import { readNetworkPolicy, type NetworkPolicy } from '#policies/document.ts'
import { formatProblems, type Problem } from '#policies/problem.ts'
import { ApiError, type ApiErrorCode } from './api-error.ts'
import type { Config } from './config.ts'
import type { Platform } from './group.ts'
import { imageReferenceProblem } from './image-reference.ts'
import { metadataProblems } from './metadata.ts'
import { readLimits, type Limits } from './resources.ts'
import { splitShell } from './shell-split.ts'

const Texts = Type.Record(Type.String(), Type.String())
export const CreateSchema = Type.Object({
  image: Type.Optional(Type.Object({
    uri: Type.String(),
    auth: Type.Optional(Type.Object({ username: Type.String(), password: Type.String() })),
  })),
  snapshotId: Type.Optional(Type.String()),
  platform: Type.Optional(Type.Object({ os: Type.String(), arch: Type.String() })),
  timeout: Type.Optional(Type.Integer({ minimum: 60 })),
  resourceLimits: Type.Optional(Texts),
  env: Type.Optional(Type.Record(Type.String(), Type.Union([Type.String(), Type.Null()]))),
  metadata: Type.Optional(Texts),
  entrypoint: Type.Optional(Type.Array(Type.String(), { minItems: 1 })),
  networkPolicy: Type.Optional(Type.Unknown()),
  credentialProxy: Type.Optional(Type.Object({ enabled: Type.Optional(Type.Boolean()) })),
  secureAccess: Type.Optional(Type.Boolean()),
  volumes: Type.Optional(Type.Array(Type.Unknown())),
  extensions: Type.Optional(Texts),
})
type Body = Static<typeof CreateSchema>

/** A request that can be carried out as it stands. */
export type CreateRequest = {
  readonly image: string
  readonly auth: { readonly username: string; readonly password: string } | null
  readonly platform: Platform | null
  /** Seconds; null: until deleted. */
  readonly timeout: number | null
  readonly limits: Limits
  readonly env: Readonly<Record<string, string | null>>
  readonly metadata: Readonly<Record<string, string>> | null
  /** As sent, for the answer; `command` is what runs. */
  readonly entrypoint: readonly string[]
  readonly command: readonly string[]
  readonly networkPolicy: NetworkPolicy | null
  readonly secureAccess: boolean
  readonly renewExtendSeconds: number | null
}

/** The latest moment a timestamp can name (year 9999). */
const latestMoment = 253402300799000
/** What a sidecar takes as the body of a policy. */
const mostPolicyBytes = 1_048_576
/** MAX_ARG_STRLEN of Linux, with its NUL: a longer string keeps every program from starting. */
const mostStringBytes = 131_071
/** Fields may also be written in snake case. */
const aliases: ReadonlyMap<string, string> = new Map(Object.keys(CreateSchema.properties).map((key) => [key.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`), key]))
const renewKey = 'access.renew.extend.seconds'

/** @throws ApiError 400 naming every problem of the shape, or else of the values; 501 for what this server does not do */
export function readCreateRequest(value: unknown, config: Config, now: number): CreateRequest {
  const body = fold(value)
  if (typeof body !== 'object' || body === null || Array.isArray(body)) throw invalid([{ path: 'body', reason: body === undefined ? 'is empty; it must be a JSON object' : 'must be a JSON object' }])
  const problems = [...misspelt(value as object), ...givenTwice(value as object), ...schemaProblems(CreateSchema, body)]
  if (problems.length > 0) throw invalid(problems)
  const request = body as Body
  if (request.extensions?.poolRef?.trim()) throw new ApiError('SANDBOX::UNSUPPORTED_POOL_REF', 'extensions.poolRef: pools are not available on Docker.')
  refuseUnbuilt(request)

  const image = request.image?.uri.trim() ?? ''
  if (image === '') problems.push({ path: 'image.uri', reason: 'is required' })
  else {
    const reason = imageReferenceProblem(image)
    if (reason !== null) problems.push({ path: 'image.uri', reason })
  }
  if (request.entrypoint === undefined) problems.push({ path: 'entrypoint', reason: 'is required' })
  if (request.resourceLimits === undefined) problems.push({ path: 'resourceLimits', reason: 'is required; {} means no limit' })
  const read: CreateRequest = {
    image,
    auth: request.image?.auth ?? null,
    platform: readPlatform(request, problems),
    timeout: readTimeout(request, config, now, problems),
    limits: readLimits(request.resourceLimits ?? {}, problems),
    env: readEnv(request, problems),
    metadata: request.metadata ?? null,
    entrypoint: request.entrypoint ?? [],
    command: readCommand(request.entrypoint ?? [], problems),
    networkPolicy: readPolicy(request, config, problems),
    secureAccess: request.secureAccess ?? false,
    renewExtendSeconds: readRenew(request, problems),
  }
  if (read.secureAccess && config.ingress.mode !== 'gateway') problems.push({ path: 'secureAccess', reason: 'needs ingress.mode = "gateway"' })
  const labelProblems = metadataProblems(read.metadata ?? {})
  if (problems.length > 0) throw invalid([...problems, ...labelProblems])
  if (labelProblems.length > 0) throw invalid(labelProblems, 'SANDBOX::INVALID_METADATA_LABEL')
  return read
}

export function invalid(problems: readonly Problem[], code: ApiErrorCode = 'SANDBOX::INVALID_PARAMETER'): ApiError {
  return new ApiError(code, formatProblems(problems))
}

/** Known keys in camel case, nulls at the top dropped (null means absent), `"600"` taken for a number where one is due. */
function fold(value: unknown): unknown {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return value
  const folded: Record<string, unknown> = {}
  for (const [key, inner] of Object.entries(value)) {
    const name = aliases.get(key) ?? key
    if (inner === null || !Object.hasOwn(CreateSchema.properties, name)) continue
    folded[name] = name === 'timeout' && typeof inner === 'string' && /^\s*\d{1,15}\s*$/.test(inner) ? Number(inner) : inner
  }
  return folded
}

/** What guards a sandbox must not get lost in a misspelt key, or in another product's: other unknown keys are ignored (as in the original), these are not. */
const guarding = /polic|netw|egress|secur|internet|firewall|domain|allow|deny|denied|block|cidr|outbound|offline/i
/** Among extensions, where image pull policies and the like are at home. */
const guardingExtension = /^netw.*polic|egress|internet|firewall|^secureaccess$/
/** Annotations of Kubernetes, whatever they are called. */
const passedOn = 'opensandbox.extensions.'

function misspelt(value: object): Problem[] {
  const unknown = Object.keys(value).filter((key) => guarding.test(key) && !Object.hasOwn(CreateSchema.properties, aliases.get(key) ?? key))
  const { extensions } = value as { extensions?: unknown }
  const misplaced = Object.keys(typeof extensions === 'object' && extensions !== null ? extensions : {})
    .filter((key) => !key.startsWith(passedOn) && guardingExtension.test(key.replace(/[^a-z]/gi, '').toLowerCase()))
  const meant = (key: string): string => (/secur/i.test(key) ? 'secureAccess' : 'networkPolicy')
  return [
    ...unknown.map((key) => ({ path: key.slice(0, 80), reason: `is not a known field; did you mean ${meant(key)}?` })),
    ...misplaced.map((key) => ({ path: `extensions[${JSON.stringify(key.slice(0, 80))}]`, reason: `guards nothing here; did you mean the field ${meant(key)}?` })),
  ]
}

/** In both spellings: one of the two would be lost. */
function givenTwice(value: object): Problem[] {
  return Object.keys(value).flatMap((key) => {
    const field = aliases.get(key) ?? key
    return field !== key && Object.hasOwn(value, field) ? [{ path: key, reason: `is given twice, also as ${field}` }] : []
  })
}

/** A pretence would be worse than a refusal. */
function refuseUnbuilt(request: Body): void {
  if (request.snapshotId?.trim() && !request.image?.uri.trim()) throw new ApiError('SNAPSHOT::NOT_IMPLEMENTED', 'snapshotId: snapshots are not available.')
  if (request.snapshotId?.trim()) throw invalid([{ path: 'snapshotId', reason: 'give either image or snapshotId' }])
  if ((request.volumes ?? []).length > 0) throw new ApiError('NOT_IMPLEMENTED', 'volumes: volumes are not available.')
  if (request.credentialProxy?.enabled === true) throw new ApiError('NOT_IMPLEMENTED', 'credentialProxy: the credential proxy is not available.')
}

function readPlatform(request: Body, problems: Problem[]): Platform | null {
  if (request.platform === undefined) return null
  const os = request.platform.os.trim().toLowerCase()
  const arch = request.platform.arch.trim().toLowerCase()
  if (os !== 'linux') problems.push({ path: 'platform.os', reason: 'must be linux' })
  if (arch !== 'amd64' && arch !== 'arm64') problems.push({ path: 'platform.arch', reason: 'must be amd64 or arm64' })
  return { os, arch }
}

function readTimeout(request: Body, config: Config, now: number, problems: Problem[]): number | null {
  const timeout = request.timeout ?? null
  const most = config.server.max_sandbox_timeout_seconds
  if (timeout !== null && now + timeout * 1000 > latestMoment) problems.push({ path: 'timeout', reason: 'is too large to represent safely' })
  else if (timeout !== null && most !== undefined && timeout > most) problems.push({ path: 'timeout', reason: `Sandbox timeout ${timeout}s exceeds configured maximum of ${most}s.` })
  return timeout
}

function readEnv(request: Body, problems: Problem[]): Record<string, string | null> {
  const env = request.env ?? {}
  for (const [key, value] of Object.entries(env)) {
    if (key === '' || /[=\0]/.test(key)) problems.push({ path: `env[${JSON.stringify(key.slice(0, 80))}]`, reason: 'is not a variable name' })
    if (value?.includes('\0') === true) problems.push({ path: `env.${key.slice(0, 80)}`, reason: 'must not hold a NUL character' })
    if (Buffer.byteLength(`${key}=${value ?? ''}`) > mostStringBytes) problems.push({ path: `env.${key.slice(0, 80)}`, reason: `is longer than the ${mostStringBytes} bytes a variable may have, with its name` })
  }
  return env
}

/** One text with a space in it is a command line, as in the original. */
function readCommand(entrypoint: readonly string[], problems: Problem[]): readonly string[] {
  for (const [index, part] of entrypoint.entries()) {
    if (part.includes('\0')) problems.push({ path: `entrypoint[${index}]`, reason: 'must not hold a NUL character' })
    if (Buffer.byteLength(part) > mostStringBytes) problems.push({ path: `entrypoint[${index}]`, reason: `is longer than the ${mostStringBytes} bytes an argument may have` })
  }
  const only = entrypoint.length === 1 ? entrypoint[0] : undefined
  const command = only?.includes(' ') === true ? splitShell(only) : entrypoint
  if (command === null) problems.push({ path: 'entrypoint[0]', reason: 'has an unbalanced quote' })
  else if (entrypoint.length > 0 && (command.length === 0 || command[0] === '')) problems.push({ path: 'entrypoint[0]', reason: 'must name a program' })
  return command ?? []
}

function readPolicy(request: Body, config: Config, problems: Problem[]): NetworkPolicy | null {
  if (request.networkPolicy === undefined) {
    if (request.credentialProxy?.enabled === true) problems.push({ path: 'networkPolicy', reason: 'is required with credentialProxy' })
    return null
  }
  const read = readNetworkPolicy(request.networkPolicy)
  if (!read.ok) {
    problems.push(...read.problems)
    return null
  }
  const most = config.egress.max_rules
  if (read.policy.egress.length > most) problems.push({ path: 'networkPolicy.egress', reason: `has ${read.policy.egress.length} rules, more than egress.max_rules = ${most}` })
  else if (Buffer.byteLength(JSON.stringify(read.policy)) > mostPolicyBytes) problems.push({ path: 'networkPolicy', reason: `is longer than ${mostPolicyBytes} bytes` })
  if (config.egress.image === undefined) problems.push({ path: 'networkPolicy', reason: 'egress.image must be configured when networkPolicy is provided.' })
  // On docker0 the engine puts resolvers of its own choice; elsewhere a sidecar would find Docker's, which asks the sidecar.
  else if (config.upstreams.length === 0 && !config.docker.default_bridge) problems.push({ path: 'networkPolicy', reason: 'needs egress.dns_upstreams: this host names no resolver that a sandbox could reach.' })
  return read.policy
}

function readRenew(request: Body, problems: Problem[]): number | null {
  const text = request.extensions?.[renewKey]
  if (text === undefined) return null
  const seconds = /^\d{1,9}$/.test(text.trim()) ? Number(text.trim()) : 0
  if (seconds >= 300 && seconds <= 86400) return seconds
  problems.push({ path: `extensions["${renewKey}"]`, reason: 'must be an integer between 300 and 86400' })
  return null
}
