/** What an outcome says of the kernel, with a program in place of nft that does what the test wants. */
import { chmodSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'

/** Answers as `nft -i` does: what a command prints, and a line for the marker behind it. */
const program = `#!/bin/sh
while read -r line; do
  case "$line" in
    'describe ip saddr') echo 'payload expression, datatype ipv4_addr (IPv4 address) (basetype integer), 32 bits' ;;
    say*) echo "$line" ;;
    pid) echo $$ ;;
    wrong*) echo 'Error: no such set' >&2; sleep 0.05 ;;
    die*) exit 1 ;;
    hang*) sleep 1 ;;
  esac
done`

const directory = t.testdir({})
writeFileSync(join(directory, 'nft'), program)
chmodSync(join(directory, 'nft'), 0o755)
process.env['PATH'] = `${directory}:${process.env['PATH']}`
const { createNft } = await import('../../egress-sidecar/nft.ts')

t.test('confirmed, refused, or nobody knows', async (t) => {
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

t.test('a process that took a large transaction makes room for a fresh one, between two others', async (t) => {
  const nft = createNft()
  t.teardown(() => nft.close())
  const first = await nft.apply(['pid'])
  await delay(1200)
  t.equal(await nft.apply(['pid']), first, 'small ones leave it alone')
  const large = `say ${'x'.repeat(3000)}`
  t.equal(await nft.apply([large]), `${large}\n`)
  t.equal(await nft.apply(['pid']), first, 'not at once')
  const pids = new Set<string>()
  for (const deadline = performance.now() + 3000; performance.now() < deadline; await delay(2)) pids.add(await nft.apply(['pid']))
  t.equal(pids.size, 2, 'one fresh one, and every command was answered')
})
