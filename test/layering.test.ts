/**
 * Who may import whom. A new arrow or a new importer of a package is a decision: change these tables in a commit of its own that says why.
 */
import { readFileSync } from 'node:fs'
import path from 'node:path'
import t from 'tap'
import { importedNames, readImports, sourceFiles, type Import } from '#test/support/imports.ts'

const top = path.dirname(import.meta.dirname)

/** Folder to the folders it may import from, beside itself. Nothing imports test or bench. */
const arrows: Record<string, readonly string[]> = {
  policies: [],
  gateway: ['policies'],
  'egress-sidecar': ['policies'],
  server: ['policies'],
  deploy: ['policies'],
}

/** Package to the files (or folders, ending in /) that may import it. What is not here may not be imported at all. */
const importers: Record<string, readonly string[]> = {
  undici: ['gateway/upstream.ts', 'egress-sidecar/webhook.ts', 'server/sidecar-client.ts'],
  'http-proxy-3': ['gateway/relay-upgrade.ts'],
  ws: ['deploy/docker/sandbox/app.ts'],
  fastify: ['server/'],
  dns2: ['egress-sidecar/'],
  execa: ['egress-sidecar/nft.ts', 'server/host-guard.ts', 'deploy/'],
  'lru-cache': ['gateway/', 'egress-sidecar/', 'server/rate-limit.ts'],
  dockerode: ['server/docker.ts'],
  pino: ['gateway/main.ts', 'gateway/access-log.ts', 'gateway/workers.ts', 'egress-sidecar/log.ts', 'server/main.ts'],
  'prom-client': ['gateway/metrics.ts', 'egress-sidecar/metrics.ts', 'server/metrics.ts'],
  typebox: ['policies/', 'gateway/config.ts', 'egress-sidecar/config.ts', 'server/'],
  'smol-toml': ['gateway/config.ts', 'server/config.ts', 'deploy/start.ts'],
  'ipaddr.js': ['policies/address.ts', 'server/'],
  'tar-stream': ['deploy/'],
  esbuild: ['deploy/bundle.ts'],
}

/** Modules of Node that are as dangerous as a package. */
const nodeImporters: Record<string, readonly string[]> = {
  'node:child_process': ['deploy/setup.mjs', 'deploy/engine.mjs'],
  'node:sqlite': ['server/store.ts'],
  'node:cluster': ['gateway/workers.ts', 'gateway/fleet.ts', 'gateway/main.ts'],
}

/** Files behind a door: the engines, and whoever chooses them. */
const ownImporters: Readonly<Record<string, readonly string[]>> = {
  'gateway/relay-http.ts': ['gateway/gateway.ts'],
  'gateway/relay-upgrade.ts': ['gateway/gateway.ts'],
  'gateway/upstream.ts': ['gateway/relay-http.ts', 'gateway/relay-upgrade.ts'],
}

const files = sourceFiles(top, Object.keys(arrows))
const imports = files.flatMap((file) => readImports(top, file))
const folderOf = (file: string): string => file.split('/', 1)[0]!
const mayImport = (allowed: readonly string[], file: string): boolean => allowed.some((place) => (place.endsWith('/') ? file.startsWith(place) : place === file))
const say = ({ file, target }: Import): string => `${file} imports ${target}`

t.test('the reader sees every form of import, and nothing in comments', async (t) => {
  const source = "import a from 'a'\nimport type { B } from 'b'\nimport {\n  c,\n} from '#c/c.ts'\nexport { d } from './d.ts'\nimport 'e'\nconst f = await import('f')\n// import g from 'g'\n/* import h from 'h' */\nconst i = require('i')\n"
  t.strictSame(importedNames(source).sort(), ['#c/c.ts', './d.ts', 'a', 'b', 'e', 'f', 'i'])
})

t.test('every folder was seen', async (t) => {
  for (const folder of Object.keys(arrows)) t.ok(files.some((file) => folderOf(file) === folder), folder)
  t.ok(imports.length > files.length, `${imports.length} imports in ${files.length} files`)
})

t.test('folders import along the arrows only', async (t) => {
  const offences = imports.filter(({ file, target, own }) => own && folderOf(target) !== folderOf(file) && !arrows[folderOf(file)]!.includes(folderOf(target)))
  t.strictSame(offences.map(say), [])
})

t.test('a package is imported where its table says', async (t) => {
  const foreign = imports.filter(({ target, own }) => !own && !target.startsWith('node:'))
  t.strictSame(foreign.filter(({ file, target }) => !mayImport(importers[target] ?? [], file)).map(say), [])
  t.ok(foreign.some(({ target }) => target === 'dockerode'), 'and the table is not empty talk')
})

t.test('so is a file of ours behind a door', async (t) => {
  const guarded = imports.filter(({ target }) => target in ownImporters)
  t.strictSame(guarded.filter(({ file, target }) => !ownImporters[target]!.includes(file)).map(say), [])
  t.strictSame([...new Set(guarded.map(({ target }) => target))].sort(), Object.keys(ownImporters).sort(), 'and every door is used')
})

t.test('so are the modules of Node that start programs or keep data', async (t) => {
  t.strictSame(imports.filter(({ file, target }) => target in nodeImporters && !mayImport(nodeImporters[target]!, file)).map(say), [])
})

t.test('a connection is reset in one place, which knows when Node cannot', async (t) => {
  const resets = files.filter((file) => readFileSync(path.join(top, file), 'utf8').includes('resetAndDestroy('))
  t.strictSame(resets, ['gateway/break-off.ts'])
})

t.test('policies/ touches nothing outside: no Node module but node:crypto, in access files', async (t) => {
  const offences = imports.filter(({ file, target }) => folderOf(file) === 'policies' && target.startsWith('node:') && !(target === 'node:crypto' && path.basename(file).startsWith('access')))
  t.strictSame(offences.map(say), [])
})
