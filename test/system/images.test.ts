/** The images hold what their users rely on, and nothing an attacker would like to find in the sidecar. */
import { execa } from 'execa'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { docker } from '#test/support/containers.ts'
import { ownerLabel } from '#test/support/leftovers.ts'
import { root } from '#test/support/program.ts'
import { readToml } from '../server/bench.ts'

await needs('root', 'docker')
t.setTimeout(120_000)

/** Runs Node in an image with no network and the capabilities of a sidecar; what it prints is JSON. */
async function look(image: string, program: string): Promise<unknown> {
  const container = await docker.createContainer({
    Image: image,
    Entrypoint: ['/usr/bin/node', '-e', program],
    Labels: { [ownerLabel]: String(process.pid) },
    HostConfig: { NetworkMode: 'none', CapDrop: ['ALL'], CapAdd: ['NET_ADMIN'], ReadonlyRootfs: true, SecurityOpt: ['no-new-privileges'] },
  })
  try {
    await container.start()
    const { StatusCode } = (await container.wait()) as { StatusCode: number }
    // Docker puts 8 bytes before each piece of output.
    const output = (await container.logs({ stdout: true, stderr: true })).toString('utf8')
    if (StatusCode !== 0) throw new Error(output)
    return JSON.parse(output.slice(output.search(/[[{]/)))
  } finally {
    await container.remove({ force: true })
  }
}

t.test('a second build finds everything there', async (t) => {
  const build = () => execa(process.execPath, ['deploy/images.ts', 'sandbox', 'egress'], { cwd: root })
  await build()
  const { stdout } = await build()
  t.strictSame(stdout.split('\n'), ['sandbox', 'egress'].map((name) => `image sallyport/${name}:local ok, already there`))
})

t.test('sidecar: node is process 1, nft and iptables work with NET_ADMIN alone, no shell', async (t) => {
  const { Config } = await docker.getImage('sallyport/egress:local').inspect()
  t.match(Config.Entrypoint, ['/usr/bin/node', ...Array<RegExp>((Config.Entrypoint?.length ?? 0) - 2).fill(/^--/), '/opt/sallyport/egress.mjs'])
  t.notOk(Config.User, 'its user is root, which without capabilities owns its files and no more')
  const found = await look('sallyport/egress:local', `
    const { execFileSync } = require('node:child_process'), { existsSync } = require('node:fs')
    const run = (...args) => execFileSync(args[0], args.slice(1)).toString().trim()
    run('nft', 'add table inet trial')
    execFileSync('iptables-restore', ['--noflush'], { input: '*raw\\n-A OUTPUT -p udp --dport 53 -m cgroup --path / -j MARK --set-mark 1\\nCOMMIT\\n' })
    console.log(JSON.stringify({ node: process.version, tables: run('nft', 'list tables').split('\\n').sort(), shells: ['/bin/sh', '/bin/bash', '/usr/bin/busybox', '/usr/bin/perl', '/usr/bin/python3'].filter(existsSync) }))`)
  t.strictSame(found, { node: process.version, tables: ['table inet trial', 'table ip raw'], shells: [] })
})

t.test('sidecar: the compiled code of the image is the one that its own start takes', async (t) => {
  const { Config } = await docker.getImage('sallyport/egress:local').inspect()
  const said = await look('sallyport/egress:local', `
    const { spawnSync } = require('node:child_process'), [file, ...args] = ${JSON.stringify(Config.Entrypoint)}
    const { stderr } = spawnSync(file, args, { env: { ...process.env, NODE_DEBUG_NATIVE: 'COMPILE_CACHE', OPENSANDBOX_EGRESS_MODE: 'none' }, encoding: 'utf8' })
    console.log(JSON.stringify(stderr.split('\\n')))`)
  t.ok((said as string[]).some((line) => /V8 code cache for ESM file:\/\/\/opt\/sallyport\/egress\.mjs was accepted/.test(line)), 'accepted', { said })
})

t.test('sidecar: its heap ends well below the memory that the server gives it', async (t) => {
  const { Config } = await docker.getImage('sallyport/egress:local').inspect()
  const flags = (Config.Entrypoint as string[]).slice(1, -1)
  const [limit] = await look('sallyport/egress:local', `
    const { execFileSync } = require('node:child_process')
    process.stdout.write(execFileSync('/usr/bin/node', [...${JSON.stringify(flags)}, '-p', '[v8.getHeapStatistics().heap_size_limit]']).toString().trim())`) as [number]
  const given = readToml('[server]\napi_key = "k"').egress.memory_bytes
  t.ok(limit <= 0.6 * given, `${limit} of ${given} bytes: beside it there are buffers, Node itself and nft`)
})

t.test('sandbox: sh, python3, curl with certificates, node, the application', async (t) => {
  const found = await look('sallyport/sandbox:local', `
    const { execFileSync } = require('node:child_process'), { existsSync, readFileSync } = require('node:fs')
    const run = (...args) => execFileSync(args[0], args.slice(1)).toString().trim()
    console.log(JSON.stringify({ sh: run('sh', '-c', 'echo shell'), python: run('python3', '-c', 'import ssl, socket, http.server; print("python")'), curl: run('curl', '--version').slice(0, 4),
      certificates: readFileSync('/etc/ssl/certs/ca-certificates.crt', 'utf8').split('BEGIN CERTIFICATE').length > 100, application: existsSync('/opt/sallyport/app.mjs'), root: run('id', '-un') }))`)
  t.strictSame(found, { sh: 'shell', python: 'python', curl: 'curl', certificates: true, application: true, root: 'root' })
})
