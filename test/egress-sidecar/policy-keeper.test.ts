/** Policy changes: texts and order as the original, each change whole or not at all. */
import { readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import type { Rules } from '#policies/compile.ts'
import { decideName } from '#policies/decide.ts'
import type { NetworkPolicy } from '#policies/document.ts'
import { createAlwaysFiles } from '../../egress-sidecar/always-files.ts'
import { readPolicyFile } from '../../egress-sidecar/policy-file.ts'
import { createPolicyKeeper, type PolicyKeeper } from '../../egress-sidecar/policy-keeper.ts'

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

t.test('a policy file that is of no use', async (t) => {
  const directory = t.testdir({ blank: ' \n', bad: '{', wrong: '{"defaultAction":"x"}', folder: {} })
  t.same(await readPolicyFile(''), { policy: null, warning: null })
  t.same(await readPolicyFile(join(directory, 'missing')), { policy: null, warning: null })
  for (const name of ['blank', 'bad', 'wrong']) {
    const found = await readPolicyFile(join(directory, name))
    t.equal(found.policy, null, name)
    t.type(found.warning, 'string')
  }
  await t.rejects(readPolicyFile(join(directory, 'folder')), { code: 'EISDIR' })
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
