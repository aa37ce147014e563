/** Asks every upstream the same question from time to time: one that is silent gets no questions until it answers again. */
import type { UdpResolver } from './resolver.ts'
import { recordTypes } from './packet.ts'
import { writeQuestion } from './question.ts'

export type UpstreamProbes = { close(): void }

export type ProbeOptions = {
  readonly resolver: UdpResolver
  /** What is asked: the root's name servers for '', else the addresses of this name. */
  readonly name: string
  readonly intervalSeconds: number
  readonly warn: (message: string) => void
}

/** The first round begins at once. */
export function startProbes({ resolver, name, intervalSeconds, warn }: ProbeOptions): UpstreamProbes {
  async function round(): Promise<void> {
    const query = writeQuestion(name, name === '' ? recordTypes.ns : recordTypes.a)
    const silent = await resolver.probe(query)
    for (const { address, port } of silent) warn(`[dns] upstream probe: no answer from ${address}:${port}`)
    if (silent.length === resolver.upstreams) warn('[dns] upstream probe: no upstream answers, all of them are asked')
  }
  const timer = setInterval(() => void round(), intervalSeconds * 1000)
  void round()
  return { close: () => clearInterval(timer) }
}
