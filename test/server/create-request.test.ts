import t from 'tap'
import { ApiError } from '../../server/api-error.ts'
import { readCreateRequest } from '../../server/create-request.ts'
import { imageReferenceProblem } from '../../server/image-reference.ts'
import { readLimits } from '../../server/resources.ts'
import { splitShell } from '../../server/shell-split.ts'
import { gatewayToml, readToml } from './bench.ts'

const config = readToml(gatewayToml.replace('[server]', '[server]\nmax_sandbox_timeout_seconds = 86400'))
const direct = readToml('[server]\napi_key = "k"')
const body = { image: { uri: 'python:3.12' }, entrypoint: ['sleep', '1'], resourceLimits: {} }
const now = Date.UTC(2026, 0, 1)

t.test('refusals name the path', async (t) => {
  const cases: [why: string, body: unknown, code: string, text: RegExp][] = [
    ['nothing', undefined, 'SANDBOX::INVALID_PARAMETER', /^body: is empty; it must be a JSON object$/],
    ['null', null, 'SANDBOX::INVALID_PARAMETER', /^body: must be a JSON object$/],
    ['an array', [], 'SANDBOX::INVALID_PARAMETER', /^body: must be a JSON object$/],
    ['a text', 'image', 'SANDBOX::INVALID_PARAMETER', /^body: must be a JSON object$/],
    ['empty', {}, 'SANDBOX::INVALID_PARAMETER', /image\.uri: is required; entrypoint: is required; resourceLimits: is required/],
    ['a number as image', { ...body, image: 5 }, 'SANDBOX::INVALID_PARAMETER', /^image: /],
    ['no uri', { ...body, image: {} }, 'SANDBOX::INVALID_PARAMETER', /image\.uri: is required/],
    ['blank uri', { ...body, image: { uri: ' ' } }, 'SANDBOX::INVALID_PARAMETER', /image\.uri: is required/],
    ['an option for uri', { ...body, image: { uri: '--privileged' } }, 'SANDBOX::INVALID_PARAMETER', /image\.uri: is not an image reference/],
    ['a repository in upper case', { ...body, image: { uri: 'Foo/BAR' } }, 'SANDBOX::INVALID_PARAMETER', /^image\.uri: is not an image reference: the repository must be lower case/],
    ['half an auth', { ...body, image: { uri: 'a', auth: { username: 'u' } } }, 'SANDBOX::INVALID_PARAMETER', /image\.auth\.password: is required/],
    ['empty entrypoint', { ...body, entrypoint: [] }, 'SANDBOX::INVALID_PARAMETER', /entrypoint: /],
    ['no program', { ...body, entrypoint: [''] }, 'SANDBOX::INVALID_PARAMETER', /entrypoint\[0\]: must name a program/],
    ['an open quote', { ...body, entrypoint: ['sh -c "x'] }, 'SANDBOX::INVALID_PARAMETER', /entrypoint\[0\]: has an unbalanced quote/],
    ['a NUL', { ...body, entrypoint: ['a\0b'] }, 'SANDBOX::INVALID_PARAMETER', /entrypoint\[0\]: must not hold a NUL/],
    ['short timeout', { ...body, timeout: 59 }, 'SANDBOX::INVALID_PARAMETER', /timeout: .*60/],
    ['broken timeout', { ...body, timeout: 600.5 }, 'SANDBOX::INVALID_PARAMETER', /timeout: /],
    ['timeout above the cap', { ...body, timeout: 86401 }, 'SANDBOX::INVALID_PARAMETER', /exceeds configured maximum of 86400s/],
    ['timeout beyond the calendar', { ...body, timeout: 9e15 }, 'SANDBOX::INVALID_PARAMETER', /too large to represent/],
    ['numbers as limits', { ...body, resourceLimits: { cpu: 1 } }, 'SANDBOX::INVALID_PARAMETER', /resourceLimits\.cpu: /],
    ['memory in words', { ...body, resourceLimits: { memory: '1e9' } }, 'SANDBOX::INVALID_PARAMETER', /resourceLimits\.memory: /],
    ['env that is no text', { ...body, env: { A: 1 } }, 'SANDBOX::INVALID_PARAMETER', /env\.A: /],
    ['env with =', { ...body, env: { 'A=B': 'c' } }, 'SANDBOX::INVALID_PARAMETER', /env\["A=B"\]: is not a variable name/],
    ['Windows', { ...body, platform: { os: 'Windows', arch: 'amd64' } }, 'SANDBOX::INVALID_PARAMETER', /platform\.os: must be linux/],
    ['a metadata value with spaces', { ...body, metadata: { a: 'b c' } }, 'SANDBOX::INVALID_METADATA_LABEL', /metadata\["a"\]: is not a label value/],
    ['a reserved key', { ...body, metadata: { 'opensandbox.io/id': 'x' } }, 'SANDBOX::INVALID_METADATA_LABEL', /reserved prefix/],
    ['a key of ours', { ...body, metadata: { 'sallyport.io/instance': 'x' } }, 'SANDBOX::INVALID_METADATA_LABEL', /reserved prefix/],
    ['__proto__', JSON.parse('{"image":{"uri":"a"},"entrypoint":["a"],"resourceLimits":{},"metadata":{"__proto__":"x"}}'), 'SANDBOX::INVALID_METADATA_LABEL', /metadata\["__proto__"\]/],
    ['a bad policy', { ...body, networkPolicy: { egress: [{ action: 'allow', target: '*' }, { action: 'maybe', target: 'a.b' }] } }, 'SANDBOX::INVALID_PARAMETER', /networkPolicy\.egress\[0\]\.target: .*networkPolicy\.egress\[1\]\.action: /],
    ['too many rules', { ...body, networkPolicy: { egress: Array.from({ length: 4097 }, () => ({ target: 'a.b' })) } }, 'SANDBOX::INVALID_PARAMETER', /^networkPolicy\.egress: has 4097 rules, more than egress\.max_rules = 4096/],
    ['rules too long', { ...body, networkPolicy: { egress: Array.from({ length: 4096 }, () => ({ target: `${'a'.repeat(60)}.`.repeat(4) + 'b' })) } }, 'SANDBOX::INVALID_PARAMETER', /^networkPolicy: is longer than 1048576 bytes/],
    ['a variable no program can be started with', { ...body, env: { A: 'x'.repeat(131_070) } }, 'SANDBOX::INVALID_PARAMETER', /^env\.A: is longer/],
    ['such an argument', { ...body, entrypoint: ['a', 'x'.repeat(131_072)] }, 'SANDBOX::INVALID_PARAMETER', /^entrypoint\[1\]: is longer/],
    ['a policy whose key is misspelt', { ...body, netwrokPolicy: { egress: [] } }, 'SANDBOX::INVALID_PARAMETER', /^netwrokPolicy: is not a known field; did you mean networkPolicy/],
    ['two policies', { ...body, networkPolicy: {}, network_policy: { defaultAction: 'allow' } }, 'SANDBOX::INVALID_PARAMETER', /^network_policy: is given twice, also as networkPolicy/],
    ['a rule with a port', { ...body, networkPolicy: { egress: [{ action: 'allow', target: 'a.b', port: 443 }] } }, 'SANDBOX::INVALID_PARAMETER', /^networkPolicy\.egress\[0\]\.port: is not a known key/],
    ['a policy whose key is in another case', { ...body, NetworkPolicy: { egress: [] } }, 'SANDBOX::INVALID_PARAMETER', /^NetworkPolicy: is not a known field/],
    ['secureAccess in another case', { ...body, secureaccess: true }, 'SANDBOX::INVALID_PARAMETER', /^secureaccess: is not a known field/],
    ...['allowInternetAccess', 'allow_internet_access', 'internet', 'firewall', 'allowedDomains', 'denyOut', 'blockNetwork', 'cidrAllowlist', 'outbound', 'offline'].map((key) => [`another product's word: ${key}`, { ...body, [key]: false }, 'SANDBOX::INVALID_PARAMETER', new RegExp(`^${key}: is not a known field; did you mean networkPolicy`)] as [string, unknown, string, RegExp]),
    ...['networkPolicy', 'network_policy', 'network-policy', 'egress', 'egress.policy', 'allowInternetAccess', 'secureAccess'].map((key) => [`a guard among the extensions: ${key}`, { ...body, extensions: { [key]: 'x' } }, 'SANDBOX::INVALID_PARAMETER', new RegExp(`^extensions\\["${key}"\\]: guards nothing here; did you mean the field`)] as [string, unknown, string, RegExp]),
    ['a policy that is no object', { ...body, networkPolicy: 5 }, 'SANDBOX::INVALID_PARAMETER', /networkPolicy/],
    ['renew too short', { ...body, extensions: { 'access.renew.extend.seconds': '299' } }, 'SANDBOX::INVALID_PARAMETER', /between 300 and 86400/],
    ['a pool', { ...body, extensions: { poolRef: 'p' } }, 'SANDBOX::UNSUPPORTED_POOL_REF', /poolRef/],
    ['image and snapshot', { ...body, snapshotId: 's' }, 'SANDBOX::INVALID_PARAMETER', /snapshotId: give either/],
    ['a snapshot', { ...body, image: undefined, snapshotId: 's' }, 'SNAPSHOT::NOT_IMPLEMENTED', /snapshots/],
    ['volumes', { ...body, volumes: [{}] }, 'NOT_IMPLEMENTED', /volumes/],
    ['credential proxy', { ...body, credentialProxy: { enabled: true } }, 'NOT_IMPLEMENTED', /credentialProxy/],
  ]
  for (const [why, given, code, text] of cases) {
    const error = t.throws(() => readCreateRequest(given, config, now), why) as unknown as ApiError
    t.match(error, { code, message: text }, why)
    t.notMatch(error.message, /secret|hunter2/, `${why}: says nothing of what was sent`)
  }
  t.throws(() => readCreateRequest({ ...body, secureAccess: true }, direct, now), { message: /secureAccess: needs ingress.mode/ })
  t.throws(() => readCreateRequest({ ...body, networkPolicy: {} }, direct, now), { message: /egress\.image must be configured/ })
  t.throws(() => readCreateRequest({ ...body, networkPolicy: {} }, { ...config, upstreams: [] }, now), { message: /^networkPolicy: needs egress\.dns_upstreams: / })
})

t.test('what is accepted', async (t) => {
  const read = (more: Record<string, unknown>) => readCreateRequest({ ...body, ...more }, config, now)
  t.equal(read({ timeout: '600' }).timeout, 600, 'a number in quotes')
  t.equal(read({ timeout: null }).timeout, null, 'null is absent')
  t.equal(read({}).networkPolicy, null)
  t.ok(readCreateRequest({ ...body, networkPolicy: {} }, { ...config, upstreams: [], docker: { ...config.docker, default_bridge: true } }, now).networkPolicy, 'on docker0 the engine names resolvers')
  t.equal(readCreateRequest(body, { ...config, upstreams: [] }, now).networkPolicy, null, 'without resolvers nobody is refused but who has a policy')
  t.match(read({ networkPolicy: {} }).networkPolicy, { defaultAction: 'deny', egress: [] }, 'an empty policy denies everything')
  t.match(read({ network_policy: {} }).networkPolicy, { defaultAction: 'deny' }, 'snake case')
  t.equal(read({ networkPolicy: null }).networkPolicy, null, 'an explicit null is no policy')
  t.same(read({ entrypoint: ['sh -c "echo a b"'] }).command, ['sh', '-c', 'echo a b'], 'one text is a command line')
  t.same(read({ entrypoint: ['sh', '-c', 'echo a b'] }).command, ['sh', '-c', 'echo a b'])
  t.equal(read({ env: { A: 'x'.repeat(131_069) } }).env.A?.length, 131_069, 'as long as a variable may be')
  t.equal(read({ networkPolicy: { egress: Array.from({ length: 4096 }, () => ({ target: 'a.b' })) } }).networkPolicy?.egress.length, 4096)
  t.same(read({ env: { A: 'b', N: null, E: '' } }).env, { A: 'b', N: null, E: '' })
  t.equal(read({ extensions: { 'access.renew.extend.seconds': ' 300 ' } }).renewExtendSeconds, 300)
  t.match(read({ platform: { os: ' Linux ', arch: 'ARM64' } }).platform, { os: 'linux', arch: 'arm64' })
  // What the official SDKs and their examples send.
  for (const more of [{ resourceRequests: { cpu: '250m' } }, { lifecycle: {} }, { extensions: { imagePullPolicy: 'Always', 'opensandbox.extensions.image-pull-policy': 'Always', 'opensandbox.extensions.network-policy': 'x' } }]) t.ok(read(more), JSON.stringify(more))
  t.same(Object.keys(read({ unknownField: 1 })).includes('unknownField'), false)
})

t.test('limits', async (t) => {
  const cases: [Record<string, string>, { memory: number; nanoCpus: number; gpus: number } | null][] = [
    [{}, { memory: 0, nanoCpus: 0, gpus: 0 }],
    [{ cpu: '500m', memory: '64Mi', gpu: '2' }, { memory: 67108864, nanoCpus: 5e8, gpus: 2 }],
    [{ cpu: '1.5', memory: '1.5Gi', gpu: 'all' }, { memory: 1610612736, nanoCpus: 1.5e9, gpus: -1 }],
    [{ memory: '100000000' }, { memory: 1e8, nanoCpus: 0, gpus: 0 }],
    [{ memory: '2 GB' }, { memory: 2e9, nanoCpus: 0, gpus: 0 }],
    [{ memory: '5Mi' }, null], [{ memory: '' }, null], [{ memory: '1e9' }, null], [{ memory: '-1Gi' }, null], [{ memory: '9999999Ti' }, null],
    [{ cpu: '0' }, null], [{ cpu: 'many' }, null], [{ cpu: '9m' }, null], [{ gpu: '0' }, null], [{ gpu: '1.5' }, null],
  ]
  for (const [raw, wanted] of cases) {
    const problems: { path: string; reason: string }[] = []
    const limits = readLimits(raw, problems)
    if (wanted === null) t.equal(problems.length, 1, JSON.stringify(raw))
    else t.same([limits, problems], [wanted, []], JSON.stringify(raw))
  }
})

t.test('image references', async (t) => {
  const digest = `sha256:${'0123456789abcdef'.repeat(4)}`
  const cases: [why: string, text: string, problem: RegExp | null][] = [
    ['a name', 'python', null], ['with a tag', 'python:3.12-slim', null], ['with a digest', `python@${digest}`, null], ['with both', `a/b:1@${digest}`, null], ['an image id', digest, null],
    ['a registry', 'registry.example/a/b:1', null], ['a registry with a port', 'localhost:5000/a', null], ['a registry in upper case', 'Registry.Example/a', null], ['an IPv6 registry', '[2001:db8::1]:5000/a', null],
    ['separators', 'a__b/c-d/e.f--g', null], ['the longest tag', `a:${'x'.repeat(128)}`, null],
    ['upper case', 'Python', /lower case/], ['upper case behind a registry', 'r.example/A', /lower case/], ['what no registry is called', 'Foo/bar', /lower case/],
    ['an option', '--privileged', /is not an image reference$/], ['a space', 'a b', /is not/], ['nothing before the tag', ':1', /is not/], ['an empty tag', 'a:', /the tag/], ['a tag too long', `a:${'x'.repeat(129)}`, /the tag/],
    ['a tag with a dash in front', 'a:-x', /the tag/], ['an empty part', 'a//b', /is not/], ['a slash at the end', 'a/', /is not/], ['going up', '../a', /is not|registry/], ['three underscores', 'a___b', /is not/],
    ['a short digest', 'a@sha256:abc', /the digest/], ['two digests', `a@${digest}@${digest}`, /the digest/], ['a registry that is no host', 'a_b.example/c', /the registry/],
    ['a scheme', 'https://r.example/a', /is not|registry/], ['a NUL', 'a\0b', /is not/], ['a line break', 'a\n', /is not/], ['a name too long', 'a'.repeat(256), /longer than 255/],
  ]
  for (const [why, text, problem] of cases) {
    const found = imageReferenceProblem(text)
    if (problem === null) t.equal(found, null, why)
    else t.match(found, problem, why)
  }
})

t.test('command lines', async (t) => {
  const cases: [string, string[] | null][] = [
    ['a b  c', ['a', 'b', 'c']], [`a 'b c' "d e"`, ['a', 'b c', 'd e']], ['a\\ b', ['a b']], [`''`, ['']], [`a"b"'c'`, ['abc']],
    ['"a\\"b"', ['a"b']], ['"a\\nb"', ['a\\nb']], [`'a\\'`, ['a\\']], ['', []], ['  ', []], ['"', null], [`'`, null], ['a\\', null],
  ]
  for (const [text, words] of cases) t.same(splitShell(text), words, JSON.stringify(text))
})
