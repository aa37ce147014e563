/**
 * DNS through the egress sidecar against dnsmasq without a cache, each in a network namespace of its own, both asking one upstream. The
 * sidecar enforces: names are judged by a policy, addresses are in the kernel before the answer goes out, and questions reach it by redirect
 * as a sandbox's do. A bare forwarder in Node shows what the judging costs.
 */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { findTool } from '../debian.ts'
import { askMany, type DnsLoad } from '../dns-load.ts'
import { makeIslands, type Island } from '../namespaces.ts'
import { runCommand, type Cleanups, type Program } from '../program.ts'
import type { Arena, Effort, Target } from '../rounds.ts'
import { startSidecar } from './sidecar-program.ts'

const names = 1000
const rate = 4000
const peers = path.join(import.meta.dirname, '..', 'peers')
const listenPort = 15353
const peerPort = 5353
const behindRedirect = 'dnsmasq, through a redirect'
const asked = 'sidecar, asked directly'
/** Questions to this address are answered by dnsmasq all the same; it has no other meaning. RFC 5737 */
const anybody = '192.0.2.1'

export const egress: Target = { title: 'Egress sidecar: DNS questions', start }

async function start({ seconds }: Effort, cleanups: Cleanups): Promise<Arena> {
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-dns-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const questions = path.join(folder, 'questions')
  await writeFile(questions, Array.from({ length: names }, (_, index) => `name${index}.bench.example A\n`).join(''))

  const { upstream, islands } = await makeIslands(['sidecar', 'dnsmasq', 'redirected', 'bare'], cleanups)
  const [own, masq, redirected, bare] = islands as [Island, Island, Island, Island]
  await cleanups.start(process.execPath, [path.join(peers, 'dns-upstream.ts')], { namespace: upstream, ready: listens(upstream, 53) })
  const programs = { sidecar: await startOwn(own, cleanups), dnsmasq: await startDnsmasq(masq, cleanups), redirected: await startDnsmasq(redirected, cleanups), bare: await startBare(bare, cleanups) }

  await redirectQuestions(redirected)

  const loopback = '127.0.0.1'
  const loads: Readonly<Record<string, DnsLoad>> = {
    dnsmasq: { namespace: masq.name, server: { address: loopback, port: peerPort }, program: programs.dnsmasq, questions, seconds },
    [behindRedirect]: { namespace: redirected.name, server: { address: anybody, port: 53 }, program: programs.redirected, questions, seconds },
    sidecar: { namespace: own.name, server: { address: own.upstream, port: 53 }, program: programs.sidecar, questions, seconds },
    [asked]: { namespace: own.name, server: { address: loopback, port: listenPort }, program: programs.sidecar, questions, seconds },
    'bare Node forwarder': { namespace: bare.name, server: { address: loopback, port: peerPort }, program: programs.bare, questions, seconds },
  }
  // The first run teaches the kernel every address and compiles the hot code.
  for (let run = 0; run < 2; run++) for (const load of Object.values(loads)) await askMany(load)

  const contenders = (names: readonly string[], speed?: number) => Object.fromEntries(names.map((name) => [name, () => askMany(loads[name]!, speed)]))
  const cpu = { key: 'cpu', label: 'CPU a query', unit: 'µs' }
  return {
    loads: [{
      title: `${names} allowed names, 64 questions in flight, as fast as it goes`, rounds: 7, baseline: 'dnsmasq',
      measures: [cpu, { key: 'throughput', label: 'throughput', unit: '1/s' }], contenders: contenders(Object.keys(loads)),
      goals: [{ contender: 'sidecar', measure: 'cpu', sense: 'at most', limit: 1 }, { contender: 'sidecar', measure: 'cpu', against: behindRedirect, sense: 'at most', limit: 1 }, { contender: asked, measure: 'cpu', sense: 'at most', limit: 1 }],
      notes: ['Through a redirect: the kernel remembers connections and writes addresses anew, as it must for whoever is asked in place of the server that was meant; the sidecar is asked that way.'],
    }, {
      title: `the same at ${rate} a second`, rounds: 7, baseline: 'dnsmasq',
      measures: [cpu, { key: 'p50', label: 'p50', unit: 'ms' }, { key: 'p99', label: 'p99', unit: 'ms' }], contenders: contenders(['dnsmasq', behindRedirect, 'sidecar', 'bare Node forwarder'], rate),
      goals: [{ contender: 'sidecar', measure: 'cpu', sense: 'at most', limit: 1 }, { contender: 'sidecar', measure: 'cpu', against: behindRedirect, sense: 'at most', limit: 1 }],
    }],
    notes: [
      'dnsmasq: no cache, no hosts. Sidecar: dns+nft, default deny, 64 rules, no cache of answers, addresses already learned.',
      'CPU is user and system time of the server and its children (nft too), divided by the answered queries of the round.',
    ],
  }
}

function startOwn(island: Island, cleanups: Cleanups): Promise<Program> {
  const others = Array.from({ length: 63 }, (_, index) => ({ action: 'allow', target: `other${index}.example` }))
  const policy = { defaultAction: 'deny', egress: [...others, { action: 'allow', target: '*.bench.example' }] }
  return startSidecar(island, { OPENSANDBOX_EGRESS_RULES: JSON.stringify(policy) }, cleanups)
}

async function startDnsmasq({ name, upstream }: Island, cleanups: Cleanups): Promise<Program> {
  const { file, env } = await findTool('dnsmasq', 'dnsmasq-base')
  const args = ['--keep-in-foreground', '--conf-file=/dev/null', '--no-resolv', '--no-hosts', '--cache-size=0', '--dns-forward-max=1000', '--user=root', '--pid-file=']
  return cleanups.start(file, [...args, '--listen-address=127.0.0.1', '--bind-interfaces', `--port=${peerPort}`, `--server=${upstream}`], { namespace: name, env, ready: listens(name, peerPort) })
}

/** What a sandbox's questions meet, and no more: a redirect, and one rule that knows connections. */
async function redirectQuestions({ name }: Island): Promise<void> {
  const statements = [
    'add table inet redirected', 'add chain inet redirected nat { type nat hook output priority -110; }', `add rule inet redirected nat ip daddr ${anybody} udp dport 53 redirect to :${peerPort}`,
    'add chain inet redirected out { type filter hook output priority 0; }', 'add rule inet redirected out ct state established accept',
  ]
  await runCommand('nft', [statements.join('; ')], { namespace: name })
}

async function startBare({ name, upstream }: Island, cleanups: Cleanups): Promise<Program> {
  return cleanups.start(process.execPath, [path.join(peers, 'dns-forward.ts'), String(peerPort), upstream], { namespace: name, ready: listens(name, peerPort) })
}

/** Whether a UDP socket is bound to the port in that namespace. */
function listens(namespace: string, port: number): () => Promise<boolean> {
  return async () => (await runCommand('ss', ['--no-header', '--listening', '--udp', '--numeric'], { namespace })).includes(`:${port} `)
}
