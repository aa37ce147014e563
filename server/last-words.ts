/** What a container wrote last, short enough for one line of our own log. Pure. */

/** How a container is, and what it wrote last. `exitCode` null: it has not ended. */
export type LastWords = { readonly exitCode: number | null; readonly log: string }

/** Characters: why a program could not start is said in fewer. */
const most = 1000

/** @param frames its output as the engine gives it: each piece behind eight bytes that name its stream and its length */
export function readLastWords(frames: Buffer): string {
  let text = ''
  for (let at = 0; at + 8 <= frames.length; at += 8 + frames.readUInt32BE(at + 4)) text += frames.toString('utf8', at + 8, at + 8 + frames.readUInt32BE(at + 4))
  return text.trim().split('\n').map(essence).join(' | ').slice(-most)
}

/** Of a line that is JSON what it says, without its time, its level and who it is about. */
function essence(line: string): string {
  try {
    const { msg, message, error } = JSON.parse(line) as Readonly<Record<string, unknown>>
    const said = [msg ?? message, error].filter((part) => typeof part === 'string')
    return said.length === 0 ? line : said.join(': ')
  } catch {
    return line
  }
}
