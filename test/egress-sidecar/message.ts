/** DNS messages as bytes, written out by hand: a test of our reader must not depend on somebody else's idea of the format. */

export const types = { A: 1, NS: 2, CNAME: 5, MX: 15, TXT: 16, AAAA: 28, OPT: 41, SVCB: 64, HTTPS: 65 } as const

/** `www.example.com` or, where a label holds unusual bytes, a list of labels. */
export type NameText = string | readonly string[]

export function wireName(name: NameText): Buffer {
  const labels = typeof name === 'string' ? name.split('.').filter((label) => label !== '') : name
  return Buffer.concat([...labels.flatMap((label) => [Buffer.of(Buffer.byteLength(label, 'latin1')), Buffer.from(label, 'latin1')]), Buffer.of(0)])
}

export type RecordText = { readonly name: NameText | Buffer; readonly type: number; readonly ttl?: number; readonly data: Buffer | string; readonly class?: number }

/** An address, a name (for CNAME) or bytes. */
export function record({ name, type, ttl = 60, data, class: rrClass = 1 }: RecordText): Buffer {
  const owner = Buffer.isBuffer(name) ? name : wireName(name)
  const rdata = Buffer.isBuffer(data) ? data : type === types.A ? Buffer.from(data.split('.').map(Number)) : type === types.AAAA ? address6(data) : wireName(data)
  const fixed = Buffer.alloc(10)
  fixed.writeUInt16BE(type, 0)
  fixed.writeUInt16BE(rrClass, 2)
  fixed.writeUInt32BE(ttl, 4)
  fixed.writeUInt16BE(rdata.length, 8)
  return Buffer.concat([owner, fixed, rdata])
}

/** All eight groups, or with one `::`. */
function address6(text: string): Buffer {
  const [head = '', tail = ''] = text.split('::')
  const groups = (part: string): number[] => part.split(':').filter((group) => group !== '').map((group) => parseInt(group, 16))
  const left = groups(head)
  const right = text.includes('::') ? groups(tail) : []
  const bytes = Buffer.alloc(16)
  for (const [i, group] of [...left, ...Array<number>(8 - left.length - right.length).fill(0), ...right].entries()) bytes.writeUInt16BE(group, i * 2)
  return bytes
}

export type MessageText = {
  readonly id?: number
  readonly flags?: number
  readonly name?: NameText
  readonly type?: number
  readonly class?: number
  readonly answers?: readonly RecordText[]
  readonly additional?: readonly Buffer[]
}

/** A question; with `answers` or a reply flag the answer to it. */
export function message({ id = 0x1234, flags = 0x0100, name = 'a.example', type = types.A, class: qclass = 1, answers = [], additional = [] }: MessageText): Buffer {
  const head = Buffer.alloc(12)
  for (const [i, value] of [id, flags, 1, answers.length, 0, additional.length].entries()) head.writeUInt16BE(value, i * 2)
  const tail = Buffer.alloc(4)
  tail.writeUInt16BE(type, 0)
  tail.writeUInt16BE(qclass, 2)
  return Buffer.concat([head, wireName(name), tail, ...answers.map(record), ...additional])
}

export const replyFlags = 0x8180

/** OPT with a payload size (RFC 6891). */
export function opt(payload: number): Buffer {
  return record({ name: '', type: types.OPT, class: payload, ttl: 0, data: Buffer.alloc(0) })
}

/** Points at the question's name. */
export const toQuestion = Buffer.of(0xc0, 12)

export function answerCount(reply: Buffer): number {
  return reply.readUInt16BE(6)
}

export function rcodeOf(reply: Buffer): number {
  return (reply[3] as number) & 0xf
}
