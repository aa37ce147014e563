/**
 * The tests' own internet: one network namespace behind a veth that holds the documentation ranges, every address an attack
 * aims at, a DNS server with the test's own zones, and servers on every port that record what reached them. A packet that gets
 * out of a sandbox either ends here, counted, or is dropped and counted by the fence. Needs root, ip, nft; the fence needs Docker.
 */
import { execa } from 'execa'
import { createInterface } from 'node:readline'
import { join } from 'node:path'
import { checkClaims } from './claims.ts'
import * as layout from './internet-layout.ts'
import { internetRules, readFlows, setNames, type Flow } from './internet-rules.ts'
import type { Command, SeenExchange, SeenQuestion } from './internet-servers.ts'
import type { Zones } from './zones.ts'

export type { Flow, SeenExchange, SeenQuestion, Zones }

export type InternetOptions = {
  readonly zones?: Zones
  /** Further addresses or CIDRs to hold, with a host route to each. Refused when the machine itself uses one. */
  readonly claims?: readonly string[]
}

export interface Internet extends AsyncDisposable {
  readonly netns: string
  /** For `[egress] dns_upstreams`: address and port of the DNS server. */
  readonly dns: string
  setZones(zones: Zones): Promise<void>
  /** Every packet that arrived since the last forget(), whether somebody listened or not. */
  flows(): Promise<Flow[]>
  /** What the servers were asked and told since the last forget(). */
  questions(): Promise<SeenQuestion[]>
  exchanges(): Promise<SeenExchange[]>
  forget(): Promise<void>
  /** From now on the bridge may forward into this internet and nowhere else; the rest is dropped and counted. */
  fence(bridge: string): Promise<void>
  /** Packets the fences dropped. Anything but 0 means that a test sent traffic to a place this internet does not hold. */
  strays(): Promise<number>
  /** Gives a network namespace a link (eth0), addresses and default routes of its own into this internet. */
  attach(netns: string): Promise<void>
  close(): Promise<void>
}

/** Waits for another internet on this machine to end first. Throws, with everything removed, when a part cannot be had. */
export async function startInternet(options: InternetOptions = {}): Promise<Internet> {
  const claims = [...layout.ownRanges, ...(options.claims ?? [])]
  const keeper = await startKeeper()
  try {
    await checkClaims(claims)
    await buildLink(claims)
    const servers = await startServers()
    const internet = new NetnsInternet(keeper, servers)
    await internet.setZones(options.zones ?? {})
    return internet
  } catch (error) {
    await keeper.end()
    throw error
  }
}

type Keeper = { end(): Promise<void> }

async function startKeeper(): Promise<Keeper> {
  const child = execa(process.execPath, [join(import.meta.dirname, 'internet-keeper.ts')], { detached: true, cleanup: false, buffer: false, stderr: 'inherit' })
  const ended = child.catch(() => undefined)
  const lines = createInterface({ input: child.stdout })
  const ready = await new Promise<boolean>((resolve) => {
    lines.on('line', (line) => (line === 'ready' ? resolve(true) : process.stderr.write('# another test internet is up: waiting for it to end\n')))
    void ended.then(() => resolve(false))
  })
  if (!ready) throw new Error('the keeper of the test internet ended before it was ready')
  return {
    async end() {
      child.stdin.end()
      await ended
    },
  }
}

/** Namespace, recorder, link, addresses, routes, in this order: nothing may arrive before the recorder is there. */
async function buildLink(claims: readonly string[]): Promise<void> {
  const { netns, hostLink, innerLink } = layout
  await execa`ip netns add ${netns}`
  await execa({ input: internetRules() })`ip netns exec ${netns} nft -f -`
  await batch([`link add ${hostLink} type veth peer name ${innerLink} netns ${netns}`])
  await batch(
    [
      'link set lo up',
      `address add ${layout.innerAddress}/30 dev ${innerLink}`,
      `address add ${layout.innerAddress6}/126 dev ${innerLink} nodad`,
      `link set ${innerLink} up`,
      `route add default via ${layout.hostAddress}`,
      ...claims.map((claim) => `route add local ${claim} dev lo`),
    ],
    ['-n', netns],
  )
  await batch([
    `address add ${layout.hostAddress}/30 dev ${hostLink}`,
    `address add ${layout.hostAddress6}/126 dev ${hostLink} nodad`,
    `link set ${hostLink} up`,
    ...claims.map((claim) => `route add ${claim} via ${claim.includes(':') ? layout.innerAddress6 : layout.innerAddress} dev ${hostLink}`),
  ])
}

/** Many `ip` commands in one process; it ends at the first that fails, and its message names the line. */
async function batch(commands: readonly string[], where: readonly string[] = []): Promise<void> {
  await execa({ input: `${commands.join('\n')}\n` })`ip ${where} -batch -`
}

type Answer = { readonly id: number; readonly questions?: SeenQuestion[]; readonly exchanges?: SeenExchange[] }
type Order<C = Command> = C extends Command ? Omit<C, 'id'> : never
type Servers = { ask(order: Order): Promise<Answer>; end(): Promise<void> }

/** Starts internet-servers.ts inside the namespace and waits until every port is open. */
async function startServers(): Promise<Servers> {
  const program = [process.execPath, join(import.meta.dirname, 'internet-servers.ts')]
  const child = execa({ buffer: false, stderr: 'inherit' })`ip netns exec ${layout.netns} ${program}`
  const ended = child.catch(() => undefined)
  const waiting = new Map<number, (answer: Answer | undefined) => void>()
  const opened = new Promise<Answer | undefined>((resolve) => waiting.set(0, resolve))
  createInterface({ input: child.stdout }).on('line', (line) => {
    const answer = JSON.parse(line) as Answer
    waiting.get(answer.id)?.(answer)
    waiting.delete(answer.id)
  })
  void ended.then(() => waiting.forEach((resolve) => resolve(undefined)))
  if ((await opened) === undefined) throw new Error('the servers of the test internet did not start')
  let last = 0
  return {
    async ask(order) {
      const id = ++last
      const answered = new Promise<Answer | undefined>((resolve) => waiting.set(id, resolve))
      child.stdin.write(`${JSON.stringify({ id, ...order })}\n`)
      const answer = await answered
      if (answer === undefined) throw new Error('the servers of the test internet are gone')
      return answer
    },
    async end() {
      child.stdin.end()
      await ended
    },
  }
}

class NetnsInternet implements Internet {
  readonly netns = layout.netns
  readonly dns = `${layout.dnsAddress}:53`
  readonly #keeper: Keeper
  readonly #servers: Servers
  #attached = 0

  constructor(keeper: Keeper, servers: Servers) {
    this.#keeper = keeper
    this.#servers = servers
  }

  async setZones(zones: Zones): Promise<void> {
    await this.#servers.ask({ do: 'zones', zones })
  }

  async flows(): Promise<Flow[]> {
    const listed = await Promise.all(setNames.map((name) => execa`ip netns exec ${layout.netns} nft -j list set inet internet ${name}`))
    return listed.flatMap(({ stdout }) => readFlows(stdout))
  }

  async questions(): Promise<SeenQuestion[]> {
    return (await this.#servers.ask({ do: 'seen' })).questions ?? []
  }

  async exchanges(): Promise<SeenExchange[]> {
    return (await this.#servers.ask({ do: 'seen' })).exchanges ?? []
  }

  async forget(): Promise<void> {
    await this.#servers.ask({ do: 'forget' })
    const input = setNames.map((name) => `flush set inet internet ${name}\n`).join('')
    await execa({ input })`ip netns exec ${layout.netns} nft -f -`
  }

  async fence(bridge: string): Promise<void> {
    const mark = ['-m', 'comment', '--comment', layout.ruleComment]
    // -I puts each before the last: traffic that stays on the bridge is Docker's business, the way in here is open, the rest ends.
    await execa`iptables -w 10 -I DOCKER-USER -i ${bridge} ${mark} -j DROP`
    await execa`iptables -w 10 -I DOCKER-USER -i ${bridge} -o ${bridge} ${mark} -j RETURN`
    await execa`iptables -w 10 -I DOCKER-USER -i ${bridge} -o ${layout.hostLink} ${mark} -j RETURN`
  }

  async strays(): Promise<number> {
    const { stdout } = await execa`iptables -w 10 -nvxL DOCKER-USER`
    const drops = stdout.split('\n').filter((line) => line.includes(`/* ${layout.ruleComment} */`) && line.includes(' DROP '))
    return drops.reduce((sum, line) => sum + Number(line.trim().split(/\s+/)[0]), 0)
  }

  async attach(netns: string): Promise<void> {
    const n = this.#attached++
    const [ours, theirs] = [`198.19.254.${n * 4 + 1}`, `198.19.254.${n * 4 + 2}`]
    const [ours6, theirs6] = [`fd5a:1170:${n}::1`, `fd5a:1170:${n}::2`]
    await batch([`link add to-${n} type veth peer name eth0 netns ${netns}`, `address add ${ours}/30 dev to-${n}`, `address add ${ours6}/126 dev to-${n} nodad`, `link set to-${n} up`], ['-n', layout.netns])
    await batch(
      ['link set lo up', `address add ${theirs}/30 dev eth0`, `address add ${theirs6}/126 dev eth0 nodad`, 'link set eth0 up', `route add default via ${ours}`, `route add default via ${ours6}`],
      ['-n', netns],
    )
  }

  async close(): Promise<void> {
    await this.#servers.end()
    await this.#keeper.end()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }
}
