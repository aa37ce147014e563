/**
 * A large JSON document whose bulk is one list, read a part at a time. `JSON.parse` takes 100,000 sandboxes in one go, and nobody is
 * answered for a tenth of a second; this finds where the list can be cut, and leaves the parsing to `JSON.parse` all the same.
 */

/** Text parsed at once: about a millisecond. */
const sliceBytes = 32 * 1024

const quote = 0x22
const comma = 0x2c
const colon = 0x3a
const backslash = 0x5c
/** `[` and `{`, `]` and `}` differ in this bit. */
const curly = 0x20
const opens = 0x5b | curly
const closes = 0x5d | curly

/**
 * Yields the elements of the list that stands under `key` in the document's outermost object, in parts and in order. A document that
 * has no such list yields nothing.
 * @returns the parsed document; the list in it is empty
 * @throws SyntaxError when it is not JSON
 */
export function* readInSlices(bytes: Buffer, key: string): Generator<unknown[], unknown> {
  const begin = findList(bytes, key)
  if (begin === -1) return parse(bytes.toString(), '')
  let start = begin
  let count = 0
  for (;;) {
    const end = endOfSlice(bytes, start)
    if (end === -1) throw new SyntaxError(`the list of ${key} does not end`)
    const last = bytes[end] !== comma
    const values = parse(`[${bytes.toString('utf8', start, end)}]`, `after the first ${count} of ${key}: `) as unknown[]
    // Nothing before or behind a comma.
    if (values.length === 0 && !(last && count === 0)) throw new SyntaxError(`an element of ${key} is missing after the first ${count}`)
    count += values.length
    yield values
    if (last) return parse(bytes.toString('utf8', 0, begin) + bytes.toString('utf8', end), `around the list of ${key}: `)
    start = end + 1
  }
}

/**
 * Says where, and what was expected. Not the position, which is one in this part and means nothing to anybody else; and nothing of the text:
 * V8 quotes what stands around a token it does not know, and that may be a sandbox's secret. So there is no `cause` either.
 */
function parse(text: string, where: string): unknown {
  try {
    return JSON.parse(text)
  } catch (error) {
    const { message } = error as Error
    throw new SyntaxError(where + (message.includes('"') ? 'is not JSON' : message.replace(/ at position .*/s, '')))
  }
}

/** Where the list's first element begins, or -1. */
function findList(bytes: Buffer, key: string): number {
  const name = Buffer.from(JSON.stringify(key))
  let depth = 0
  for (let at = 0; at < bytes.length; at++) {
    const byte = bytes[at] as number
    if (byte === quote) {
      const end = endOfString(bytes, at)
      if (depth === 1 && name.equals(bytes.subarray(at, end + 1))) {
        const colonAt = nextText(bytes, end + 1)
        const listAt = nextText(bytes, colonAt + 1)
        if (bytes[colonAt] === colon && bytes[listAt] === 0x5b) return listAt + 1
      }
      at = end
    } else if ((byte | curly) === opens) depth++
    else if ((byte | curly) === closes) depth--
  }
  return -1
}

/** The first comma between two elements that has enough text before it, or the bracket that ends the list; -1: neither comes. */
function endOfSlice(bytes: Buffer, start: number): number {
  let depth = 0
  for (let at = start; at < bytes.length; at++) {
    const byte = bytes[at] as number
    if (byte === quote) at = endOfString(bytes, at)
    else if ((byte | curly) === opens) depth++
    else if ((byte | curly) === closes && depth-- === 0) return at
    else if (byte === comma && depth === 0 && at - start >= sliceBytes) return at
  }
  return -1
}

/** @param at of the opening quote @returns that of the closing one, or the last byte's */
function endOfString(bytes: Buffer, at: number): number {
  for (at++; at < bytes.length; at++) {
    const byte = bytes[at]
    if (byte === backslash) at++
    else if (byte === quote) return at
  }
  return bytes.length - 1
}

function nextText(bytes: Buffer, at: number): number {
  while (at < bytes.length && (bytes[at] as number) <= 0x20) at++
  return at
}
