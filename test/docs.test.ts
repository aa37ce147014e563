/**
 * What the documents say is what the code does: each program's README has its five parts, its configuration table equals the schema, every
 * fault and metric is named. `UPDATE_DOCS=1 node test/docs.test.ts` rewrites the tables between their markers.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import t from 'tap'
import type { TSchema } from 'typebox'
import { GatewayConfigSchema } from '../gateway/config.ts'
import { ConfigSchema as ServerConfigSchema } from '../server/config.ts'
import { faults } from '#policies/fault.ts'
import { sourceFiles } from '#test/support/imports.ts'

const top = path.dirname(import.meta.dirname)
const programs = ['gateway', 'egress-sidecar', 'server'] as const
const parts = ['What', 'Run', 'Configure', 'Watch', 'Limits']
const begin = '<!-- configuration: written by UPDATE_DOCS=1 node test/docs.test.ts -->'
const end = '<!-- /configuration -->'

type Row = { name: string; fallback: string; description: string }

const readmeOf = (folder: string): string => path.join(top, folder, 'README.md')
const read = (file: string): string => (existsSync(file) ? readFileSync(file, 'utf8') : '')
const sourceOf = (folder: string): string => sourceFiles(top, [folder]).map((file) => read(path.join(top, file))).join('\n')
const kebab = (key: string): string => key.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)

/** One row per leaf of an object schema, named `a.b.c` below `prefix`. */
function rows(schema: TSchema, nameOf: (path: readonly string[]) => string, at: readonly string[] = []): Row[] {
  const { properties = {} } = schema as { properties?: Record<string, TSchema & { properties?: object; default?: unknown; description?: string; items?: TSchema }> }
  return Object.entries(properties).flatMap(([key, value]) => {
    const place = [...at, key]
    if (value.properties !== undefined) return rows(value, nameOf, place)
    return [{ name: nameOf(place), fallback: value.default === undefined || value.default === '' ? '' : JSON.stringify(value.default), description: value.description ?? '' }]
  })
}

function table(list: readonly Row[]): string {
  const line = ({ name, fallback, description }: Row): string => `| \`${name}\` | ${fallback === '' ? '' : `\`${fallback}\``} | ${description.replaceAll('|', '\\|')} |`
  return [begin, '| name | default | what |', '|---|---|---|', ...list.map(line), end].join('\n')
}

function written(readme: string): string | undefined {
  const [from, to] = [readme.indexOf(begin), readme.indexOf(end)]
  return from === -1 || to === -1 ? undefined : readme.slice(from, to + end.length)
}

for (const folder of [...programs, 'deploy'] as const) {
  t.test(`${folder}/README.md has its five parts in order`, async (t) => {
    const headings = [...read(readmeOf(folder)).matchAll(/^## (.+)$/gm)].map((match) => match[1]!)
    t.strictSame(headings.filter((heading) => parts.includes(heading)), parts)
  })
}

t.test('policies/README.md says what it is and how to run its tests', async (t) => {
  t.match(read(readmeOf('policies')), /^## What$[\s\S]*^## Run$/m)
})

for (const [folder, schema, nameOf] of [
  ['gateway', GatewayConfigSchema, (place: readonly string[]) => `--${kebab(place.join('-'))}`],
  ['server', ServerConfigSchema, (place: readonly string[]) => place.join('.')],
] as const) {
  t.test(`the configuration table of ${folder}/README.md equals its schema`, async (t) => {
    const wanted = table(rows(schema, nameOf))
    const readme = read(readmeOf(folder))
    const found = written(readme)
    if (process.env['UPDATE_DOCS'] === '1' && found !== undefined && found !== wanted) writeFileSync(readmeOf(folder), readme.replace(found, () => wanted))
    t.ok(rows(schema, nameOf).length > 10, 'the schema was read')
    t.equal(written(read(readmeOf(folder))), wanted, `put "${begin}" and "${end}" below Configure, then run with UPDATE_DOCS=1`)
  })
}

t.test('egress-sidecar/README.md names every environment variable the program reads, and no other', async (t) => {
  const config = read(path.join(top, 'egress-sidecar', 'config.ts'))
  const prefixed = [...config.matchAll(/\b(?:text|lenient|entries)\('([A-Z0-9_]+)'/g)].map((match) => `OPENSANDBOX_EGRESS_${match[1]}`)
  const whole = [...sourceOf('egress-sidecar').matchAll(/\benv(?:ironment)?\['(OPENSANDBOX_[A-Z0-9_]+)'\]|\benv\.(OPENSANDBOX_[A-Z0-9_]+)/g)].map((match) => match[1] ?? match[2]!)
  const wanted = [...new Set([...prefixed, ...whole])].sort()
  const configure = /^## Configure$([\s\S]*?)(?=^## |$(?![\s\S]))/m.exec(read(readmeOf('egress-sidecar')))?.[1] ?? ''
  const named = [...new Set([...configure.matchAll(/^\| `(OPENSANDBOX_[A-Z0-9_]+)`/gm)].map((match) => match[1]!))].sort()
  t.ok(wanted.length > 10, 'the source was read')
  t.strictSame(named, wanted)
})

t.test('gateway/README.md lists every fault code that the gateway answers', async (t) => {
  const source = sourceOf('gateway') + read(path.join(top, 'policies', 'fault.ts')).replace(/export const faults[\s\S]*?^\}/m, '')
  const used = Object.keys(faults).filter((code) => source.includes(`'${code}'`))
  t.ok(used.length > 5, 'the source was read')
  t.strictSame(used.filter((code) => !read(readmeOf('gateway')).includes(`\`${code}\``)), [])
})

for (const folder of programs) {
  t.test(`${folder}/README.md lists every metric`, async (t) => {
    const metrics = read(path.join(top, folder, 'metrics.ts'))
    const names = [...new Set([...metrics.matchAll(/'((?:sallyport|ingress|egress|opensandbox)_[a-z0-9_]+)'/g)].map((match) => match[1]!))]
    t.equal(metrics !== '', names.length > 0, 'a metrics file has metrics')
    t.strictSame(names.filter((name) => !read(readmeOf(folder)).includes(name)), [])
  })
}
