/** What an upstream's reply gives back of the question: the proof that it is one, and the letters' case, part of that proof. */
import { headerLength, labelByte, rcodes, uint16 } from './packet.ts'

/**
 * Inverts the case of the question's letters that have a bit in `mask`, lowest first; the same call again restores it. Names mean the same in any
 * case, and servers give the question back as they got it: whoever did not see it does not know how. draft-vixie-dnsext-dns0x20
 */
export function mixCase(message: Buffer, questionEnd: number, mask: number): void {
  // Lengths of labels are below any letter, so the bytes need not be told apart. Type and class, the last four, must not change.
  for (let at = headerLength; at < questionEnd - 4 && mask !== 0; at++) {
    const byte = (message[at] as number) | 0x20
    if (byte < 0x61 || byte > 0x7a) continue
    if ((mask & 1) !== 0) message[at] = (message[at] as number) ^ 0x20
    mask >>>= 1
  }
}

/** The same for owners of records that an upstream has written out, as it was asked for them, where most point at the question. */
export function mixOwners(message: Buffer, query: Buffer, questionEnd: number, mask: number): void {
  if (mask === 0 || questionEnd === message.length || (message[questionEnd] as number) >= 0xc0) return
  const name = query.subarray(headerLength, questionEnd - 4)
  for (let at = message.indexOf(name, questionEnd); at !== -1; at = message.indexOf(name, at + name.length)) {
    // `mixCase` counts from a header on, and leaves the four bytes behind the name alone.
    mixCase(message.subarray(at - headerLength), name.length + headerLength + 4, mask)
  }
}

/** A server that could not read the question may give none back (RFC 1035 4.1.1: format error): a header with an error, and nothing else. */
export function refusesUnread(reply: Buffer): boolean {
  const rcode = uint16(reply, 2) & 0xf
  return reply.length === headerLength && (uint16(reply, 2) & 0xfa00) === 0x8000 && reply.readUInt32BE(4) === 0 && reply.readUInt32BE(8) === 0 && rcode !== rcodes.noError && rcode !== rcodes.nxDomain
}

/** How `reply` gives the question back (RFC 5452 9.1): byte for byte, in another case, or not at all. */
export function echoOf(reply: Buffer, query: Buffer, questionEnd: number): 'exact' | 'folded' | 'none' {
  if (reply.length < questionEnd || uint16(reply, 4) !== 1 || (uint16(reply, 2) & 0xf800) !== 0x8000) return 'none'
  let echo: 'exact' | 'folded' = 'exact'
  for (let at = headerLength; at < questionEnd; at++) {
    const asked = query[at] as number
    const echoed = reply[at] as number
    if (asked === echoed) continue
    if (labelByte[asked] === 0 || labelByte[asked] !== labelByte[echoed]) return 'none'
    echo = 'folded'
  }
  return echo
}
