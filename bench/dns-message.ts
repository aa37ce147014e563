/** DNS messages for the micro-benches. */

/** A question for `name` with class IN; 1 is A, 28 is AAAA. */
export function dnsQuestion(name: string, type: number): Buffer {
  const labels = name.split('.').map((label) => Buffer.concat([Buffer.from([label.length]), Buffer.from(label)]))
  return Buffer.concat([Buffer.from([0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]), ...labels, Buffer.from([0, 0, type, 0, 1])])
}

/** The reply to it with so many A records of 300 seconds. */
export function dnsReply(question: Buffer, addresses: number): Buffer {
  const head = Buffer.from(question)
  head.writeUInt16BE(0x8180, 2)
  head.writeUInt16BE(addresses, 6)
  const records = Array.from({ length: addresses }, (_, index) => Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4, 198, 18, 0, index + 1]))
  return Buffer.concat([head, ...records])
}
