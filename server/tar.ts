/**
 * As much of the tar format (POSIX.1-1988 ustar, as the Docker engine writes it) as moving two files between containers
 * needs: the first regular file out of an archive, and an archive of folders and files. Pure.
 */

export type TarFile = { readonly mode: number; readonly content: Uint8Array }

const block = 512
/** Byte ranges of the header fields read here, and of the checksum, which is summed up as if it were spaces. */
const field = { mode: [100, 108], size: [124, 136], checksum: [148, 156] } as const
const regular = new Set(['0', '\0', '7'])

/** @throws when there is no regular file in it, or the archive is cut short */
export function readFirstFile(archive: Uint8Array): TarFile {
  for (let at = 0; at + block <= archive.length; ) {
    const header = archive.subarray(at, at + block)
    if (header.every((byte) => byte === 0)) break
    const size = readNumber(header, field.size)
    const end = at + block + size
    if (end > archive.length) throw new Error('the archive is cut short')
    // Extended headers (types x, g, L) carry a longer name or attributes of the entry behind them; neither matters here.
    if (regular.has(String.fromCharCode(header[156] ?? 0))) return { mode: readNumber(header, field.mode) & 0o7777, content: archive.subarray(at + block, end) }
    at = at + block + Math.ceil(size / block) * block
  }
  throw new Error('there is no regular file in the archive')
}

/** Owner root, time 0. A null content is a folder. @param entries path → what is there, in the order they are made; paths below 100 bytes */
export function writeTar(entries: Readonly<Record<string, { readonly mode: number; readonly content: Uint8Array | null }>>): Buffer {
  const parts: Uint8Array[] = []
  for (const [path, { mode, content }] of Object.entries(entries)) {
    const size = content?.length ?? 0
    parts.push(writeHeader(path, mode, size, content === null ? '5' : '0'), content ?? new Uint8Array(), new Uint8Array((block - (size % block)) % block))
  }
  return Buffer.concat([...parts, new Uint8Array(2 * block)])
}

function writeHeader(path: string, mode: number, size: number, type: '0' | '5'): Buffer {
  const header = Buffer.alloc(block)
  if (Buffer.byteLength(path) >= 100) throw new Error(`a path of 100 bytes or more does not fit: ${path}`)
  header.write(path, 0)
  header.write(`${octal(mode, 7)}\0${octal(0, 7)}\0${octal(0, 7)}\0${octal(size, 11)}\0${octal(0, 11)}\0        ${type}`, 100, 'latin1')
  header.write('ustar\x0000', 257, 'latin1')
  header.write(`${octal(header.reduce((sum, byte) => sum + byte, 0), 6)}\0 `, field.checksum[0], 'latin1')
  return header
}

function octal(value: number, digits: number): string {
  return value.toString(8).padStart(digits, '0')
}

function readNumber(header: Uint8Array, [from, to]: readonly [number, number]): number {
  const text = Buffer.from(header.subarray(from, to)).toString('latin1').replace(/\0.*$/s, '').trim()
  if (!/^[0-7]+$/.test(text)) throw new Error('a header of the archive is broken')
  return Number.parseInt(text, 8)
}
