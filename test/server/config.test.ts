import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { ConfigError } from '#policies/config.ts'
import { hostUpstreams } from '../../server/resolvers.ts'
import { gatewayToml, readToml } from './bench.ts'

function problemsOf(toml: string, env: Record<string, string> = {}): string[] {
  try {
    readToml(toml, env)
    return []
  } catch (error) {
    if (error instanceof ConfigError) return error.problems.map((problem) => `${problem.path}: ${problem.reason}`)
    throw error
  }
}

t.test('refused', async (t) => {
  const key = '[server]\napi_key = "k"\n'
  const cases: [why: string, toml: string, problems: (string | RegExp)[]][] = [
    ['no key', '', [/^server\.api_key: is required; set OPENSANDBOX_INSECURE_SERVER=YES/]],
    ['a blank key is none', '[server]\napi_key = "  "', [/^server\.api_key/]],
    ['everything at once', '[server]\napi_key = "k"\nport = 70000\nhost = ""\n[docker]\npids_limit = 0\n[egress]\nmode = "nft"', [/^server\.host/, /^server\.port/, /^docker\.pids_limit/, /^egress\.mode: must be one of "dns", "dns\+nft"/]],
    ['gateway mode without a gateway', `${key}[ingress]\nmode = "gateway"`, [/^ingress\.gateway: is required/]],
    ['a gateway in direct mode', `${key}[ingress.gateway]\naddress = "a.b"\nroute.mode = "header"`, [/^ingress\.gateway: only goes with/]],
    ['a gateway with a scheme', gatewayToml.replace('*.sandbox.localhost:28888', 'http://a.b'), [/^ingress\.gateway\.address: must not contain a scheme/]],
    ['an active key that is none', gatewayToml.replace('active_key = "a"', 'active_key = "b"'), [/^ingress\.secure_access\.active_key/]],
    ['a secret that is not base64', gatewayToml.replace('c2VjcmV0', '!!'), [/^ingress\.secure_access\.keys\[0\]: .*base64/]],
    ['host networking', `${key}[docker]\nnetwork_mode = "host"`, [/^docker\.network_mode: "host" gives a sandbox no network namespace/]],
    ['a resolver that is a name', `${key}[egress]\ndns_upstreams = ["dns.example", "127.0.0.53"]`, [/^egress\.dns_upstreams\[0\]/, /^egress\.dns_upstreams\[1\]: a loopback address/]],
    ['what is not built is not promised', `${key}[docker]\nadopt = true`, [/^docker\.adopt: .*not available/]],
    ['a floor that is no network', `${key}[docker]\nfloor = ["metadata"]`, [/^docker\.floor\[0\]/]],
    ['a key file that is missing', '[server]\napi_key_file = "/no/such/file"', [/^server\.api_key_file: cannot be read: ENOENT/, /^server\.api_key/]],
    ['no TOML', '[server', [/is not TOML: line/]],
    ['Kubernetes', `${key}[runtime]\ntype = "kubernetes"`, [/^runtime\.type: must be "docker"/]],
  ]
  for (const [why, toml, problems] of cases) t.match(problemsOf(toml), problems, why)
})

t.test('accepted', async (t) => {
  t.same(problemsOf('', { OPENSANDBOX_INSECURE_SERVER: 'YES' }), [], 'without a key when told so')
  t.match(problemsOf('', { OPENSANDBOX_INSECURE_SERVER: 'yes' }), [/api_key/], 'exactly YES')
  t.match(problemsOf('[server]\napi_key = "k"', { OPENSANDBOX_SERVER_API_KEY: '' }), [/api_key/], 'a variable that is set but empty counts')
  t.equal(readToml('[server]\napi_key = "k"', { OPENSANDBOX_SERVER_API_KEY: 'env' }).apiKey, 'env')
  t.same(problemsOf('[server]\napi_key = "k"\nunknown = 1\n[pause]\nx = 1\n[log]\nlevel = "debug"'), [], 'unknown tables and keys')
  const config = readToml('[server]\napi_key = "k"\n[egress]\ndns_upstreams = ["198.51.100.53", "198.51.100.54:5353", "2001:db8::53", "[2001:db8::54]:5353"]')
  t.same(config.upstreams, [{ address: '198.51.100.53', port: 53 }, { address: '198.51.100.54', port: 5353 }, { address: '2001:db8::53', port: 53 }, { address: '2001:db8::54', port: 5353 }])
  t.match(config, { egress: { mode: 'dns+nft', disable_ipv6: true }, docker: { host_guard: 'on', network_mode: 'bridge' }, server: { port: 8080, create_wait_seconds: 10 } }, 'safe defaults')
  t.ok(Object.isFrozen(config))
})

t.test("the host's resolvers", async (t) => {
  const files = (content: Record<string, string>) => (path: string) => {
    if (content[path] === undefined) throw new Error('ENOENT')
    return content[path]
  }
  const cases: [why: string, files: Record<string, string>, wanted: string[]][] = [
    ['as they stand', { '/etc/resolv.conf': '# x\nsearch a\nnameserver 198.51.100.53\nnameserver 2001:db8::53\n' }, ['198.51.100.53', '2001:db8::53']],
    ['a stub is replaced by what is behind it', { '/etc/resolv.conf': 'nameserver 127.0.0.53', '/run/systemd/resolve/resolv.conf': 'nameserver 198.51.100.53' }, ['198.51.100.53']],
    ['a stub nobody knows the back of', { '/etc/resolv.conf': 'nameserver 127.0.0.53\nnameserver ::1' }, []],
    ['a zone means nothing in a sandbox', { '/etc/resolv.conf': 'nameserver fe80::1%eth0\nnameserver 0.0.0.0' }, []],
    ['three at most, each once', { '/etc/resolv.conf': ['1', '1', '2', '3', '4'].map((n) => `nameserver 198.51.100.${n}`).join('\n') }, ['198.51.100.1', '198.51.100.2', '198.51.100.3']],
    ['none', {}, []],
  ]
  for (const [why, content, wanted] of cases) t.same(hostUpstreams(files(content)).map((upstream) => upstream.address), wanted, why)
})

t.test('the program exits 64 with every problem before it does anything', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-main-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const file = join(folder, 'c.toml')
  const run = (args: string[], env: Record<string, string> = {}) => spawnSync(process.execPath, [join(import.meta.dirname, '../../server/main.ts'), ...args], { env: { PATH: process.env.PATH, HOME: folder, ...env }, encoding: 'utf8', timeout: 20_000 })
  writeFileSync(file, `[server]\nport = 70000\n[store]\npath = "${join(folder, 'made.db')}"\n[docker]\npids_limit = 0`)
  const bad = run(['--config', file])
  t.match(bad, { status: 64, stderr: /2 problem\(s\)\n  server\.port: .*\n  docker\.pids_limit: / })
  t.match(run([], { SANDBOX_CONFIG_PATH: file }), { status: 64, stderr: /server\.port/ }, 'by environment')
  t.match(run([]), { status: 64, stderr: /\.sandbox\.toml: cannot be read: ENOENT/ })
  t.match(run(['--nope']), { status: 64, stderr: /--nope/ })
})
