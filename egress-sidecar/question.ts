/** Questions of our own: for the proof at start, probes of upstreams and the webhook's name. */
import { randomFillSync } from 'node:crypto'
import type { Resolver, Transport } from './answer.ts'

/** A query with recursion desired and a random id. `name` is in normal form (`normaliseName`), '' for the root. */
export function writeQuestion(name: string, type: number): Buffer {
  const labels = name === '' ? [] : name.split('.').flatMap((label) => [Buffer.of(label.length), Buffer.from(label, 'latin1')])
  const query = Buffer.concat([Buffer.of(0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0), ...labels, Buffer.of(0, type >> 8, type & 0xff, 0, 1)])
  return randomFillSync(query, 0, 2)
}

/** The resolver's reply as a promise. */
export function askOnce(resolver: Resolver, query: Buffer, questionEnd: number, transport: Transport): Promise<Buffer | null> {
  return new Promise((resolve) => resolver.ask(query, questionEnd, transport, resolve))
}
