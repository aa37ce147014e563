/**
 * Upstream DNS over UDP sockets that are opened once and held, their ports on every address. `connect` leaves them the one address that leads to
 * their upstream: cheaper, and an upstream that is not there is heard of at once; but then others can have the port on other addresses, and the
 * rules must keep them from using it (`ruleset.ts`). The question's bytes go out as they came, but for a new random id and the
 * case of its letters; an answer counts when both fit (RFC 5452, draft-vixie-dnsext-dns0x20). One that fits but for the case is a forgery or comes
 * from a server that does not keep it: TCP, where nobody can guess, tells which. Truncated answers are asked for again over TCP for clients that can
 * take them.
 */
import { once } from 'node:events'
import type { Resolver } from './answer.ts'
import { echoOf, mixCase, mixOwners, refusesUnread } from './echo.ts'
import { isTruncated, rcodes } from './packet.ts'
import { PendingTable, randomId } from './pending-table.ts'
import type { HeldPorts, Upstream } from './ruleset.ts'
import { Pending, type Channel, type UpstreamState } from './resolver-state.ts'
import { askTcp } from './resolver-tcp.ts'
import { connectSocket, isFrom, openSocket, proveRoute, typeOf } from './resolver-udp.ts'

export type ResolverOptions = {
  readonly upstreams: readonly Upstream[]
  /** For one question, over all upstreams. */
  readonly timeoutMs: number
  /** Off where the firewall lets only the UDP sockets out. */
  readonly tcp: () => boolean
  /** Told when an upstream does not keep the case of a question, and nothing comes from it over TCP: its answers are not used. */
  readonly unproven?: (upstream: Upstream) => void
  /** Whether names go out in a random case; on unless told. */
  readonly randomCase?: boolean
}

export type UdpResolver = Resolver & {
  /** How many there are, without those that no route leads to (IPv6 where it is off). */
  readonly upstreams: number
  /** Why the others cannot be asked. */
  readonly unroutable: readonly string[]
  /** Asks all of them, each for itself; those that give no answer at all (any rcode is one) are returned, and left out until they do. */
  probe(query: Buffer): Promise<readonly Upstream[]>
  /** Local ports of the sockets; they stay bound until `close`. */
  readonly ports: HeldPorts
  /** From now on the kernel takes datagrams from the upstreams only. Before, they are told apart here. */
  connect(): Promise<void>
  close(): void
}

/** Per upstream; with the 16 bits of the id this is what a blind forger has to guess. */
const socketsPerUpstream = 16
const sweepMs = 50
/** Questions on the way at a time; more are a flood, and the sandbox's own stub gives up after 5 s. */
const maxPending = 8192
/** Of them, those asked again over TCP: each holds a connection to an upstream. */
const maxWholes = 128
/** An upstream that let this many questions in a row time out is asked last for a while. */
const failuresToDistrust = 3
const distrustMs = 30_000
/** Behind an answer that was right but for the case: whoever got so far had the right id. */
const guardedMs = 30_000
/** An upstream's answer to a probe is not waited for any longer. */
const probeMs = 2000
/** Questions within it came together. */
const togetherMs = 1
/** Before the next upstream is asked, or the last one once more; clients' resolvers wait 5 s for everything together. */
const patienceMs = 1200
/** Bytes of a datagram that every client takes. RFC 1035 4.2.1 */
const anyClientTakes = 512

const keepsCase = (state: UpstreamState): boolean => state.keepsCase

/** Resolves when all sockets are bound. @throws when no upstream can be reached at all */
export async function createResolver({ upstreams, timeoutMs, tcp, unproven = () => undefined, randomCase = true }: ResolverOptions, now: () => number): Promise<UdpResolver> {
  const states: UpstreamState[] = []
  const unroutable: string[] = []
  let pendingCount = 0
  let wholes = 0
  let sweeper: NodeJS.Timeout | null = null
  let connected = false
  let closed = false

  for (const upstream of upstreams) {
    const state: UpstreamState = { upstream, channels: [], channel: null, chosenAt: 0, failures: 0, distrustedUntil: 0, silent: false, keepsCase: randomCase, guardedUntil: 0, proof: null }
    try {
      await proveRoute(upstream)
      for (let i = 0; i < socketsPerUpstream; i++) state.channels.push(await openChannel(state))
      states.push(state)
    } catch (error) {
      for (const { socket } of state.channels) socket.close()
      unroutable.push(`${upstream.address}: ${(error as Error).message}`)
    }
  }
  if (states.length === 0) throw new Error(`no upstream can be reached: ${unroutable.join('; ')}`)

  async function openChannel(state: UpstreamState): Promise<Channel> {
    const socket = openSocket(state.upstream)
    const pending = new PendingTable<Pending>()
    // The upstream's port is closed, or the way there is: do not wait for what cannot come.
    const failAll = (): void => {
      for (const [id, waiting] of pending.all()) {
        distrust(state)
        channel.pending.delete(id, waiting)
        forget(channel, waiting)
        next(waiting)
      }
    }
    const channel: Channel = { socket, pending, sent: (error) => void (error !== null && failAll()) }
    const listening = once(socket, 'listening')
    socket.bind({ port: 0, exclusive: true })
    await listening
    socket.on('message', (reply, from) => {
      if (connected || isFrom(state.upstream, from)) receive(state, channel, reply)
    })
    socket.on('error', failAll)
    return channel
  }

  function receive(state: UpstreamState, channel: Channel, reply: Buffer): void {
    if (reply.length < 12) return
    const id = reply.readUInt16BE(0)
    const pending = channel.pending.get(id)
    if (pending === null) return
    const echo = echoOf(reply, pending.query, pending.questionEnd)
    if (echo === 'none' && !refusesUnread(reply)) return
    channel.pending.delete(id, pending)
    if (echo !== 'none' && state.keepsCase && pending.mask !== 0 && (echo === 'folded' || now() < state.guardedUntil)) return void askProof(state, channel, pending, reply)
    forget(channel, pending)
    if (echo === 'none') return take(pending, reply)
    if (echo === 'exact') restoreCase(reply, pending)
    state.failures = 0
    take(pending, reply)
  }

  /** One question at a time: all that a server which does not keep the case answered meanwhile needs no proof of its own. */
  async function askProof(state: UpstreamState, channel: Channel, pending: Pending, folded: Buffer): Promise<void> {
    while (state.proof !== null) await state.proof
    const proven = await prove(state, pending, folded)
    if (state.keepsCase) state.guardedUntil = now() + guardedMs
    if (pending.settled) return
    forget(channel, pending)
    if (proven === null) next(pending)
    else take(pending, proven)
  }

  /**
   * The same upstream over TCP. One that says it has no TCP is taken at its word, without the case, as by everybody else. Where nothing comes, what
   * came before is not believed: root in the sandbox can see to it that our TCP gets nowhere.
   */
  async function prove(state: UpstreamState, pending: Pending, folded: Buffer): Promise<Buffer | null> {
    if (!state.keepsCase) return folded
    const { query, questionEnd } = pending
    const left = Math.min(patienceMs, pending.deadline - now())
    if (closed || pending.settled || left <= 0) return null
    const asked = askTcp(query, questionEnd, state.upstream, left)
    state.proof = asked
    const reply = await asked
    state.proof = null
    if (pending.settled) return null
    if (reply === null) {
      if (left > patienceMs / 2) unproven(state.upstream)
      return null
    }
    const echo = reply === 'refused' ? 'none' : echoOf(reply, query, questionEnd)
    if (echo !== 'exact') state.keepsCase = false
    if (reply === 'refused') return folded
    if (echo === 'exact') restoreCase(reply, pending)
    if (pending.transport === 'udp' && reply.length > anyClientTakes) reply[2] = (reply[2] as number) | 2
    return reply
  }

  /** As the asker wrote it, also where it stands once more in front of the records: programs show that name to people. */
  function restoreCase(reply: Buffer, { query, questionEnd, mask }: Pending): void {
    mixOwners(reply, query, questionEnd, mask)
    mixCase(reply, questionEnd, mask)
  }

  function take(pending: Pending, reply: Buffer): void {
    const rcode = (reply[3] as number) & 0xf
    if (rcode === rcodes.noError || rcode === rcodes.nxDomain) return settle(pending, reply)
    pending.failure ??= reply
    next(pending)
  }

  function send(pending: Pending, time: number): void {
    const state = pending.order[pending.tried++] as UpstreamState
    pending.waitUntil = Math.min(pending.deadline, time + patienceMs)
    const channel = channelOf(state, time)
    const id = channel.pending.add(pending)
    if (id === -1) return settle(pending, pending.failure)
    pending.channel = channel
    pending.id = id
    pending.query.writeUInt16BE(id, 0)
    // The same for all that are asked: an answer of the first is compared with it, also when others were asked since.
    if (pending.tried === 1) mixAgain(pending, pending.order.some(keepsCase) && tcp() ? (randomId() << 16) | randomId() : 0)
    transmit(state, channel, pending.query)
    sweeper ??= setInterval(sweep, sweepMs)
  }

  /** Hearing of each datagram costs a tick of its own. An upstream that cannot be reached is heard of by the connected socket's error, at the latest by time. */
  function transmit({ upstream, failures }: UpstreamState, { socket, sent }: Channel, query: Buffer): void {
    if (connected) failures === 0 ? socket.send(query) : socket.send(query, sent)
    else socket.send(query, upstream.port, upstream.address, failures === 0 ? undefined : sent)
  }

  /**
   * Any channel, and for questions that come together the same: their answers then wait at one socket, and are fetched together. What a
   * forger has to guess stays the same, since a hit is as likely at one port with many ids as at many ports with few.
   */
  function channelOf(state: UpstreamState, time: number): Channel {
    if (state.channel === null || time - state.chosenAt > togetherMs) {
      state.channel = state.channels[randomId() % state.channels.length] as Channel
      state.chosenAt = time
    }
    return state.channel
  }

  /** From what it was to what the asker wrote, and from there on: one inversion for both. */
  function mixAgain(pending: Pending, mask: number): void {
    mixCase(pending.query, pending.questionEnd, pending.mask ^ mask)
    pending.mask = mask
  }

  function distrust(state: UpstreamState): void {
    if (++state.failures >= failuresToDistrust) state.distrustedUntil = now() + distrustMs
  }

  /** Nothing more is awaited from there. */
  function forget(channel: Channel, pending: Pending): void {
    if (pending.channel === channel) pending.channel = null
    else pending.earlier = pending.earlier.filter((way) => way.channel !== channel)
  }

  /** Asks the next one, unless the last one asked may still answer; when all were asked, those that were slow have the time that is left. */
  function next(pending: Pending): void {
    if (pending.channel !== null) return
    const time = now()
    if (closed || time >= pending.deadline) settle(pending, pending.failure)
    else if (pending.tried < pending.order.length) send(pending, time)
    else if (pending.earlier.length === 0) settle(pending, pending.failure)
  }

  function settle(pending: Pending, reply: Buffer | null): void {
    if (pending.settled) return
    pending.settled = true
    if (pending.channel !== null) pending.channel.pending.delete(pending.id, pending)
    for (const { channel, id } of pending.earlier) channel.pending.delete(id, pending)
    mixAgain(pending, 0)
    if (reply !== null && isTruncated(reply) && pending.transport === 'tcp' && tcp()) void askWhole(pending).then((whole) => finish(pending, whole))
    else finish(pending, reply)
  }

  function finish({ done }: Pending, reply: Buffer | null): void {
    pendingCount--
    done(reply)
  }

  /** In the time that is left, of which the last upstream gets the rest. */
  async function askWhole({ query, questionEnd, deadline }: Pending): Promise<Buffer | null> {
    if (wholes >= maxWholes) return null
    wholes++
    let whole: Buffer | 'refused' | null = null
    const order = inOrder(now())
    for (let tried = 0; tried < order.length && (whole === null || whole === 'refused'); tried++) {
      const left = deadline - now()
      if (closed || left <= 0) break
      query.writeUInt16BE(randomId(), 0)
      whole = await askTcp(query, questionEnd, (order[tried] as UpstreamState).upstream, tried === order.length - 1 ? left : Math.min(left, patienceMs))
    }
    wholes--
    return whole === 'refused' ? null : whole
  }

  // One timer for all: setting one per question would cost more than the question.
  function sweep(): void {
    if (pendingCount === 0 && sweeper !== null) {
      clearInterval(sweeper)
      sweeper = null
      return
    }
    const time = now()
    for (const state of states) for (const channel of state.channels) for (const [id, pending] of channel.pending.all()) overdue(state, channel, id, pending, time)
  }

  /** The last upstream gets the same datagram once more, for the first may be lost: an answer to either counts. */
  function overdue(state: UpstreamState, channel: Channel, id: number, pending: Pending, time: number): void {
    const current = pending.channel === channel
    if (time >= pending.deadline) {
      if (current) distrust(state)
      return settle(pending, pending.failure)
    }
    if (!current || time < pending.waitUntil) return
    if (pending.tried === pending.order.length) {
      pending.waitUntil = pending.deadline
      return transmit(state, channel, pending.query)
    }
    distrust(state)
    pending.earlier = [...pending.earlier, { channel, id }]
    pending.channel = null
    next(pending)
  }

  function inOrder(time: number): readonly UpstreamState[] {
    if (allTrusted(time)) return states
    const heard = states.every((s) => s.silent) ? states : states.filter((s) => !s.silent)
    return [...heard.filter((s) => s.distrustedUntil <= time), ...heard.filter((s) => s.distrustedUntil > time)]
  }

  function allTrusted(time: number): boolean {
    for (const state of states) if (state.silent || state.distrustedUntil > time) return false
    return true
  }

  function portsOf(type: 'udp4' | 'udp6'): number[] {
    return states.filter(({ upstream }) => typeOf(upstream) === type).flatMap(({ channels }) => channels.map(({ socket }) => socket.address().port))
  }

  async function probe(query: Buffer): Promise<readonly Upstream[]> {
    await Promise.all(states.map(async (state) => {
      pendingCount++
      const time = now()
      const reply = await new Promise((resolve) => send(new Pending(Buffer.from(query), query.length, 'udp', resolve, [state], time + Math.min(probeMs, timeoutMs)), time))
      state.silent = reply === null && !closed
      if (reply !== null) state.distrustedUntil = 0
    }))
    return states.filter((state) => state.silent).map(({ upstream }) => upstream)
  }

  return {
    upstreams: states.length,
    unroutable,
    probe,
    ports: { 4: portsOf('udp4'), 6: portsOf('udp6') },
    async connect() {
      await Promise.all(states.flatMap(({ upstream, channels }) => channels.map(({ socket }) => connectSocket(socket, upstream))))
      connected = true
    },
    ask(query, questionEnd, transport, done) {
      if (pendingCount >= maxPending) return done(null)
      pendingCount++
      const time = now()
      send(new Pending(query, questionEnd, transport, done, inOrder(time), time + timeoutMs), time)
    },
    close() {
      closed = true
      if (sweeper !== null) clearInterval(sweeper)
      for (const { channels } of states) {
        for (const channel of channels) {
          for (const [, waiting] of channel.pending.all()) settle(waiting, null)
          channel.socket.close()
        }
      }
    },
  }
}
