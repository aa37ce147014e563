/** The networkPolicy document and what follows from it: each row a document, a place, the verdict and its reason. */
import t from 'tap'
import { canonicalAddress, isSpecialUse, NetworkTable, readAddress, specialUseNetworks } from '#policies/address.ts'
import { compilePolicy, type Layers } from '#policies/compile.ts'
import { decideAddress, decideLearned, decideName } from '#policies/decide.ts'
import { isTakenByOriginal, readNetworkPolicy, readNetworkRules, type NetworkPolicy } from '#policies/document.ts'
import { normaliseName, parseTarget, targetKey } from '#policies/host.ts'
import { allowReasons, denyReasons } from '#policies/verdict.ts'
import { randomOf } from '../support/random.ts'

const read = (value: unknown): NetworkPolicy => {
  const result = readNetworkPolicy(value)
  if (!result.ok) throw new Error(JSON.stringify(result.problems))
  return result.policy
}
const policy = (defaultAction: 'allow' | 'deny', ...rules: string[]): NetworkPolicy =>
  read({ defaultAction, egress: rules.map((rule) => ({ action: rule.split(' ')[0], target: rule.split(' ')[1] })) })

t.test('documents that are read', async (t) => {
  const denyAll = { defaultAction: 'deny', egress: [] }
  const rows: [value: unknown, wanted: unknown, why: string][] = [
    [undefined, denyAll, 'absent'], [null, denyAll, 'null'], [{}, denyAll, 'empty'], [{ defaultAction: '' }, denyAll, 'blank action'], [{ defaultAction: null, egress: null }, denyAll, 'nulls'],
    [{ defaultAction: ' Allow ' }, { defaultAction: 'allow', egress: [] }, 'trimmed, any case'],
    [{ DEFAULTACTION: 'allow', Egress: [{ ACTION: 'ALLOW', Target: ' a.example ' }], other: null }, { defaultAction: 'allow', egress: [{ action: 'allow', target: 'a.example' }] }, 'keys in any case; an unknown one that is null says nothing'],
    [{ egress: [{ target: '10.0.0.0/8' }] }, { defaultAction: 'deny', egress: [{ action: 'deny', target: '10.0.0.0/8' }] }, 'a rule without action denies'],
    [{ egress: [{ action: 'allow', target: 'Example.COM.' }] }, { defaultAction: 'deny', egress: [{ action: 'allow', target: 'Example.COM.' }] }, 'the text stays as written'],
  ]
  for (const [value, wanted, why] of rows) t.same(read(value), wanted, why)
})

t.test('documents that are refused, every problem with its path', async (t) => {
  const rows: [value: unknown, paths: string[], reason: RegExp][] = [
    [[], ['networkPolicy'], /object/], ['x', ['networkPolicy'], /object/], [7, ['networkPolicy'], /object/], [false, ['networkPolicy'], /object/],
    [{ egress: {} }, ['networkPolicy.egress'], /array/], [{ egress: ['x'] }, ['networkPolicy.egress[0]'], /object/], [{ egress: [[]] }, ['networkPolicy.egress[0]'], /object/],
    [{ defaultAction: 7 }, ['networkPolicy.defaultAction'], /string/],
    [{ defaultAction: 'Block' }, ['networkPolicy.defaultAction'], /^unsupported action "block"$/],
    [{ egress: [{ action: 'foo', target: 'a' }, { action: 'allow' }] }, ['networkPolicy.egress[0].action', 'networkPolicy.egress[1].target'], /unsupported action "foo"|cannot be empty/],
    [{ egress: [null] }, ['networkPolicy.egress[0].target'], /^egress target cannot be empty$/],
    [{ egress: [{ action: 'allow', target: 7 }] }, ['networkPolicy.egress[0].target'], /string/],
    [{ defaultAction: 'allow', egres: [{ target: 'a.example' }] }, ['networkPolicy.egres'], /^is not a known key$/],
    [{ egress: [{ action: 'allow', target: 'a.example', port: 443, protocol: 'tcp' }, { target: 'b.example', Ports: [22] }] }, ['networkPolicy.egress[0].port', 'networkPolicy.egress[0].protocol', 'networkPolicy.egress[1].Ports'], /^is not a known key$/],
    [{ defaultAction: 'allow', egress: [{ target: '10.0.0.0/8' }], EGRESS: [] }, ['networkPolicy.EGRESS'], /^egress stands here in two spellings$/],
    [{ DefaultAction: 'deny', egress: [{ target: 'a.example', Target: 'b.example' }, { action: 'deny', ACTION: 'allow', target: '*' }], defaultaction: 'allow' }, ['networkPolicy.defaultaction', 'networkPolicy.egress[0].Target', 'networkPolicy.egress[1].ACTION'], /^(defaultAction|target|action) stands here in two spellings$/],
    [JSON.parse('{"__proto__":{"defaultAction":"allow"}}'), ['networkPolicy.__proto__'], /^is not a known key$/],
  ]
  for (const [value, paths, reason] of rows) {
    const result = readNetworkPolicy(value)
    t.same(result.ok ? [] : result.problems.map((p) => p.path), paths, JSON.stringify(value))
    if (!result.ok) for (const problem of result.problems) t.match(problem.reason, reason)
  }
})

t.test('documents that the original enforces, also where we refuse them', async (t) => {
  const rows: [value: unknown, taken: boolean, ours: boolean][] = [
    [undefined, true, true], [null, true, true], [{}, true, true], [{ defaultAction: null, egress: null }, true, true], [{ EGRESS: [{ Action: ' Allow ', target: 'a.example' }] }, true, true],
    [{ egress: [{ target: '*' }] }, true, false], [{ egress: [{ action: 'allow', target: 'example.com:443' }] }, true, false], [{ egress: [{ action: 'allow', target: 'a.example', ports: [443] }] }, true, false],
    [{ defaultAction: 'block' }, true, false], [{ egres: 7 }, true, false], [{ egress: [], Egress: [] }, true, false],
    [[], false, false], ['x', false, false], [7, false, false], [false, false, false], [{ defaultAction: 7 }, false, false], [{ egress: {} }, false, false], [{ egress: ['x'] }, false, false], [{ egress: [null] }, false, false], [{ egress: [[]] }, false, false],
    [{ egress: [{ action: 7, target: 'a.example' }] }, false, false], [{ egress: [{ target: 7 }] }, false, false], [{ egress: [{ target: ' ' }] }, false, false],
    [{ egress: [{ target: '*' }, { action: 'maybe', target: 'a.example', ports: [443] }] }, false, false],
  ]
  for (const [value, taken, ours] of rows) t.same([isTakenByOriginal(value), readNetworkPolicy(value).ok], [taken, ours], JSON.stringify(value))
})

t.test('paths of a document that is a whole body', async (t) => {
  t.match(readNetworkPolicy({ defaultAction: 'x', egress: [{ target: '*' }] }, ''), { ok: false, problems: [{ path: 'defaultAction' }, { path: 'egress[0].target' }] })
})

t.test('as many wildcards as an operator may have', async (t) => {
  const many = compilePolicy({ defaultAction: 'allow', egress: Array.from({ length: 200_000 }, (_, i) => ({ action: 'deny', target: `*.n${i}.ads.example` })) })
  t.equal(decideName(many, 'x.n199999.ads.example').action, 'deny')
})

t.test('the same target', async (t) => {
  const rows: [a: string, b: string, same: boolean][] = [
    ['Example.com.', 'example.com', true], ['*.BÜCHER.example', '*.xn--bcher-kva.example.', true], ['example.com', '*.example.com', false],
    ['1.1.1.1', '1.1.1.1/32', true], ['1.1.1.1', '::ffff:1.1.1.1', true], ['FD00::1', ' fd00:0::1/128', true], ['10.1.2.3/8', '10.0.0.0/8', true], ['10.0.0.0', '10.0.0.0/8', false], ['10.0.0.0/8', '10.0.0.0/9', false], ['a..b', 'A..B ', true],
  ]
  for (const [a, b, same] of rows) t.equal(targetKey(a) === targetKey(b), same, `${a}, ${b}`)
})

t.test('bare rules (PATCH)', async (t) => {
  t.same(readNetworkRules([{ action: 'allow', target: 'a.b' }]), { ok: true, rules: [{ action: 'allow', target: 'a.b' }] })
  t.match(readNetworkRules([{ action: 'allow', target: 'a.b', port: 443 }]), { ok: false, problems: [{ path: 'rules[0].port', reason: 'is not a known key' }] })
  t.match(readNetworkRules([{ action: 'allow', target: 'a.b' }, { action: 'deny', Action: 'allow', target: 'c.d' }], ''), { ok: false, problems: [{ path: '[1].Action', reason: 'action stands here in two spellings' }] })
  t.match(readNetworkRules({}), { ok: false, problems: [{ path: 'rules' }] })
  t.match(readNetworkRules([{ target: '*' }]), { ok: false, problems: [{ path: 'rules[0].target', reason: /defaultAction/ }] })
})

t.test('targets', async (t) => {
  const rows: [text: string, kind: string, value?: string][] = [
    ['example.com', 'name', 'example.com'], ['Example.COM.', 'name', 'example.com'], ['*.Example.com', 'wildcard', 'example.com'], ['a_b.example', 'name', 'a_b.example'], ['localhost', 'name', 'localhost'],
    ['bücher.example', 'name', 'xn--bcher-kva.example'], ['*.BÜCHER.example', 'wildcard', 'xn--bcher-kva.example'],
    ['1.2.3.4', 'address', '1.2.3.4'], ['1.2.3.4/32', 'address', '1.2.3.4'], ['10.1.2.3/8', 'network', '10.0.0.0/8'], ['0.0.0.0/0', 'network', '0.0.0.0/0'], ['255.255.255.255', 'address', '255.255.255.255'],
    ['2001:DB8:0:0::1', 'address', '2001:db8::1'], ['fd00::/8', 'network', 'fd00::/8'], ['::/0', 'network', '::/0'],
    ['::ffff:1.2.3.4', 'address', '1.2.3.4'], ['::ffff:10.0.0.0/104', 'network', '10.0.0.0/8'], ['::ffff:0:0/96', 'network', '0.0.0.0/0'], ['::ffff:1.2.3.4/95', 'network', '::fffe:0:0/95'], ['::ffff:1.2.3.4/129', 'refused'],
    ['', 'refused'], ['  ', 'refused'], ['*', 'refused'], ['*example.com', 'refused'], ['a.*.com', 'refused'], ['*.', 'refused'], ['.', 'refused'], ['http://x/', 'refused'], ['x/y', 'refused'],
    ['1.2.3.4:443', 'refused'], ['example.com:443', 'refused'], ['10.0.0.0/33', 'refused'], ['300.1.1.1', 'refused'], ['010.0.0.1', 'refused'], ['1.2.3', 'refused'], ['1.2.3.4.5', 'refused'], ['1..2.3', 'refused'], ['1.2.3.', 'refused'], ['1.2.3.256', 'refused'], ['1.2.3.00', 'refused'], ['255.255.255.256/1', 'refused'], ['10.0.0.0/08', 'refused'], ['10.0.0.0/', 'refused'],
    ['fe80::1%eth0', 'refused'], ['::1/129', 'refused'], ['a..b', 'refused'], ['a b', 'refused'], ['a\u0000b', 'refused'], ['a%2eb', 'refused'], ['１.２.３.４', 'refused'], ['[::1]', 'refused'],
    ['198.51.100.20-198.51.100.29', 'refused'], ['*.51.100.40', 'refused'], ['0x7f.1', 'refused'], ['*.0x7f', 'refused'], ['a.7', 'refused'], ['7.a', 'name', '7.a'],
    [`${'a'.repeat(64)}.com`, 'refused'], [`${'a.'.repeat(127)}com`, 'refused'], ['é'.repeat(100), 'refused'], ['xn--é', 'refused'],
  ]
  for (const [text, kind, value] of rows) {
    const target = parseTarget(text)
    t.equal('problem' in target ? 'refused' : target.kind, kind, JSON.stringify(text))
    if ('problem' in target) t.equal(target.problem.endsWith('(an international name can be written in A-labels, xn--…)'), /[^\0-\x7f]/.test(text), `${text}: whether A-labels are the way out`)
    if (!('problem' in target)) t.equal(target.value, value)
  }
})

t.test('one spelling of an address', async (t) => {
  const rows: [text: string, wanted: string | null][] = [
    ['1.2.3.4', '1.2.3.4'], ['0.0.0.0', '0.0.0.0'], ['255.255.255.255', '255.255.255.255'], ['::FFFF:1.2.3.4', '1.2.3.4'], ['::ffff:102:304', '1.2.3.4'],
    ['2001:DB8:0:0:0:0:0:1', '2001:db8::1'], ['::', '::'], ['01.2.3.4', null], ['1.2.3', null], ['', null], ['fe80::1%eth0', null], ['1.2.3.4/32', null], ['example.com', null], ['::ffff:1.2.3.400', null],
  ]
  for (const [text, wanted] of rows) t.equal(canonicalAddress(text), wanted, text)
})

t.test('names', async (t) => {
  const wild = policy('deny', 'allow *.Example.com')
  const rows: [policy: NetworkPolicy, name: string, action: string, reason: string, rule?: number][] = [
    [wild, 'a.example.com.', 'allow', 'rule-allows', 0], [wild, 'A.B.example.COM', 'allow', 'rule-allows', 0],
    [wild, 'example.com', 'deny', 'default-denies'], [wild, 'notexample.com', 'deny', 'default-denies'], [wild, '.', 'deny', 'default-denies'],
    [policy('deny', 'allow *.example.com', 'deny api.example.com'), 'api.example.com', 'allow', 'rule-allows', 0],
    [policy('allow', 'deny *.com', 'allow *.example.com'), 'api.example.com', 'deny', 'rule-denies', 0],
    [policy('allow', 'deny *.com', 'allow *.example.com'), 'api.example.org', 'allow', 'default-allows'],
    [policy('deny', 'deny 1.2.3.4', 'allow a.b', 'deny a.b'), 'a.b', 'allow', 'rule-allows', 1],
    [policy('deny', 'allow example.com.'), 'example.com', 'allow', 'rule-allows', 0],
    [policy('allow'), 'x\\.example.com', 'deny', 'malformed-name'], [policy('allow'), 'a\u0000.com', 'deny', 'malformed-name'], [policy('allow'), 'a%2e.com', 'deny', 'malformed-name'],
    [policy('allow'), 'é.com', 'deny', 'malformed-name'], [policy('allow'), 'a..com', 'deny', 'malformed-name'], [policy('allow'), `${'a'.repeat(64)}.com`, 'deny', 'malformed-name'], [policy('allow'), `${'a.'.repeat(127)}com`, 'deny', 'malformed-name'],
    [policy('allow'), '.', 'allow', 'default-allows'],
  ]
  for (const [p, name, action, reason, rule] of rows) t.same(decideName(compilePolicy(p), normaliseName(name)), rule === undefined ? { action, reason } : { action, reason, rule }, `${JSON.stringify(p)} ${name}`)

  const layers: Layers = { alwaysDeny: [{ action: 'deny', target: 'bad.example' }], alwaysAllow: [{ action: 'allow', target: '*.infra.example' }] }
  const layered = compilePolicy(policy('deny', 'allow bad.example', 'deny a.infra.example', 'allow ok.example'), layers)
  t.same(decideName(layered, 'bad.example'), { action: 'deny', reason: 'rule-denies' }, 'an operator denies before the user allows')
  t.same(decideName(layered, 'a.infra.example'), { action: 'allow', reason: 'rule-allows' }, 'an operator allows before the user denies')
  t.same(decideName(layered, 'ok.example'), { action: 'allow', reason: 'rule-allows', rule: 2 }, 'rules are counted from the user’s first')
})

t.test('addresses', async (t) => {
  const p = policy('deny', 'allow 10.0.0.0/8', 'deny 10.1.0.0/16', 'allow 10.1.2.3', 'allow 2001:db8::/32', 'deny 198.51.100.7', 'allow 0.0.0.0/0', 'deny 255.255.255.255')
  const rules = compilePolicy(p, { floor: ['169.254.169.254', '10.9.0.0/16'] })
  const rows: [address: string, direct: unknown, learned?: unknown][] = [
    ['10.2.0.1', { action: 'allow', reason: 'rule-allows', rule: 0 }], ['10.1.2.3', { action: 'deny', reason: 'rule-denies', rule: 1 }], ['::ffff:10.1.9.9', { action: 'deny', reason: 'rule-denies', rule: 1 }],
    ['10.9.1.1', { action: 'deny', reason: 'floor' }], ['169.254.169.254', { action: 'deny', reason: 'floor' }], ['198.51.100.7', { action: 'deny', reason: 'rule-denies', rule: 4 }],
    ['8.8.8.8', { action: 'allow', reason: 'rule-allows', rule: 5 }], ['255.255.255.255', { action: 'deny', reason: 'rule-denies', rule: 6 }], ['2001:db8::9', { action: 'allow', reason: 'rule-allows', rule: 3 }],
    ['2001:db9::9', { action: 'deny', reason: 'default-denies' }, { action: 'allow', reason: 'name-was-allowed' }], ['nonsense', { action: 'deny', reason: 'malformed-address' }], ['1.2.3.4/8', { action: 'deny', reason: 'malformed-address' }],
  ]
  for (const [address, direct, learned] of rows) {
    t.same(decideAddress(rules, address), direct, address)
    t.same(decideLearned(rules, address), learned ?? direct, `${address}, learned`)
    const read = readAddress(address)
    if (read !== null) t.same([decideAddress(rules, read), decideLearned(rules, read)], [direct, learned ?? direct], `${address}, read before`)
  }
  t.same([rules.allow4, rules.allow6], [['10.0.0.0/8', '10.1.2.3', '0.0.0.0/0'], ['2001:db8::/32']])
  t.same([rules.deny4, rules.deny6], [['10.1.0.0/16', '198.51.100.7', '255.255.255.255', '169.254.169.254', '10.9.0.0/16'], []], 'the kernel denies the floor, too')
  t.same(decideAddress(compilePolicy(policy('allow')), '10.0.0.1'), { action: 'allow', reason: 'default-allows' })
  t.throws(() => compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*' }] }), TypeError)
  t.throws(() => compilePolicy(policy('deny'), { floor: ['example.com'] }), { message: /floor/ })
})

t.test('what a name must not lead to (rebinding)', async (t) => {
  const open = compilePolicy(policy('allow'))
  // First and last of each network, and what comes before and behind: nothing where that is special, too.
  const networks: [first: string, last: string, before?: string | undefined, behind?: string][] = [
    ['0.0.0.0', '0.255.255.255', undefined, '1.0.0.0'], ['10.0.0.0', '10.255.255.255', '9.255.255.255', '11.0.0.0'], ['100.64.0.0', '100.127.255.255', '100.63.255.255', '100.128.0.0'],
    ['127.0.0.0', '127.255.255.255', '126.255.255.255', '128.0.0.0'], ['169.254.0.0', '169.254.255.255', '169.253.255.255', '169.255.0.0'], ['172.16.0.0', '172.31.255.255', '172.15.255.255', '172.32.0.0'],
    ['192.168.0.0', '192.168.255.255', '192.167.255.255', '192.169.0.0'], ['224.0.0.0', '239.255.255.255', '223.255.255.255'], ['240.0.0.0', '255.255.255.255'],
    ['::', '::1', undefined, '::2'], ['::ffff:0:0', '::ffff:ffff:ffff', '::fffe:ffff:ffff', '::1:0:0:0'], ['64:ff9b::', '64:ff9b::ffff:ffff', '64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff', '64:ff9b::1:0:0'],
    ['64:ff9b:1::', '64:ff9b:1:ffff:ffff:ffff:ffff:ffff', '64:ff9b:0:ffff:ffff:ffff:ffff:ffff', '64:ff9b:2::'], ['2001::', '2001:0:ffff:ffff:ffff:ffff:ffff:ffff', '2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff', '2001:1::'],
    ['2002::', '2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff', '2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff', '2003::'], ['fc00::', 'fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff', 'fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff', 'fe00::'],
    ['fe80::', 'febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff', 'fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff', 'fec0::'], ['ff00::', 'ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff', 'feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff'],
  ]
  const middle = ['100.100.1.1', '169.254.169.254', '172.20.0.1', '::ffff:8.8.8.8', '64:ff9b::808:808', '2002:808:808::1', 'fe80::1', 'ff02::1']
  for (const address of [...networks.flatMap(([first, last]) => [first, last]), ...middle]) t.same(decideLearned(open, address), { action: 'deny', reason: 'special-use-address' }, address)
  t.equal(specialUseNetworks.length, networks.length, 'each is here: `::` and `::1` are one row, v4-mapped addresses are no network of the list')
  t.ok(isSpecialUse('nonsense'), 'what is no address is opened for nobody')
  t.equal(new NetworkTable().find('nonsense'), undefined)
  const ordinary = ['8.8.8.8', '192.0.2.1', '198.18.0.1', '198.51.100.1', '203.0.113.1', '2001:db8::1', '2606:4700::1', ...networks.flatMap(([, , before, behind]) => [before, behind]).filter((address) => address !== undefined)]
  for (const address of ordinary) t.same(decideLearned(open, address), { action: 'allow', reason: 'name-was-allowed' }, address)
  t.same(decideLearned(compilePolicy(policy('deny', 'allow 10.0.0.0/8')), '10.0.0.1'), { action: 'allow', reason: 'rule-allows', rule: 0 }, 'an allow rule covers it')
})

t.test('decide agrees with a plain reading of the rules; garbage never throws', async (t) => {
  const random = randomOf(t)
  const words = ['a', 'b', 'example', 'com', 'x-y', '_s']
  const name = (): string => Array.from({ length: random.between(1, 4) }, () => random.pick(words)).join('.')
  const wrong: string[] = []
  for (let round = 0; round < 400; round++) {
    const rules = Array.from({ length: random.between(0, 8) }, () => `${random.pick(['allow', 'deny'])} ${random.pick(['', '*.'])}${name()}`)
    const p = policy(random.pick(['allow', 'deny']), ...rules)
    const compiled = compilePolicy(p)
    for (let i = 0; i < 10; i++) {
      const asked = name()
      const first = p.egress.find(({ target }) => (target.startsWith('*.') ? asked.endsWith(target.slice(1)) : asked === target))
      if (decideName(compiled, asked).action !== (first?.action ?? p.defaultAction)) wrong.push(`${asked} by ${p.defaultAction}, ${rules.join(', ')}`)
    }
    const noise = random.text('.:*/%aé1\u0000 -_', 0, 40)
    parseTarget(noise)
    decideName(compiled, normaliseName(noise))
    decideAddress(compiled, noise)
    readNetworkPolicy({ egress: [{ action: 'allow', target: noise }, noise] })
  }
  t.same(wrong, [])
})

t.test('reasons are closed lists without a word in both', async (t) => {
  t.same(allowReasons.filter((reason) => (denyReasons as readonly string[]).includes(reason)), [])
})
