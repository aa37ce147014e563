/** Readers of HTTP/1.1 requests and answers that accept less than any real one: what they object to should never leave the gateway. */
export type SeenRequest = { method: string; target: string; headers: [string, string][]; body: string; trailers: [string, string][] }
export type Seen = { complete: SeenRequest[]; problems: string[]; /** Bytes behind the last whole request. */ rest: string }

const requestLine = /^([A-Z]+) (\/[\x21-\x7e]*) HTTP\/1\.1$/
const field = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)$/

/**
 * @param bytes latin1 text of one connection, or of several that followed each other
 * @param most requests to read, where others than requests may follow
 */
export function readRequests(bytes: string, most = Infinity): Seen {
  const complete: SeenRequest[] = []
  const problems: string[] = []
  let rest = bytes
  while (rest !== '' && problems.length === 0 && complete.length < most) {
    const end = rest.indexOf('\r\n\r\n')
    if (end === -1) break
    const lines = rest.slice(0, end).split('\r\n')
    const line = requestLine.exec(lines[0] as string)
    if (line === null) {
      problems.push(`request line ${JSON.stringify(lines[0])}`)
      break
    }
    const headers = readFields(lines.slice(1), problems)
    const all = (name: string): string[] => headers.filter(([key]) => key === name).map(([, value]) => value)
    if (all('host').length !== 1) problems.push(`${all('host').length} Host fields`)
    const lengths = all('content-length')
    const codings = all('transfer-encoding')
    if (lengths.length + codings.length > 1) problems.push('more than one framing')
    if (codings.some((coding) => coding !== 'chunked')) problems.push(`coding ${codings.join()}`)
    if (lengths.some((length) => !/^(0|[1-9]\d*)$/.test(length))) problems.push(`length ${lengths.join()}`)
    if (problems.length > 0) break
    const after = rest.slice(end + 4)
    const framed = codings.length > 0 ? readChunks(after, problems) : readLength(after, Number(lengths[0] ?? 0))
    if (framed === null) break
    complete.push({ method: line[1] as string, target: line[2] as string, headers, body: framed.body, trailers: framed.trailers })
    rest = framed.rest
  }
  return { complete, problems, rest }
}

/** `interim`: the statuses of answers before the last one, such as 100. `closes`: the connection ends behind it. */
export type SeenAnswer = { status: number; interim: number[]; headers: [string, string][]; body: string; closes: boolean }
export type SeenAnswers = { complete: SeenAnswer[]; problems: string[]; rest: string }

const statusLine = /^HTTP\/1\.1 ([1-5]\d\d) [\x20-\x7e]*$/
const bodiless = new Set([101, 204, 304])

/** @param methods what was asked, in order: an answer to HEAD has no body */
export function readAnswers(bytes: string, methods: readonly string[]): SeenAnswers {
  const complete: SeenAnswer[] = []
  const problems: string[] = []
  let interim: number[] = []
  let rest = bytes
  while (rest !== '' && problems.length === 0) {
    const end = rest.indexOf('\r\n\r\n')
    if (end === -1) break
    const lines = rest.slice(0, end).split('\r\n')
    const line = statusLine.exec(lines[0] as string)
    if (line === null) {
      problems.push(`status line ${JSON.stringify(lines[0])}`)
      break
    }
    const status = Number(line[1])
    const headers = readFields(lines.slice(1), problems)
    const after = rest.slice(end + 4)
    if (status < 200 && status !== 101) {
      interim.push(status)
      rest = after
      continue
    }
    const all = (name: string): string[] => headers.filter(([key]) => key === name).map(([, value]) => value)
    const lengths = all('content-length')
    const codings = all('transfer-encoding')
    const empty = methods[complete.length] === 'HEAD' || bodiless.has(status)
    if (!empty && lengths.length + codings.length !== 1) problems.push(`${lengths.length + codings.length} framings of an answer`)
    const framed = empty ? { body: '', rest: after } : codings.length > 0 ? readChunks(after, problems) : readLength(after, Number(lengths[0]))
    if (framed === null || problems.length > 0) break
    complete.push({ status, interim, headers, body: framed.body, closes: all('connection').some((value) => value.toLowerCase() === 'close') })
    interim = []
    rest = framed.rest
    // What follows is no HTTP any more.
    if (status === 101) break
  }
  return { complete, problems, rest }
}

function readFields(lines: readonly string[], problems: string[]): [string, string][] {
  const fields: [string, string][] = []
  for (const text of lines) {
    const match = field.exec(text)
    if (match === null) problems.push(`field ${JSON.stringify(text)}`)
    else fields.push([(match[1] as string).toLowerCase(), match[2] as string])
  }
  return fields
}

type Framed = { body: string; trailers: [string, string][]; rest: string }

function readLength(text: string, length: number): Framed | null {
  return text.length < length ? null : { body: text.slice(0, length), trailers: [], rest: text.slice(length) }
}

function readChunks(text: string, problems: string[]): Framed | null {
  let body = ''
  let rest = text
  for (;;) {
    const end = rest.indexOf('\r\n')
    if (end === -1) return null
    const size = rest.slice(0, end)
    if (!/^[0-9a-f]{1,8}$/i.test(size)) {
      problems.push(`chunk size ${JSON.stringify(size)}`)
      return null
    }
    const length = parseInt(size, 16)
    const data = rest.slice(end + 2)
    if (length === 0) return readTrailers(body, data, problems)
    if (data.length < length + 2) return null
    if (data.slice(length, length + 2) !== '\r\n') {
      problems.push('chunk without its end')
      return null
    }
    body += data.slice(0, length)
    rest = data.slice(length + 2)
  }
}

function readTrailers(body: string, text: string, problems: string[]): Framed | null {
  if (text.startsWith('\r\n')) return { body, trailers: [], rest: text.slice(2) }
  const end = text.indexOf('\r\n\r\n')
  return end === -1 ? null : { body, trailers: readFields(text.slice(0, end).split('\r\n'), problems), rest: text.slice(end + 4) }
}
