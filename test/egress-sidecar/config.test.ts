/** Environment variables to configuration: the original's names and leniency, our strictness where it protects. */
import t from 'tap'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { ConfigError } from '#policies/config.ts'
import { readConfig } from '../../egress-sidecar/config.ts'

const dns = { OPENSANDBOX_EGRESS_DNS_UPSTREAM: '198.51.100.53' }

function problemsOf(env: Record<string, string>): string[] {
  try {
    readConfig({ ...dns, ...env })
  } catch (error) {
    if (error instanceof ConfigError) return error.problems.map(({ path, reason }) => `${path}: ${reason}`)
    throw error
  }
  return []
}

t.test('nothing set: the strictest', async (t) => {
  const config = readConfig(dns)
  t.match(config, { mode: 'dns+nft', token: '', maxRules: 4096, logLevel: 'info', exemption: 'auto', blockDoh: false, upstreamTimeoutSeconds: 5, http: { host: '', port: 18080 } })
  t.same(config.rules, { defaultAction: 'deny', egress: [] })
})

t.test('mode', async (t) => {
  for (const [text, want] of [['dns', 'dns'], ['dns+nft', 'dns+nft'], [' NFT + dns ', 'dns+nft'], ['dns++nft', 'dns+nft'], ['', 'dns+nft'], ['  ', 'dns+nft']] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_MODE: text }).mode, want, JSON.stringify(text))
  for (const text of ['nft', 'dns+foo', 'dns,nft', 'off', '+']) t.match(problemsOf({ OPENSANDBOX_EGRESS_MODE: text })[0], /^OPENSANDBOX_EGRESS_MODE: must be one of/, `${text} is fatal, not weaker`)
})

t.test('numbers and switches are as lenient as the original', async (t) => {
  for (const [text, want] of [['10', 10], ['0', 0], [' +7 ', 7], ['1000000', 1_000_000], ['-1', 4096], ['', 4096], ['many', 4096], ['1.5', 4096], ['1e3', 4096], ['0x10', 4096]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_MAX_RULES: text }).maxRules, want, text)
  for (const [text, want] of [['7', 7], ['1', 1], ['0', 5], ['-3', 5], ['x', 5], ['120', 120], ['121', 120], ['999', 120]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_UPSTREAM_TIMEOUT: text }).upstreamTimeoutSeconds, want, text)
  for (const text of ['1', 'TRUE', ' yes ', 'y', 'on']) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_BLOCK_DOH_443: text }).blockDoh, true, text)
  for (const text of ['', '0', 'no', 'enabled']) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_BLOCK_DOH_443: text }).blockDoh, false, text)
  for (const [text, want] of [['', true], ['  ', true], ['on', true], ['off', false], [' No ', false], ['maybe', true]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_RANDOM_CASE: text }).randomCase, want, text)
  t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_NAMESERVER_EXEMPT: '198.51.100.1, 10.0.0.0/8, x, 198.51.100.1,2001:db8:0::1' }).openResolvers, ['198.51.100.1', '2001:db8::1'])
  t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_TOKEN: ' a b ' }).token, ' a b ', 'a token is used as it is')
})

t.test('what is passed over is told', async (t) => {
  const of = (env: Record<string, string>): string[] => readConfig({ ...dns, ...Object.fromEntries(Object.entries(env).map(([name, value]) => [`OPENSANDBOX_EGRESS_${name}`, value])) }).ignored.map(({ path, reason }) => `${path.replace('OPENSANDBOX_EGRESS_', '')}: ${reason}`)
  for (const [name, value] of [['MAX_RULES', 'many'], ['LOG_LEVEL', 'verbose'], ['DNS_UPSTREAM_TIMEOUT', '0'], ['DNS_UPSTREAM_PROBE_INTERVAL_SEC', '1.5'], ['BLOCK_DOH_443', 'enabled'], ['DNS_RANDOM_CASE', 'maybe']] as const) {
    t.same(of({ [name]: value }), [`${name}: "${value}" is not understood: the default holds`])
  }
  t.same(of({ DOH_BLOCKLIST: '8.8.8.8,1.1.1.300, dns.example', NAMESERVER_EXEMPT: '10.0.0.0/8, 198.51.100.1' }), ['NAMESERVER_EXEMPT: "10.0.0.0/8" is no address: left out', 'DOH_BLOCKLIST: "1.1.1.300" is no address: left out', 'DOH_BLOCKLIST: "dns.example" is no address: left out'])
  t.same(of({ MAX_RULES: ' +7 ', LOG_LEVEL: 'WARNING', BLOCK_DOH_443: 'Off', DNS_UPSTREAM_TIMEOUT: '999', DOH_BLOCKLIST: ' ,', NAMESERVER_EXEMPT: '' }), [], 'nothing to tell')
})

t.test('what is written to the log, and where to', async (t) => {
  for (const [text, want] of [
    ['debug', 'debug'], ['info', 'info'], ['warn', 'warn'], ['warning', 'warn'], ['error', 'error'], ['fatal', 'fatal'],
    [' WARNING ', 'warn'], ['Error', 'error'], ['', 'info'], ['  ', 'info'], ['trace', 'info'], ['silent', 'info'], ['loud', 'info'], ['2', 'info'], ['warn,error', 'info'], ['constructor', 'info'],
  ] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_LOG_LEVEL: text }).logLevel, want, JSON.stringify(text))
  for (const [text, want] of [['', 'stdout'], [' \t', 'stdout'], ['stderr', 'stderr'], [' stdout, /var/log/egress.log ', 'stdout,/var/log/egress.log']] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_LOG_OUTPUT: text }).logOutput, want, JSON.stringify(text))
  t.match(readConfig(dns), { logOutput: 'stdout', sandboxId: '' })
  t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_LOG_OUTPUT: 'stderr' }).logOutput, 'stdout', 'its name has no EGRESS in it')
  t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_SANDBOX_ID: 'box-1' }).sandboxId, 'box-1')
})

t.test('the policy and its file', async (t) => {
  t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_RULES: ' {"defaultAction":"ALLOW","egress":[{"action":"deny","target":" A.example "},{"target":"10.0.0.0/8"}]}\n' }).rules, { defaultAction: 'allow', egress: [{ action: 'deny', target: 'A.example' }, { action: 'deny', target: '10.0.0.0/8' }] })
  for (const text of ['', ' \n', 'null', '{}']) t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_RULES: text }).rules, { defaultAction: 'deny', egress: [] }, JSON.stringify(text))
  for (const text of ['[]', '"allow"', '7', '{"egress":{}}', '{"egress":[{"target":"http://x/"}]}', "{'egress':[]}"]) t.match(problemsOf({ OPENSANDBOX_EGRESS_RULES: text })[0], /^OPENSANDBOX_EGRESS_RULES/, `${text} is refused, not taken for nothing`)
  for (const [text, want] of [[' /var/egress/policy.json\n', '/var/egress/policy.json'], ['/a folder/policy.json', '/a folder/policy.json'], ['  ', ''], ['', '']] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_POLICY_FILE: text }).policyFile, want, JSON.stringify(text))
})

t.test('the DoH block list: what is no address is left out', async (t) => {
  const of = (text: string): unknown => readConfig({ ...dns, OPENSANDBOX_EGRESS_DOH_BLOCKLIST: text }).dohAddresses
  t.same(of('8.8.8.8, dns.example,9.9.9.0/24,, 2620:fe::fe ,10.0.0.0/33,2001:db8::/129,8.8.8.8:443,1.2.3,*,2606:4700:4700::/48,8.8.8.8'), ['8.8.8.8', '9.9.9.0/24', '2620:fe::fe', '2606:4700:4700::/48'])
  for (const text of ['', ' , ', 'dns.example']) t.same(of(text), [], JSON.stringify(text))
  t.match(readConfig({ ...dns, OPENSANDBOX_EGRESS_BLOCK_DOH_443: '1', OPENSANDBOX_EGRESS_DOH_BLOCKLIST: 'dns.example' }), { blockDoh: true, dohAddresses: [] }, 'nothing left: everywhere')
})

t.test('exemption', async (t) => {
  for (const [text, want] of [['', 'auto'], [' ', 'auto'], ['auto', 'auto'], [' CGroup ', 'cgroup'], ['PORTS', 'ports']] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_EXEMPTION: text }).exemption, want, JSON.stringify(text))
  for (const text of ['mark', 'cgroup,ports', 'none', '0']) t.match(problemsOf({ OPENSANDBOX_EGRESS_EXEMPTION: text }), [/^OPENSANDBOX_EGRESS_EXEMPTION: must be one of "auto", "cgroup", "ports"$/], text)
})

t.test('upstreams', async (t) => {
  const of = (text: string): unknown => readConfig({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: text }).upstreams
  t.same(of('198.51.100.53, 198.51.100.54:5353'), [{ address: '198.51.100.53', port: 53 }, { address: '198.51.100.54', port: 5353 }])
  t.same(of('2001:db8::1, [2001:db8::2]:853, [2001:db8::3]'), [{ address: '2001:db8::1', port: 53 }, { address: '2001:db8::2', port: 853 }, { address: '2001:db8::3', port: 53 }])
  for (const text of ['dns.example', '198.51.100.53:0', '198.51.100.53:99999', ',', '198.51.100.53:x', '127.0.0.11', '127.0.0.53', '127.0.0.1:5353', '::1', '[::1]:53', '0.0.0.0', '::', '198.51.100.53,127.0.0.1']) t.match(problemsOf({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: text })[0], /DNS_UPSTREAM/, text)
})

t.test('upstreams from resolv.conf', async (t) => {
  const path = join(t.testdir({}), 'resolv.conf')
  const of = (text: string): unknown => {
    writeFileSync(path, text)
    return readConfig({}, path).upstreams
  }
  t.same(of('# c\nnameserver 127.0.0.53\nnameserver 198.51.100.1\noptions x\n nameserver\t2001:db8::1\nnameserver 198.51.100.1\n'), [{ address: '198.51.100.1', port: 53 }, { address: '2001:db8::1', port: 53 }])
  t.same(of(''), [{ address: '8.8.8.8', port: 53 }], 'nothing at all: as the original')
  for (const text of ['', ' \t']) t.same(readConfig({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: text }, join(path, 'missing')).upstreams, [{ address: '8.8.8.8', port: 53 }], 'no file')
  t.same(of('nameserver dns.example\nnameserver 198.51.100.1:53\nnameserver\n;nameserver 198.51.100.2\nnameserver 198.51.100.3 # c\nmynameserver 198.51.100.4\n'), [{ address: '198.51.100.3', port: 53 }], 'what is no address is left out')
  const many = (count: number): string[] => Array.from({ length: count }, (_, i) => `198.51.100.${i + 1}`)
  const lines = (...addresses: string[]): string => addresses.map((address) => `nameserver ${address}\n`).join('')
  const ten = many(10).map((address) => ({ address, port: 53 }))
  t.same(of(lines(...many(10))), ten)
  t.same(of(lines(...many(12))), ten, 'the first ten of twelve')
  t.same(of(lines('127.0.0.53', '198.51.100.1', '::1', '0.0.0.0', ...many(12))), ten, 'those on the loopback, and those that come twice, do not count')
  t.equal(readConfig({ OPENSANDBOX_EGRESS_DNS_UPSTREAM: many(12).join(',') }, path).upstreams.length, 12, 'whoever is named by hand is used')
  t.throws(() => of('nameserver 127.0.0.11\n'), /only resolvers on the loopback \(127\.0\.0\.11\)/, 'Docker\'s resolver would send every question back')
})

t.test('every problem at once, with its path', async (t) => {
  const problems = problemsOf({ OPENSANDBOX_EGRESS_MODE: 'x', OPENSANDBOX_EGRESS_HTTP_ADDR: 'here', OPENSANDBOX_EGRESS_EXEMPTION: 'magic', OPENSANDBOX_EGRESS_RULES: '{"defaultAction":"block","egress":[{"target":""}]}' })
  for (const want of [/^OPENSANDBOX_EGRESS_MODE: /, /^OPENSANDBOX_EGRESS_EXEMPTION: /, /HTTP_ADDR: /, /RULES\.defaultAction: unsupported action "block"/, /RULES\.egress\[0\]\.target: egress target cannot be empty/]) t.ok(problems.some((problem) => want.test(problem)), String(want))
  t.match(problemsOf({ OPENSANDBOX_EGRESS_RULES: '{' })[0], /RULES: /)
})

t.test('the floor', async (t) => {
  t.same(readConfig(dns).floor, [])
  t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_FLOOR: '169.254.0.0/16, fd00:ec2::254,168.63.129.16 ' }).floor, ['169.254.0.0/16', 'fd00:ec2::254', '168.63.129.16'])
  t.match(problemsOf({ OPENSANDBOX_EGRESS_FLOOR: '168.63.129.16,metadata.example,10.0.0.0/40' }), [/^OPENSANDBOX_EGRESS_FLOOR: "metadata\.example" is neither/, /"10\.0\.0\.0\/40"/], 'one that cannot be read is refused, not left out')
})

t.test('listen address', async (t) => {
  t.same(['', '  '].map((text) => readConfig({ ...dns, OPENSANDBOX_EGRESS_HTTP_ADDR: text }).http), Array(2).fill({ host: '', port: 18080 }))
  for (const text of ['18080', 'localhost:18080', '127.0.0.1', ':65536', ':-1', ':', '::1:80', '[::1]', '[dns.example]:80', '10.0.0.0/8:80']) t.match(problemsOf({ OPENSANDBOX_EGRESS_HTTP_ADDR: text }), [/^OPENSANDBOX_EGRESS_HTTP_ADDR: ".*" is not \[address\]:port$/], text)
  for (const [text, want] of [[':1', { host: '', port: 1 }], [' 0.0.0.0:65535 ', { host: '0.0.0.0', port: 65535 }], ['127.0.0.1:18080', { host: '127.0.0.1', port: 18080 }], ['[::1]:0', { host: '::1', port: 0 }]] as const) t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_HTTP_ADDR: text }).http, want, text)
})

t.test('webhook, probes, attributes', async (t) => {
  t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DENY_WEBHOOK: ' https://hook.example:8443/x ' }).denyWebhook?.href, 'https://hook.example:8443/x')
  t.equal(readConfig(dns).denyWebhook, null)
  for (const text of ['hook.example', 'ftp://hook.example', 'http://', 'unix:/x']) t.match(problemsOf({ OPENSANDBOX_EGRESS_DENY_WEBHOOK: text }), [/^OPENSANDBOX_EGRESS_DENY_WEBHOOK: is not an http/], text)
  for (const [text, want] of [['', ''], ['.', ''], [' Probe.Example. ', 'probe.example']] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE: text }).probeName, want, JSON.stringify(text))
  t.match(problemsOf({ OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE: 'a..b' }), [/PROBE: "a\.\.b" is not a name/])
  for (const [text, want] of [['7', 7], ['1', 1], ['', 30], ['0', 30], ['x', 30], ['3600', 3600], ['3601', 3600], ['9999', 3600]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE_INTERVAL_SEC: text }).probeSeconds, want, text)
  t.same([...readConfig({ ...dns, OPENSANDBOX_EGRESS_METRICS_EXTRA_ATTRS: 'team=a, url=x=y ,empty=,=none,bare' }).attributes], [['team', 'a'], ['url', 'x=y']])
  t.match(problemsOf({ OPENSANDBOX_EGRESS_METRICS_EXTRA_ATTRS: 'level=1,le=2' }), [/"level" is the sidecar's own/, /"le" is/])
})

t.test('interception is refused, not ignored', async (t) => {
  for (const [name, text] of [['TRANSPARENT', 'true'], ['SSL_INSECURE', 'on'], ['SCRIPT', '/x.py']] as const) t.match(problemsOf({ [`OPENSANDBOX_EGRESS_MITMPROXY_${name}`]: text }), [/^OPENSANDBOX_EGRESS_MITMPROXY_\w+: is set, but TLS interception is not part/], name)
  t.same(problemsOf({ OPENSANDBOX_EGRESS_MITMPROXY_TRANSPARENT: 'false', OPENSANDBOX_EGRESS_MITMPROXY_SSL_INSECURE: '0', OPENSANDBOX_EGRESS_MITMPROXY_PORT: '18081' }), [], 'off is off')
})

t.test('lists that are written loosely', async (t) => {
  t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_DOH_BLOCKLIST: '::ffff:8.8.8.8,::ffff:9.9.9.0/120,9.9.9.9/24' }).dohAddresses, ['8.8.8.8', '9.9.9.0/24'])
  for (const blank of [',', ' , ', '']) t.equal(readConfig({ ...dns, OPENSANDBOX_LOG_OUTPUT: blank }).logOutput, 'stdout', `no output is none that was meant: ${JSON.stringify(blank)}`)
})
