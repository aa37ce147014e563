/** A policy file that cannot be replaced, as a container's is that was mounted by itself. */
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { execa } from 'execa'
import t from 'tap'
import { preparePolicyFile, readPolicyFile } from '../../egress-sidecar/policy-file.ts'
import { needs } from '../support/abilities.ts'

await needs('root')

const policy = { defaultAction: 'deny', egress: [{ action: 'allow', target: 'a.example' }] } as const
/** Longer than the new content. */
const old = JSON.stringify({ defaultAction: 'allow', egress: Array.from({ length: 20 }, (_, i) => ({ action: 'deny', target: `n${i}.example` })) })

type Mount = AsyncDisposable & { remount(options: string): Promise<unknown> }

/** Gone with its scope: before its folder is. */
async function mount(...words: string[]): Promise<Mount> {
  const at = words.at(-1) as string
  await execa('mount', words)
  return { remount: (options) => execa('mount', ['-o', `remount,${options}`, at]), async [Symbol.asyncDispose]() { await execa('umount', [at]) } }
}

for (const readOnly of [false, true]) {
  t.test(`mounted by itself${readOnly ? ', in a read-only folder' : ''}`, async (t) => {
    const place = t.testdir({ source: old, folder: {} })
    const folder = join(place, 'folder')
    const path = join(folder, 'policy.json')
    await using own = await mount('-t', 'tmpfs', 'tmpfs', folder)
    writeFileSync(path, '')
    await using _file = await mount('--bind', join(place, 'source'), path)
    if (readOnly) await own.remount('ro')

    const abandoned = await preparePolicyFile(path, policy)
    await abandoned.abandon()
    t.equal(readFileSync(path, 'utf8'), old, 'a change that is given up writes nothing')
    const { ino } = statSync(path)
    await (await preparePolicyFile(path, policy)).commit()
    t.same((await readPolicyFile(path)).policy, policy)
    t.equal(statSync(path).ino, ino, 'the same file')
    t.match(readFileSync(path, 'utf8'), /\}\n$/, 'nothing of the old content behind it')
    t.same(readdirSync(folder), ['policy.json'], 'nothing beside it')
  })
}

t.test('in a read-only folder where there is none yet: an error, before anything is enforced', async (t) => {
  const folder = join(t.testdir({ folder: {} }), 'folder')
  await using _own = await mount('-t', 'tmpfs', '-o', 'ro', 'tmpfs', folder)
  await t.rejects(preparePolicyFile(join(folder, 'policy.json'), policy), { code: 'ENOENT' })
})
