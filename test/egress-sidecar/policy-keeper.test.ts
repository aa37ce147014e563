/** Policy changes: texts and order as the original, each change whole or not at all. */
import { lstatSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import type { Rules } from '#policies/compile.ts'
import { decideName } from '#policies/decide.ts'
import type { NetworkPolicy } from '#policies/document.ts'
import { createAlwaysFiles } from '../../egress-sidecar/always-files.ts'
import { readPolicyFile } from '../../egress-sidecar/policy-file.ts'
import { createPolicyKeeper, type Change, type PolicyKeeper } from '../../egress-sidecar/policy-keeper.ts'

type Kernel = { enforced: Rules[]; refuse: Error | null; meanwhile: () => void }

async function setUp(directory: string, { policy = { defaultAction: 'deny', egress: [] } as NetworkPolicy, policyFile = '', maxRules = 4096 } = {}): Promise<{ keeper: PolicyKeeper; kernel: Kernel }> {
  const kernel: Kernel = { enforced: [], refuse: null, meanwhile: () => undefined }
  const files = createAlwaysFiles(directory)
  const firewall = {
    get rules() {
      return kernel.enforced.at(-1) as Rules
    },
    learned: 0,
    updates: 0,
    async replace(rules: Rules) {
      if (kernel.refuse !== null) throw kernel.refuse
      kernel.enforced.push(rules)
      kernel.meanwhile()
    },
    open: async () => 'open' as const,
  }
  return { keeper: createPolicyKeeper(policy, await files.read(), { firewall, files, policyFile, maxRules, floor: [] }), kernel }
}

const body = (value: unknown): string => JSON.stringify(value)
const texts = (policy: NetworkPolicy): string[] => policy.egress.map((rule) => `${rule.action} ${rule.target}`)

t.test('put', async (t) => {
  const { keeper, kernel } = await setUp(t.testdir({}))
  t.same(texts((await keeper.put(body({ egress: [{ action: 'ALLOW', target: ' Example.com ' }, { target: '10.0.0.0/8' }] }))).policy), ['allow Example.com', 'deny 10.0.0.0/8'])
  t.equal(kernel.enforced.length, 1)
  t.equal((await keeper.put('  ')).reason, 'policy reset to default deny-all')
  for (const empty of ['{}', 'null']) t.same((await keeper.put(empty)).policy, { defaultAction: 'deny', egress: [] })
})

t.test('refusals change nothing', async (t) => {
  const { keeper, kernel } = await setUp(t.testdir({}), { maxRules: 2 })
  const rows: { why: string; work: () => Promise<unknown>; status: number; message: RegExp }[] = [
    { why: 'action', work: () => keeper.put('{"egress":[{"action":"Foo","target":"a.b"}]}'), status: 400, message: /^invalid policy: unsupported action "foo"$/ },
    { why: 'target', work: () => keeper.put('{"egress":[{"action":"allow"}]}'), status: 400, message: /^invalid policy: egress target cannot be empty$/ },
    { why: 'null rule', work: () => keeper.put('{"egress":[null]}'), status: 400, message: /^invalid policy: egress target cannot be empty$/ },
    { why: 'default', work: () => keeper.put('{"defaultAction":"block"}'), status: 400, message: /^invalid policy: unsupported action "block"$/ },
    { why: 'shape', work: () => keeper.put('[]'), status: 400, message: /^invalid policy: / },
    { why: 'wildcard form', work: () => keeper.put('{"egress":[{"action":"allow","target":"a*.example"}]}'), status: 400, message: /egress\[0\]\.target/ },
    { why: 'not JSON', work: () => keeper.put('not-json'), status: 400, message: /^invalid policy: / },
    { why: 'too many', work: () => keeper.put(body({ egress: ['a.b', 'b.b', 'c.b'].map((target) => ({ target })) })), status: 413, message: /^egress rule total count 3 exceeds limit 2$/ },
    { why: 'patch: blank', work: () => keeper.patch(' '), status: 400, message: /^empty body$/ },
    { why: 'patch: object', work: () => keeper.patch('{}'), status: 400, message: /^invalid patch rules: / },
    { why: 'patch: empty', work: () => keeper.patch('[]'), status: 400, message: /^invalid patch rules: empty array$/ },
    { why: 'patch: null', work: () => keeper.patch('null'), status: 400, message: /^invalid patch rules: empty array$/ },
    { why: 'patch: bad rule', work: () => keeper.patch('[{"action":"x","target":"a.b"}]'), status: 400, message: /^invalid merged policy: unsupported action "x"$/ },
    { why: 'patch: texts', work: () => keeper.patch('["a.b"]'), status: 400, message: /^invalid patch rules: / },
    { why: 'delete: blank', work: () => keeper.remove(''), status: 400, message: /^empty body$/ },
    { why: 'delete: empty', work: () => keeper.remove('[]'), status: 400, message: /^invalid delete targets: empty array$/ },
    { why: 'delete: numbers', work: () => keeper.remove('[1]'), status: 400, message: /^invalid delete targets: / },
  ]
  for (const { why, work, status, message } of rows) await t.rejects(work(), { status, message }, why)
  t.same(kernel.enforced, [])
})

t.test('patch and delete keep the original\'s order', async (t) => {
  const { keeper } = await setUp(t.testdir({}))
  await keeper.put(body({ defaultAction: 'allow', egress: [{ action: 'allow', target: 'example.com' }, { action: 'deny', target: '*.example.com' }] }))
  const patched = await keeper.patch(body([{ action: 'deny', target: 'blocked.com' }, { action: 'allow', target: 'EXAMPLE.com' }, { action: 'deny', target: 'example.com' }]))
  t.same(texts(patched.policy), ['deny blocked.com', 'allow EXAMPLE.com', 'deny *.example.com'], 'patched first, the first of two for one target')
  t.equal(patched.policy.defaultAction, 'allow')
  t.equal((await keeper.remove('["nowhere.example"]')).reason, 'no matching targets found')
  t.same(texts((await keeper.remove('[" Example.COM ", "blocked.com"]')).policy), ['deny *.example.com'])
})

t.test('how many rules there may be', async (t) => {
  const many = (count: number) => Array.from({ length: count }, (_, i) => ({ action: 'allow' as const, target: `n${i}.example` }))
  const patch = (...targets: string[]): string => body(targets.map((target) => ({ target })))
  const { keeper, kernel } = await setUp(t.testdir({}), { maxRules: 3 })
  await keeper.put(body({ egress: many(2) }))
  await keeper.patch(patch('n2.example'))
  const before = kernel.enforced.length
  await t.rejects(keeper.patch(patch('n3.example')), { status: 413, message: 'egress rule total count 4 exceeds limit 3' }, 'one more, with those that are there')
  await t.rejects(keeper.patch(patch('a.b', 'N1.EXAMPLE', 'c.b')), { status: 413, message: 'egress rule total count 5 exceeds limit 3' }, 'two more and one in the place of another')
  t.equal(kernel.enforced.length, before)
  t.same(texts(keeper.policy), ['deny n2.example', 'allow n0.example', 'allow n1.example'])
  await keeper.patch(patch('n1.example', 'N1.example', 'n0.example'))
  t.same(texts(keeper.policy), ['deny n1.example', 'deny n0.example', 'deny n2.example'], 'those that take the place of others are no more than before')

  const unlimited = await setUp(t.testdir({}), { maxRules: 0 })
  t.equal((await unlimited.keeper.put(body({ egress: many(5000) }))).policy.egress.length, 5000, '0 is no limit')
  t.equal((await unlimited.keeper.patch(patch('a.b'))).policy.egress.length, 5001)

  const started = await setUp(t.testdir({}), { maxRules: 3, policy: { defaultAction: 'deny', egress: many(6) } })
  t.equal((await started.keeper.remove('["n0.example"]')).policy.egress.length, 5, 'whoever was started with more may still remove some')
})

t.test('targets are compared in their normal form', async (t) => {
  const rows: { why: string; method: 'patch' | 'remove'; base: string[]; targets: string[]; want: string[] }[] = [
    { why: 'blanks around a patched name', method: 'patch', base: ['a.example', 'b.example'], targets: [' a.example '], want: ['allow a.example', 'deny b.example'] },
    { why: 'the same name twice, once with blanks', method: 'patch', base: ['b.example'], targets: ['\ta.example', 'A.example '], want: ['allow a.example', 'deny b.example'] },
    { why: 'a network of one address is that address', method: 'patch', base: ['1.1.1.1', '1.1.1.0/24'], targets: ['1.1.1.1/32'], want: ['allow 1.1.1.1/32', 'deny 1.1.1.0/24'] },
    { why: 'and removed as it', method: 'remove', base: ['198.51.100.40/32', 'fd00::1', '198.51.100.0/24'], targets: ['198.51.100.40', 'FD00:0::1/128'], want: ['deny 198.51.100.0/24'] },
    { why: 'a network with host bits', method: 'remove', base: ['10.1.2.3/8', '10.0.0.0/9'], targets: ['10.0.0.0/8'], want: ['deny 10.0.0.0/9'] },
    { why: 'both spellings in one patch stay', method: 'patch', base: ['1.1.1.1', 'a.example'], targets: ['1.1.1.1', '1.1.1.1/32', '1.1.1.1'], want: ['allow 1.1.1.1', 'allow 1.1.1.1/32', 'deny a.example'] },
    { why: 'blanks around a name to remove', method: 'remove', base: ['a.example', 'b.example'], targets: ['\n A.Example '], want: ['deny b.example'] },
    { why: 'removed once or twice', method: 'remove', base: ['a.example', 'b.example'], targets: ['a.example', 'a.example', 'x.example'], want: ['deny b.example'] },
    { why: 'the name with its trailing dot', method: 'remove', base: ['a.example.', '*.a.example.', 'b.example'], targets: ['a.example', '*.A.example'], want: ['deny b.example'] },
    { why: 'the A-labels of an international name', method: 'remove', base: ['BÜCHER.example', 'b.example'], targets: ['xn--bcher-kva.example.'], want: ['deny b.example'] },
    { why: 'and patched', method: 'patch', base: ['a.example.', 'bücher.example', 'b.example'], targets: ['a.example', 'xn--bcher-kva.example'], want: ['allow a.example', 'allow xn--bcher-kva.example', 'deny b.example'] },
    { why: 'what is no target matches nothing', method: 'remove', base: ['a.example'], targets: ['a..example', '*'], want: ['deny a.example'] },
    { why: 'the case of an address', method: 'remove', base: ['FD00::1', 'fd00::2'], targets: [' fd00::1'], want: ['deny fd00::2'] },
    { why: 'neither the names below', method: 'remove', base: ['a.example', '*.a.example'], targets: ['a.example'], want: ['deny *.a.example'] },
  ]
  for (const { why, method, base, targets, want } of rows) {
    const { keeper } = await setUp(t.testdir({}), { policy: { defaultAction: 'deny', egress: base.map((target) => ({ action: 'deny', target })) } })
    const { policy } = await keeper[method](body(method === 'remove' ? targets : targets.map((target) => ({ action: 'allow', target }))))
    t.same(texts(policy), want, why)
    t.same(texts(keeper.policy), want, why)
  }
})

t.test('which rules a change named', async (t) => {
  const { keeper } = await setUp(t.testdir({}))
  const named = ({ rules }: Change): string[] => rules.map((rule) => `${rule.action} ${rule.target}`)
  t.same(named(await keeper.put(body({ egress: [{ action: 'allow', target: 'a.example' }, { target: 'b.example' }, { target: 'c.example' }] }))), ['allow a.example', 'deny b.example', 'deny c.example'], 'put: all of the body')
  t.same(named(await keeper.patch(body([{ action: 'allow', target: 'd.example' }, { action: 'allow', target: 'B.example' }]))), ['allow d.example', 'allow B.example'], 'patch: those of the body, not the others')
  t.same(named(await keeper.remove('["b.EXAMPLE", "x.example", "a.example"]')), ['allow B.example', 'allow a.example'], 'delete: the rules that are gone, as they were written')
  t.same(named(await keeper.remove('["a.example"]')), [], 'delete: none is gone')
  t.same(named(await keeper.put('')), [], 'reset: none')
})

t.test('a delete that matches nothing applies and writes nothing', async (t) => {
  const directory = t.testdir({ 'policy.json': 'by hand' })
  const policyFile = join(directory, 'policy.json')
  const { keeper, kernel } = await setUp(directory, { policyFile, policy: { defaultAction: 'allow', egress: [{ action: 'deny', target: 'a.example' }] } })
  const before = statSync(policyFile, { bigint: true })
  t.same(await keeper.remove('["b.example", "*.a.example"]'), { policy: { defaultAction: 'allow', egress: [{ action: 'deny', target: 'a.example' }] }, reason: 'no matching targets found', rules: [] })
  t.same(kernel.enforced, [], 'the kernel is not asked')
  t.equal(readFileSync(policyFile, 'utf8'), 'by hand')
  const { ino, mtimeNs } = statSync(policyFile, { bigint: true })
  t.same([ino, mtimeNs], [before.ino, before.mtimeNs], 'the same file, not written again')
  kernel.refuse = new Error('Invalid argument')
  t.equal((await keeper.remove('["b.example"]')).reason, 'no matching targets found', 'so nothing can fail')
})

t.test('changes run one after the other', async (t) => {
  const { keeper } = await setUp(t.testdir({}))
  await Promise.all(['a', 'b', 'c', 'd'].map((name) => keeper.patch(body([{ action: 'allow', target: `${name}.example` }]))))
  t.same(texts(keeper.policy), ['allow d.example', 'allow c.example', 'allow b.example', 'allow a.example'])
})

t.test('the policy file', async (t) => {
  const directory = t.testdir({})
  const policyFile = join(directory, 'policy.json')
  const { keeper, kernel } = await setUp(directory, { policyFile })
  await keeper.put(body({ egress: [{ action: 'allow', target: 'a.example' }] }))
  t.equal(readFileSync(policyFile, 'utf8'), '{\n  "egress": [\n    {\n      "action": "allow",\n      "target": "a.example"\n    }\n  ],\n  "defaultAction": "deny"\n}\n')
  t.equal(statSync(policyFile).mode & 0o777, 0o600)
  t.same((await readPolicyFile(policyFile)).policy, keeper.policy, 'read back')

  kernel.refuse = new Error('Invalid argument')
  await t.rejects(keeper.put('{}'), { status: 500, message: 'failed to apply nftables policy: Invalid argument' })
  kernel.refuse = null
  t.same((await readPolicyFile(policyFile)).policy, keeper.policy, 'a change that the kernel refused is not in the file either')
  t.same(texts(keeper.policy), ['allow a.example'])
  t.same(readdirSync(directory), ['policy.json'], 'nothing left beside it')

  kernel.meanwhile = () => rmSync(`${policyFile}.new`, { force: true })
  const before = kernel.enforced.length
  await t.rejects(keeper.put('{"defaultAction":"allow"}'), { status: 500, message: /^failed to persist policy: ENOENT/ })
  t.same(kernel.enforced.slice(before).map(({ defaultAction }) => defaultAction), ['allow', 'deny'], 'a change that cannot be written is taken back')
  t.same(texts(keeper.policy), ['allow a.example'])
  kernel.meanwhile = () => undefined

  const nowhere = await setUp(directory, { policyFile: join(directory, 'missing', 'policy.json') })
  await t.rejects(nowhere.keeper.put('{}'), { status: 500, message: /^failed to persist policy: / })
  t.same(nowhere.kernel.enforced, [])
})

t.test('a policy file that is a link stays one', async (t) => {
  const directory = t.testdir({ real: { 'policy.json': '{}' }, 'policy.json': t.fixture('symlink', 'real/policy.json') })
  const { keeper } = await setUp(directory, { policyFile: join(directory, 'policy.json') })
  await keeper.put('{"defaultAction":"allow"}')
  t.ok(lstatSync(join(directory, 'policy.json')).isSymbolicLink())
  t.match(readFileSync(join(directory, 'real', 'policy.json'), 'utf8'), '"defaultAction": "allow"')
  t.same(readdirSync(join(directory, 'real')), ['policy.json'])
})

t.test('a policy file that is of no use', async (t) => {
  const directory = t.testdir({ blank: ' \n', cut: '{', maybe: '{"egress":[{"target":"a.b"},{"action":"maybe","target":"*"}]}', list: '[]', folder: {} })
  const found = (name: string): ReturnType<typeof readPolicyFile> => readPolicyFile(join(directory, name))
  t.same(await readPolicyFile(''), { policy: null, warning: null })
  t.same(await found('missing'), { policy: null, warning: null })
  t.match(await found('nowhere/missing'), { policy: null, warning: /^the folder of the policy file .*\/nowhere\/missing is not there: / })
  const rows: [name: string, why: string][] = [['blank', ' is empty'], ['cut', ': Expected'], ['maybe', ': egress[1].action: unsupported action "maybe"; egress[1].target: '], ['list', ': must be object']]
  for (const [name, why] of rows) {
    const { policy, warning } = await found(name)
    t.equal(policy, null, name)
    t.ok(warning?.startsWith(`policy file not used: ${join(directory, name)}${why}`), `${name}: ${warning}`)
  }
  await t.rejects(found('folder'), { message: `the policy file ${join(directory, 'folder')} (OPENSANDBOX_EGRESS_POLICY_FILE) cannot be read: EISDIR: illegal operation on a directory, read` })
})

t.test('a policy file that the original enforces and we refuse gives way to nothing', async (t) => {
  const rows: [text: string, why: string][] = [
    ['{"defaultAction":"block"}', 'defaultAction: unsupported action "block"'],
    ['{"egress":[{"action":"allow","target":"a.example"},{"target":"*"}]}', 'egress[1].target: "*" is not a target; set defaultAction instead'],
    ['{"egress":[{"action":"allow","target":"example.com:443"}]}', 'egress[0].target: "example.com:443" has a port, which is not part of a target'],
    ['{"egress":[{"action":"allow","target":"a.example","ports":[443]}]}', 'egress[0].ports: is not a known key'],
    ['{"egress":[{"target":"a.example"}],"Egress":[]}', 'Egress: egress stands here in two spellings'],
  ]
  const directory = t.testdir({})
  const path = join(directory, 'policy.json')
  for (const [text, why] of rows) {
    writeFileSync(path, text)
    await t.rejects(readPolicyFile(path), { message: `the policy file ${path} is refused, and left as it is: ${why}` })
    t.equal(readFileSync(path, 'utf8'), text)
  }
})

t.test('the operator\'s files stand before the user\'s rules', async (t) => {
  const directory = t.testdir({ 'deny.always': '# c\n\n evil.example \n10.0.0.0/8\n', 'allow.always': '*.infra.example\n' })
  const { keeper, kernel } = await setUp(directory)
  await keeper.put(body({ defaultAction: 'allow', egress: [{ action: 'allow', target: 'evil.example' }, { action: 'deny', target: 'a.infra.example' }] }))
  const verdict = (name: string): string => decideName(kernel.enforced.at(-1) as Rules, name).action
  t.equal(verdict('evil.example'), 'deny')
  t.equal(verdict('a.infra.example'), 'allow')
  t.same(texts(keeper.policy), ['allow evil.example', 'deny a.infra.example'], 'never part of the user\'s policy')

  t.equal(await keeper.reload(), false, 'nothing changed')
  writeFileSync(join(directory, 'deny.always'), 'other.example\n')
  t.equal(await keeper.reload(), true)
  t.equal(verdict('evil.example'), 'allow')
  t.equal(verdict('other.example'), 'deny')
  writeFileSync(join(directory, 'allow.always'), 'http://x/\n')
  await t.rejects(keeper.reload(), /allow\.always line 1: /)
  await t.rejects(keeper.reload(), /allow\.always line 1: /, 'again each time, until it is right')
  t.equal(verdict('a.infra.example'), 'allow', 'the old rules hold')

  writeFileSync(join(directory, 'allow.always'), '')
  kernel.refuse = new Error('Cannot allocate memory')
  await t.rejects(keeper.reload(), /Cannot allocate/)
  await t.rejects(keeper.reload(), /Cannot allocate/, 'what the kernel did not take is not forgotten')
  kernel.refuse = null
  t.equal(await keeper.reload(), true)
  t.equal(verdict('a.infra.example'), 'deny')
  t.equal(await keeper.reload(), false, 'and then it is done')
})
