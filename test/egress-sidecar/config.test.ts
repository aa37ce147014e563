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
  for (const [text, want] of [['10', 10], ['0', 0], ['-1', 4096], ['many', 4096], ['1.5', 4096]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_MAX_RULES: text }).maxRules, want, text)
  for (const [text, want] of [['7', 7], ['0', 5], ['x', 5], ['999', 120]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_UPSTREAM_TIMEOUT: text }).upstreamTimeoutSeconds, want, text)
  for (const text of ['1', 'TRUE', ' yes ', 'y', 'on']) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_BLOCK_DOH_443: text }).blockDoh, true, text)
  for (const text of ['', '0', 'no', 'enabled']) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_BLOCK_DOH_443: text }).blockDoh, false, text)
  t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_NAMESERVER_EXEMPT: '198.51.100.1, 10.0.0.0/8, x, 198.51.100.1,2001:db8:0::1' }).openResolvers, ['198.51.100.1', '2001:db8::1'])
  t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_TOKEN: ' a b ' }).token, ' a b ', 'a token is used as it is')
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
  for (const [text, want] of [[':1', { host: '', port: 1 }], ['127.0.0.1:18080', { host: '127.0.0.1', port: 18080 }], ['[::1]:0', { host: '::1', port: 0 }]] as const) t.same(readConfig({ ...dns, OPENSANDBOX_EGRESS_HTTP_ADDR: text }).http, want, text)
})

t.test('webhook, probes, attributes', async (t) => {
  t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DENY_WEBHOOK: ' https://hook.example:8443/x ' }).denyWebhook?.href, 'https://hook.example:8443/x')
  t.equal(readConfig(dns).denyWebhook, null)
  for (const text of ['hook.example', 'ftp://hook.example', 'http://', 'unix:/x']) t.match(problemsOf({ OPENSANDBOX_EGRESS_DENY_WEBHOOK: text }), [/^OPENSANDBOX_EGRESS_DENY_WEBHOOK: is not an http/], text)
  for (const [text, want] of [['', ''], ['.', ''], [' Probe.Example. ', 'probe.example']] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE: text }).probeName, want, JSON.stringify(text))
  t.match(problemsOf({ OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE: 'a..b' }), [/PROBE: "a\.\.b" is not a name/])
  for (const [text, want] of [['7', 7], ['0', 30], ['x', 30], ['9999', 3600]] as const) t.equal(readConfig({ ...dns, OPENSANDBOX_EGRESS_DNS_UPSTREAM_PROBE_INTERVAL_SEC: text }).probeSeconds, want, text)
  t.same([...readConfig({ ...dns, OPENSANDBOX_EGRESS_METRICS_EXTRA_ATTRS: 'team=a, url=x=y ,empty=,=none,bare' }).attributes], [['team', 'a'], ['url', 'x=y']])
  t.match(problemsOf({ OPENSANDBOX_EGRESS_METRICS_EXTRA_ATTRS: 'level=1,le=2' }), [/"level" is the sidecar's own/, /"le" is/])
})

t.test('interception is refused, not ignored', async (t) => {
  for (const [name, text] of [['TRANSPARENT', 'true'], ['SSL_INSECURE', 'on'], ['SCRIPT', '/x.py']] as const) t.match(problemsOf({ [`OPENSANDBOX_EGRESS_MITMPROXY_${name}`]: text }), [/^OPENSANDBOX_EGRESS_MITMPROXY_\w+: is set, but TLS interception is not part/], name)
  t.same(problemsOf({ OPENSANDBOX_EGRESS_MITMPROXY_TRANSPARENT: 'false', OPENSANDBOX_EGRESS_MITMPROXY_SSL_INSECURE: '0', OPENSANDBOX_EGRESS_MITMPROXY_PORT: '18081' }), [], 'off is off')
})
