/** What an outcome says of the kernel, with a program in place of nft that does what the test wants. */
import { chmodSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'

/** Answers as `nft -i` does: what a command prints, and an empty chain for the marker behind it. */
const program = `#!/bin/sh
while read -r line; do
  case "$line" in
    'list chain'*) printf 'table inet sallyport_marker {\\n\\tchain end {\\n\\t}\\n}\\n' ;;
    say*) echo "$line" ;;
    wrong*) echo 'Error: no such set' >&2; sleep 0.05 ;;
    die*) exit 1 ;;
    hang*) sleep 1 ;;
  esac
done`

t.test('confirmed, refused, or nobody knows', async (t) => {
  const directory = t.testdir({})
  writeFileSync(join(directory, 'nft'), program)
  chmodSync(join(directory, 'nft'), 0o755)
  process.env['PATH'] = `${directory}:${process.env['PATH']}`
  const { createNft } = await import('../../egress-sidecar/nft.ts')
  const nft = createNft()
  t.teardown(() => nft.close())
  t.equal(await nft.apply(['say yes']), 'say yes\n')
  const rows: [command: string, outcome: 'refused' | 'unknown', message: RegExp][] = [
    ['wrong', 'refused', /^Error: no such set$/],
    ['die', 'unknown', /^nft ended/],
    ['hang', 'unknown', /^nft did not confirm within 100 ms$/],
  ]
  for (const [command, outcome, message] of rows) {
    await t.rejects(nft.apply([command], 100), { outcome, message }, command)
    t.equal(await nft.apply(['say so'], 2000), 'say so\n', `${command}: and the next one is heard again`)
  }
  t.throws(() => nft.apply(['two\nlines']), /must be one line/)
})
