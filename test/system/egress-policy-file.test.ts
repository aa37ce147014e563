/** The policy file of a running sidecar; and one that cannot be replaced, as a container's is that was mounted by itself. */
import { chmodSync, existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { execa } from 'execa'
import t from 'tap'
import { preparePolicyFile, readPolicyFile } from '../../egress-sidecar/policy-file.ts'
import { needs } from '../support/abilities.ts'
import { api, createNamespaces, policy as policyOf } from './egress-namespaces.ts'

await needs('root', 'nft', 'netns', 'curl', 'ipv6')
t.setTimeout(60_000)

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

t.test('the policy file stands before the rules of the environment, and stays as private as it was', async (t) => {
  const [byFile, byRules, patched] = ['198.18.1.1', '198.18.2.2', '198.18.3.3']
  const rows: [why: string, text: string | null, mode: number, open: string, leftBehind?: number][] = [
    ['a policy', policyOf(byFile), 0o640, byFile],
    ['its group may write it', policyOf(byFile), 0o660, byFile],
    ['only its owner may read it, but a crash left a new one behind that everybody may', policyOf(byFile), 0o600, byFile, 0o644],
    ['blank', ' \n', 0o640, byRules],
    ['not JSON', '{"egress":', 0o640, byRules],
    ['not a policy', '{"egress":[{"action":"maybe","target":"*"}]}', 0o640, byRules],
    ['none', null, 0o600, byRules],
  ]
  await using space = await createNamespaces()
  for (const [why, text, mode, open, leftBehind] of rows) {
    const file = join(t.testdir(), 'policy.json')
    if (text !== null) writeFileSync(file, text)
    if (text !== null) chmodSync(file, mode)
    if (leftBehind !== undefined) writeFileSync(`${file}.new`, '{', { mode: leftBehind })
    const sidecar = await space.startSidecar({ OPENSANDBOX_EGRESS_RULES: policyOf(byRules), OPENSANDBOX_EGRESS_POLICY_FILE: file })
    t.same((await space.ask({ connect: byFile }, { connect: byRules })).map(({ result }) => result), open === byFile ? ['open', 'ECONNREFUSED'] : ['ECONNREFUSED', 'open'], why)
    t.match(await api(space, 'PATCH', JSON.stringify([{ action: 'allow', target: patched }])), /200$/)
    t.match(JSON.parse(readFileSync(file, 'utf8')), { defaultAction: 'deny', egress: [{ action: 'allow', target: patched }, { action: 'allow', target: open }] }, 'what changes is written back')
    t.equal((statSync(file).mode & 0o777).toString(8), mode.toString(8), `${why}: the mode is kept`)
    t.notOk(existsSync(`${file}.new`))
    await sidecar.end('SIGKILL')
  }
})

t.test('one that the original enforces and we refuse is no start: what the environment says may be wider', async (t) => {
  const written = '{"egress":[{"action":"allow","target":"198.18.1.1","ports":[443]}]}'
  const file = join(t.testdir({ 'policy.json': written }), 'policy.json')
  await using space = await createNamespaces()
  const message = `the policy file ${file} is refused, and left as it is: egress[0].ports: is not a known key`
  await t.rejects(space.startSidecar({ OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"allow"}', OPENSANDBOX_EGRESS_POLICY_FILE: file }), { message: new RegExp(`^exit 1: .*${RegExp.escape(message)}`, 's') })
  t.same((await space.ask({ connect: '198.18.1.1' }, { connect: '198.18.2.2' })).filter(({ result }) => result === 'open'), [], 'nothing is open')
  t.equal(readFileSync(file, 'utf8'), written)
})
