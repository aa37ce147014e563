import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
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
    ['more processors than there are', `${key}[egress]\ncpus = 100000`, [/^egress\.cpus: is more than the \d+ processors/]],
    ['a resolver that is a name', `${key}[egress]\ndns_upstreams = ["dns.example", "127.0.0.53"]`, [/^egress\.dns_upstreams\[0\]/, /^egress\.dns_upstreams\[1\]: a loopback address/]],
    ['a floor that is no network', `${key}[docker]\nfloor = ["metadata"]`, [/^docker\.floor\[0\]/]],
    ['a floor in forms that some read as an address, each in its own way', `${key}[docker]\nfloor = ["10.1", "0x7f.1", "010.0.0.1", "10", "10.1/8", "10.0.0.0/33", "10.0.0.0/08", "fd00::%eth0"]`, Array.from({ length: 8 }, (_, n) => new RegExp(`^docker\\.floor\\[${n}\\]: must be an IP address or a CIDR network`))],
    ['resolvers in such forms', `${key}[egress]\ndns_upstreams = ["10.1", "0x7f.1:53", "010.0.0.1", "[10.0.0.1]:0", "[::]", "0.0.0.0", "::ffff:127.0.0.1"]`, Array.from({ length: 7 }, (_, n) => new RegExp(`^egress\\.dns_upstreams\\[${n}\\]`))],
    ['a runtime without its type', `${key}[secure_runtime]\ndocker_runtime = "runsc"`, [/^secure_runtime\.docker_runtime: only goes with/]],
    ['a runtime that Docker cannot use', `${key}[secure_runtime]\ntype = "firecracker"`, [/^secure_runtime\.type: must be one of/]],
    ['a runtime that is a path', `${key}[secure_runtime]\ntype = "kata"\ndocker_runtime = "../runc"`, [/^secure_runtime\.docker_runtime/]],
    ['a runtime whose sandboxes nobody proved to be held', `${key}[egress]\nimage = "egress:1"\nprobe = "off"\n[secure_runtime]\ntype = "kata"`, [/^egress\.probe: must be "on" with secure_runtime\.type/]],
    ['a key file that is missing', '[server]\napi_key_file = "/no/such/file"', [/^server\.api_key_file: cannot be read: ENOENT/, /^server\.api_key/]],
    ['no TOML', '[server', [/is not TOML: line/]],
    ['a level nobody knows', `${key}[log]\nlevel = "LOUD"`, [/^log\.level: must be one of DEBUG, INFO/]],
    ['a sidecar image that is none', `${key}[egress]\nimage = "bad image ref !!"`, [/^egress\.image: is not an image reference/]],
    ['an execd image in upper case', `${key}[runtime]\nexecd_image = "Foo/execd:1"`, [/^runtime\.execd_image: .*must be lower case/]],
    ['a profile with an option behind it', `${key}[docker]\napparmor_profile = "a b"`, [/^docker\.apparmor_profile: must be the name/]],
    ['a capability there is not', `${key}[docker]\ndrop_capabilities = ["CHOWN", "NOT_A_CAP", "cap_kill", ""]`, [/^docker\.drop_capabilities\[1\]: is not/, /^docker\.drop_capabilities\[3\]: is not/]],
    ['an eip that is no host', `${key}eip = "not a host!!"`, [/^server\.eip: must be an IP address or a host name/]],
    ['an eip with a port', `${key}eip = "203.0.113.1:80"`, [/^server\.eip/]],
    ['no address', `${key}host = "999.1.1.1"`, [/^server\.host: must be an IP address/]],
    ['a short form of an address', `${key}host = "127.1"`, [/^server\.host: must be an IP address/]],
    ['a name to publish ports on', `${key}host = "localhost"`, [/^server\.host: must be an IP address: in direct mode/]],
    ['no name', gatewayToml.replace('host = "127.0.0.1"', 'host = "a b"'), [/^server\.host: must be an IP address or a host name/]],
    ['schema and all the rest at once', '[server]\nport = 70000\n[docker]\nnetwork_mode = "host"\nfloor = ["x"]\npids_limit = 0\n[egress]\ndns_upstreams = ["dns.example"]\n[log]\nlevel = "LOUD"\n[ingress]\nmode = "gateway"',
      [/^server\.port/, /^docker\.pids_limit/, /^egress\.dns_upstreams\[0\]/, /^ingress\.gateway: is required/, /^docker\.network_mode/, /^docker\.floor\[0\]/, /^log\.level/, /^server\.api_key/]],
    ['what is wrong already is not called missing as well', `${key}[ingress]\nmode = "gateway"\n[ingress.gateway]\naddress = "a.b"`, [/^ingress\.gateway\.route: is required/]],
    ['nor its opposite said of it', `${key}[ingress]\nmode = "both"\n[ingress.gateway]\naddress = "a.b"\nroute.mode = "header"`, [/^ingress\.mode: must be one of/]],
    ['a table that is none', 'server = 5', [/^server: /]],
    ['Kubernetes', `${key}[runtime]\ntype = "kubernetes"`, [/^runtime\.type: must be "docker"/]],
  ]
  for (const [why, toml, problems] of cases) {
    const found = problemsOf(toml)
    t.match(found, problems, why)
    t.equal(found.length, problems.length, `${why}: nothing else than ${found.join('; ')}`)
  }
})

t.test('how long a failure stays visible', async (t) => {
  const cases: [given: string | undefined, seconds: number | null][] = [
    [undefined, 3600], ['', 3600], ['60', 60], [' 60 ', 60], ['0', null], ['-1', null], ['1h', null], ['1.5', null], ['soon', null], ['999999999', null],
  ]
  for (const [given, seconds] of cases) {
    const env = given === undefined ? {} : { PENDING_FAILURE_TTL: given }
    if (seconds === null) t.match(problemsOf('[server]\napi_key = "k"', env), [/^PENDING_FAILURE_TTL: must be a number of seconds/], String(given))
    else t.equal(readToml('[server]\napi_key = "k"', env).failureTtlSeconds, seconds, String(given))
  }
})

t.test('accepted', async (t) => {
  t.same(problemsOf('', { OPENSANDBOX_INSECURE_SERVER: 'YES' }), [], 'without a key when told so')
  t.match(problemsOf('', { OPENSANDBOX_INSECURE_SERVER: 'yes' }), [/api_key/], 'exactly YES')
  t.match(problemsOf('[server]\napi_key = "k"', { OPENSANDBOX_SERVER_API_KEY: '' }), [/api_key/], 'a variable that is set but empty counts')
  t.equal(readToml('[server]\napi_key = "k"', { OPENSANDBOX_SERVER_API_KEY: 'env' }).apiKey, 'env')
  t.same(problemsOf('[server]\napi_key = "k"\nunknown = 1\n[pause]\nx = 1\n[log]\nlevel = "debug"'), [], 'unknown tables and keys')
  const values: [why: string, toml: string][] = [
    ['levels in any case', '[log]\nlevel = "Warning"'],
    ['images with a registry, a tag, a digest', `[egress]\nimage = "Registry.Example:5000/a/b_c:v1.0@sha256:${'a'.repeat(64)}"`],
    ['no AppArmor profile', '[docker]\napparmor_profile = ""'],
    ['no proof, under a runtime where no policy is taken', '[egress]\nprobe = "off"\n[secure_runtime]\ntype = "kata"'],
    ['no proof, under the runtime the engine chooses', '[egress]\nimage = "egress:1"\nprobe = "off"'],
    ['capabilities with their prefix', '[docker]\ndrop_capabilities = ["CAP_SYS_ADMIN", "all"]'],
  ]
  for (const [why, toml] of values) t.same(problemsOf(`[server]\napi_key = "k"\n${toml}`), [], why)
  for (const eip of ['203.0.113.7', 'box.example', '2001:db8::1', '[2001:db8::1]']) t.same(problemsOf(`[server]\napi_key = "k"\neip = "${eip}"`), [], eip)
  t.same(problemsOf(gatewayToml.replace('host = "127.0.0.1"', 'host = "localhost"')), [], 'a name to listen on, where nothing is published')
  const config = readToml('[server]\napi_key = "k"\n[egress]\ndns_upstreams = ["198.51.100.53", "198.51.100.54:5353", "2001:db8::53", "[2001:db8::54]:5353"]')
  t.same(config.upstreams, [{ address: '198.51.100.53', port: 53 }, { address: '198.51.100.54', port: 5353 }, { address: '2001:db8::53', port: 53 }, { address: '2001:db8::54', port: 5353 }])
  t.match(config, { egress: { mode: 'dns+nft', disable_ipv6: true }, docker: { host_guard: 'on', network_mode: 'bridge' }, server: { port: 8080, create_wait_seconds: 10 } }, 'safe defaults')
  t.same(readToml('[server]\napi_key = "k"\n[docker]\nfloor = ["10.1.2.3/8", "::ffff:169.254.0.0/112", "FD00:EC2::254"]').docker.floor, ['10.0.0.0/8', '169.254.0.0/16', 'fd00:ec2::254'], 'the floor as the kernel is told it')
  const runtimes: [toml: string, wanted: string | null][] = [
    ['', null], ['type = ""', null], ['type = "gvisor"', 'runsc'], ['type = "kata"', 'kata-runtime'], ['type = "gvisor"\ndocker_runtime = "runsc-kvm"', 'runsc-kvm'], ['type = "kata"\nk8s_runtime_class = "kata"', 'kata-runtime'],
  ]
  for (const [toml, wanted] of runtimes) t.equal(readToml(`[server]\napi_key = "k"\n[secure_runtime]\n${toml}`).secureRuntime, wanted, toml)
  t.ok(Object.isFrozen(config))
})

t.test('keys that nobody reads are named, except those of the original', async (t) => {
  const cases: [why: string, toml: string, keys: string[]][] = [
    ['none', '[egress]\nimage = "a:1"', []],
    ['a misspelt key', '[egress]\ndns_upstream = ["198.51.100.53"]', ['egress.dns_upstream']],
    ['a misspelt table', '[egres]\nmode = "dns+nft"', ['egres']],
    ['deeper, and several', '[docker]\nhost_gaurd = "on"\n[ingress]\nmode = "gateway"\n[ingress.gateway]\naddress = "a.b"\nroute.mode = "header"\nroute.mod = "x"', ['docker.host_gaurd', 'ingress.gateway.route.mod']],
    ['a name that every object has', '[egress]\ntoString = 1', ['egress.toString']],
    ["the original's", 'renew_intent.redis.enabled = false\n[docker]\nhost_ip = "198.51.100.1"\n[log]\nfile_enabled = true\n[pause]\nx = 1\n[storage]\nallowed_host_paths = []\n[secure_runtime]\nk8s_runtime_class = "kata"', []],
  ]
  for (const [why, toml, keys] of cases) t.same(readToml(`${toml}\n[server]\napi_key = "k"`).ignoredKeys, keys, why)
  t.same(readToml('[server]\napi_key = "k"\nthread_pool_size = 9\nloop = "auto"').ignoredKeys, [])
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
  t.match(bad, { status: 64, stderr: /3 problem\(s\)\n  server\.port: .*\n  docker\.pids_limit: .*\n  server\.api_key: / })
  t.match(run([], { SANDBOX_CONFIG_PATH: file }), { status: 64, stderr: /server\.port/ }, 'by environment')
  t.match(run([]), { status: 64, stderr: /\.sandbox\.toml: cannot be read: ENOENT/ })
  t.match(run(['--nope']), { status: 64, stderr: /--nope/ })
  t.match(run(['--config', file], { PENDING_FAILURE_TTL: 'soon' }), { status: 64, stderr: /PENDING_FAILURE_TTL: / }, 'the environment is read with it')
  writeFileSync(file, `[server]\napi_key = "k"\n[store]\npath = "${join(folder, 'made.db')}"\n[docker]\ndrop_capabilities = ["NOT_A_CAP"]`)
  t.match(run(['--config', file]), { status: 64, stderr: /1 problem\(s\)\n  docker\.drop_capabilities\[0\]: / }, 'what no schema can say, too')
  t.notOk(existsSync(join(folder, 'made.db')), 'no store was made')
})
