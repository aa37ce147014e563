import t from 'tap'
import { readLastWords } from '../../server/last-words.ts'

/** As the engine gives the output of a container. */
function frames(...pieces: readonly string[]): Buffer {
  return Buffer.concat(pieces.flatMap((piece, index) => {
    const head = Buffer.from([1 + (index % 2), 0, 0, 0, 0, 0, 0, 0])
    head.writeUInt32BE(Buffer.byteLength(piece), 4)
    return [head, Buffer.from(piece)]
  }))
}

t.test('what a container wrote last', async (t) => {
  const cases: [why: string, given: Buffer, wanted: string][] = [
    ['nothing', frames(), ''],
    ['text, on both streams', frames('one\n', 'two\n'), 'one | two'],
    ['a line in two pieces', frames('on', 'e\n'), 'one'],
    ['a line of our sidecar', frames('{"level":"fatal","ts":"x","opensandbox.event":"egress.failed","sandbox_id":"s","msg":"no rights: ü"}\n'), 'no rights: ü'],
    ['with the error', frames('{"msg":"cannot start","error":"EPERM"}\n'), 'cannot start: EPERM'],
    ['JSON that says nothing we know', frames('{"a":1}\n', 'null\n', '5\n'), '{"a":1} | null | 5'],
    ['too much: its end', frames(`${'x'.repeat(5000)}\n`, 'the end\n'), `${'x'.repeat(990)} | the end`],
    ['cut off', frames('one\n', 'two\n').subarray(0, 15), 'one'],
    ['what is no output of a container', Buffer.from('404'), ''],
  ]
  for (const [why, given, wanted] of cases) t.equal(readLastWords(given), wanted, why)
})
