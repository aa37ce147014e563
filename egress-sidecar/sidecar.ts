/**
 * Wires the parts and starts them in the order that fails closed: the port, everything refused, resolver sockets, exemption,
 * policy, checks. Only then is the sidecar ready; whatever goes wrong before or after ends the process and leaves the rules.
 */
import { randomInt } from 'node:crypto'
import { access } from 'node:fs/promises'
import { networkInterfaces } from 'node:os'
import { performance } from 'node:perf_hooks'
import { compilePolicy, type Rules } from '#policies/compile.ts'
import { listenAdmin, type Admin } from './admin.ts'
import { createAlwaysFiles, readLogSkip } from './always-files.ts'
import { answer, type Outcome } from './answer.ts'
import { failedChecks, rulesPresent } from './checks.ts'
import type { Config } from './config.ts'
import { createControlPlace } from './control.ts'
import { chooseExemption, readSelf, type ChosenExemption } from './exemption.ts'
import { createFirewall, type Firewall } from './firewall.ts'
import { listenDns, type DnsListener, type Handler } from './listen.ts'
import { createAddressJudge, knownResolvers } from './judge.ts'
import type { Log } from './log.ts'
import { createMetrics } from './metrics.ts'
import { appendIptables, createNft, NftError, type Nft } from './nft.ts'
import { emptyReply, rcodes, readQuestion } from './packet.ts'
import { readPolicyFile } from './policy-file.ts'
import { createPolicyKeeper, type PolicyKeeper } from './policy-keeper.ts'
import { askOnce } from './question.ts'
import { createResolver, type UdpResolver } from './resolver.ts'
import { askEachOnce } from './same-question.ts'
import { aliveStatements, askAliveStatement, bootStatements, closeStatements, deniedCounter, dnsPort, heartbeat, readDenied } from './ruleset.ts'
import { startProbes, type UpstreamProbes } from './upstream-probes.ts'
import { createWebhook, type Webhook } from './webhook.ts'

export type Sidecar = {
  /** Resolves when the policy is enforced and proved. @throws StartError, leaving everything refused */
  start(): Promise<void>
  /** Ends without opening anything: only the sidecar's own way out goes. */
  close(): Promise<void>
}

/** Why the namespace is not protected. */
export class StartError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'StartError'
  }
}

/** The operator's files are looked at this often; the original promises 60 s. */
const reloadMs = 10_000

/** @param lost called once it is running, when it can no longer vouch for the rules: it must be closed */
export function createSidecar(config: Config, log: Log, lost: (reason: string) => void): Sidecar {
  const filter = config.mode === 'dns+nft'
  const metrics = createMetrics(new Map([...config.attributes, ...(config.sandboxId === '' ? [] : [['sandbox_id', config.sandboxId] as const])]))
  let unready = 'not ready'
  let nft: Nft | null = null
  let firewall: Firewall | null = null
  let keeper: PolicyKeeper | null = null
  let resolver: UdpResolver | null = null
  let listener: DnsListener | null = null
  let admin: Admin | null = null
  let reloader: NodeJS.Timeout | null = null
  let probes: UpstreamProbes | null = null
  let webhook: Webhook | null = null
  /** The rules are not ours to touch. */
  let another = false
  let beating: NodeJS.Timeout | null = null
  let counting: Promise<number | null> | null = null

  async function start(): Promise<void> {
    if (await inHostNamespace()) throw new StartError('this is the network namespace of the host: refusing to filter it')
    // 1. one sidecar for one namespace: whoever has the port has the table
    const seen = new Set<string>()
    let handler: Handler = (message, _transport, done) => {
      const question = readQuestion(message)
      if (question === null || typeof question === 'number') return done(null)
      if (question.name !== null && seen.size < 1000) seen.add(question.name)
      done(emptyReply(message, question.end, rcodes.servFail))
    }
    const ipv6 = hasIpv6Loopback()
    const kernel = (nft = createNft())
    const listening = await listenDns(ipv6 ? ['127.0.0.1', '::1'] : ['127.0.0.1'], dnsPort, (message, transport, done) => handler(message, transport, done)).catch((error: Error) => error)
    if (listening instanceof Error && (await anotherLives(kernel))) {
      another = true
      throw new StartError(`another sidecar guards this namespace: ${listening.message}`)
    }
    // 2. nothing leaves any more
    await kernel.apply([...bootStatements(config.http.port), ...(listening instanceof Error ? [] : aliveStatements())]).catch((error: Error) => {
      throw new StartError(`the firewall cannot be written (NET_ADMIN is needed): ${error.message}`, { cause: error })
    })
    if (listening instanceof Error) throw listening
    listener = listening
    beating = setInterval(() => void beat(kernel), heartbeat.every * 1000)
    admin = await listenAdmin(config.http, {
      keeper: () => keeper,
      token: config.token,
      enforcementMode: config.mode,
      unready: () => unready,
      floor: config.floor,
      changed: ({ policy, rules }, change) => {
        metrics.policyChanged()
        log.event('info', 'egress.updated', 'egress policy updated', { change, 'egress.default': policy.defaultAction, rules })
      },
      unauthorized: (from) => log.limited('egress.unauthorized', `policy API: a request from ${from} without the right token`),
      refused: ({ status, message }) => log.event(status >= 500 ? 'error' : 'warn', 'egress.update_failed', 'egress policy update failed', { error: message }),
      inspect: async () => (firewall === null ? null : await missingRules(kernel, firewall).catch((error: Error) => error.message)) ?? '',
      metrics: async () => metrics.text({ refused: await deniedPackets(kernel), learned: firewall?.learned ?? 0, rules: keeper?.policy.egress.length ?? 0, elements: elementsOf(firewall?.rules), updates: firewall?.updates ?? 0 }),
    })
    // 3. our own way to the resolvers
    const now = (): number => performance.now()
    let tcpIsExempt = false
    const asking = (resolver = await createResolver({
      upstreams: config.upstreams, timeoutMs: config.upstreamTimeoutSeconds * 1000, tcp: () => tcpIsExempt, randomCase: config.randomCase,
      unproven: ({ address }) => log.limited('egress.upstream_case', `upstream ${address} does not keep the case of names and gives no answer over TCP: its answers are not used (OPENSANDBOX_EGRESS_DNS_RANDOM_CASE=off would use them)`),
    }, now))
    const exemption: ChosenExemption = await chooseExemption(config.exemption, { nft: kernel, self: readSelf, appendIptables, inContainer: await inContainer(), ipv6: config.upstreams.some(({ address }) => address.includes(':')) || (ipv6 && config.denyWebhook !== null), towards: exemptPlaces(config) })
    tcpIsExempt = exemption.protocols.includes('tcp')
    // Where source ports are all there is, nobody else may have them on any address.
    if (exemption.kind !== 'ports') await asking.connect()
    for (const problem of asking.unroutable) log.event('warn', 'egress.upstream_unroutable', `upstream not used: ${problem}`)
    // 4. the policy
    const files = createAlwaysFiles()
    const always = await files.read()
    const notLogged = await readLogSkip()
    const found = await readPolicyFile(config.policyFile).catch((error: Error) => {
      throw new StartError(error.message, { cause: error })
    })
    if (found.warning !== null) log.event('warn', 'egress.policy_file', found.warning)
    const policy = found.policy ?? config.rules
    const rules = compilePolicy(policy, { alwaysDeny: always.deny, alwaysAllow: always.allow, floor: config.floor })
    const setting = { filter, ipv6, exemption, upstreams: config.upstreams, openResolvers: config.openResolvers, held: asking.ports, doh: { everywhere: config.blockDoh && config.dohAddresses.length === 0, addresses: config.blockDoh ? config.dohAddresses : [] }, control: config.denyWebhook !== null, apiPort: config.http.port }
    const mayOpen = createAddressJudge([...config.upstreams.map((upstream) => upstream.address), ...knownResolvers, ...(config.blockDoh ? config.dohAddresses : [])])
    const guard = (firewall = await createFirewall(rules, { nft: kernel, setting, mayOpen, now, firstGeneration: randomInt(1, 0x7fffffff), lost: (reason) => {
      // So that closing shuts everything.
      unready = 'the rules are lost'
      lost(`nobody knows which policy the kernel enforces: ${reason}`)
    } }))
    probes = startProbes({ resolver: asking, name: config.probeName, intervalSeconds: config.probeSeconds, warn: (message) => log.event('warn', 'egress.upstream_probe', message) })
    // 5. proof
    const problems = await failedChecks({ nft: kernel, filter, rules, probe: { seen }, askUpstream: (query, end) => askOnce(asking, query, end, 'udp') })
    if (problems.length > 0) throw new StartError(problems.join('; '))
    const hook = (webhook = config.denyWebhook === null ? null : await openWebhook(config.denyWebhook, { resolver: asking, nft: kernel, ipv6 }, exemption))
    const report = (outcome: Outcome): void => {
      const { question: { name }, result } = outcome
      metrics.outcome(outcome)
      if (result === 'answered' && name !== null && notLogged(name)) return
      log.outcome(outcome)
      if (result === 'denied' && hook !== null && name !== null && name !== '') hook.denied(name)
    }
    const answerDeps = { resolver: askEachOnce(asking), firewall: guard, mayOpen, now, report }
    handler = (message, transport, done) => answer(message, transport, answerDeps, done)
    const kept = (keeper = createPolicyKeeper(policy, always, { firewall: guard, files, policyFile: config.policyFile, maxRules: config.maxRules, floor: config.floor }))
    reloader = setInterval(() => void reload(kept), reloadMs)
    unready = ''
    log.event('info', 'egress.loaded', 'egress policy loaded', { 'egress.default': policy.defaultAction, rules: policy.egress, mode: config.mode, exemption: exemption.kind, exemption_why: exemption.why, ipv6 })
    if (!filter) log.event('warn', 'egress.dns_only', 'mode dns filters names only: connections to addresses are not restricted')
  }

  async function openWebhook(url: URL, reaching: { resolver: UdpResolver; nft: Nft; ipv6: boolean }, exemption: ChosenExemption): Promise<Webhook> {
    if (filter && !exemption.protocols.includes('tcp')) log.event('warn', 'egress.webhook_by_policy', 'exempt by ports: the webhook is reached only where the policy allows its address')
    const host = url.hostname.replaceAll(/[[\]]/g, '')
    const place = createControlPlace({ ...reaching, host, port: webhookPort(url), now: () => performance.now() })
    return createWebhook({ url, sandboxId: config.sandboxId, place, warn: (message) => log.limited('egress.webhook', message) })
  }

  /** Says that we live; and learns that somebody took the table away, which leaves everything open. */
  async function beat(kernel: Nft): Promise<void> {
    try {
      await kernel.apply(aliveStatements())
    } catch (error) {
      log.limited('egress.heartbeat', (error as Error).message)
      if (!refused(error) || firewall === null) return
      const problem = await missingRules(kernel, firewall).catch((reason: Error) => (refused(reason) ? reason.message : null))
      if (problem === null || unready !== '') return
      unready = 'the rules are lost'
      lost(`the rules are not in the kernel any more: ${problem}`)
    }
  }

  /** One listing for all who ask at the same time. */
  function deniedPackets(kernel: Nft): Promise<number | null> {
    return (counting ??= kernel.list(deniedCounter).then(readDenied, () => null).finally(() => (counting = null)))
  }

  /** What the kernel lacks of the policy; a change in between is no lack. */
  async function missingRules(kernel: Nft, guard: Firewall): Promise<string | null> {
    for (let tries = 0; ; tries++) {
      const { rules } = guard
      const problem = await rulesPresent({ nft: kernel, filter, rules })
      if (problem === null || rules === guard.rules || tries === 5) return problem
    }
  }

  async function reload(kept: PolicyKeeper): Promise<void> {
    try {
      if (await kept.reload()) log.event('info', 'egress.always_reloaded', 'always rules reloaded', { deny: kept.always.deny.length, allow: kept.always.allow.length })
    } catch (error) {
      log.event('warn', 'egress.always_failed', `always rules not reloaded, the old ones hold: ${(error as Error).message}`)
    }
  }

  return {
    start,
    async close() {
      const enforced = unready === ''
      unready = 'stopping'
      if (reloader !== null) clearInterval(reloader)
      if (beating !== null) clearInterval(beating)
      probes?.close()
      webhook?.close()
      await admin?.close()
      // The exemption goes before its ports are given up. A start that failed leaves nothing open at all.
      if (!another) await nft?.apply(enforced ? closeStatements() : bootStatements(config.http.port)).catch((error: Error) => log.event('error', 'egress.close', error.message))
      nft?.close()
      await listener?.close()
      resolver?.close()
    },
  }
}

function refused(error: unknown): boolean {
  return error instanceof NftError && error.outcome === 'refused'
}

function anotherLives(kernel: Nft): Promise<boolean> {
  return kernel.apply([askAliveStatement]).then(() => true, () => false)
}

function elementsOf(rules?: Rules): number {
  return rules === undefined ? 0 : rules.allow4.length + rules.allow6.length + rules.deny4.length + rules.deny6.length
}

/** Protocols and ports, each pair once, that the sidecar itself may have to go to. */
function exemptPlaces({ upstreams, denyWebhook }: Config): { protocol: 'udp' | 'tcp'; port: number }[] {
  const upstreamPorts = new Set(upstreams.map(({ port }) => port))
  const tcp = new Set([...upstreamPorts, ...(denyWebhook === null ? [] : [webhookPort(denyWebhook)])])
  return [...[...upstreamPorts].map((port) => ({ protocol: 'udp' as const, port })), ...[...tcp].map((port) => ({ protocol: 'tcp' as const, port }))]
}

function webhookPort({ port, protocol }: URL): number {
  return Number(port) || (protocol === 'https:' ? 443 : 80)
}

/** An IPv6 question can be redirected only to ::1. */
function hasIpv6Loopback(): boolean {
  return Object.values(networkInterfaces()).some((list) => list?.some(({ address }) => address === '::1'))
}

/** Some sysctls exist in the first network namespace only. */
async function inHostNamespace(): Promise<boolean> {
  return exists('/proc/sys/net/core/netdev_budget')
}

async function inContainer(): Promise<boolean> {
  return process.pid === 1 || (await exists('/.dockerenv')) || (await exists('/run/.containerenv')) || process.env['KUBERNETES_SERVICE_HOST'] !== undefined
}

function exists(path: string): Promise<boolean> {
  return access(path).then(() => true, () => false)
}
