/**
 * Builds the local images: `node deploy/images.ts [sandbox] [egress] [gateway] [server]`, by default the first two. No registry is asked, unless
 * SALLYPORT_BASE_IMAGE names a base. An image carries a hash of all that went into it, so a second run finds it and does nothing.
 */
import { createHash } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import path from 'node:path'
import { pack, type Pack } from 'tar-stream'
import { bundleProgram } from './bundle.ts'
import { callEngine, checkStream, findImage } from './engine-api.ts'
import { imageNames, recipes, type ImageName } from './recipes.ts'
import { rootfsTar } from './rootfs.ts'

const top = path.dirname(import.meta.dirname)
const hashLabel = 'sallyport.io/recipe'
const imageLabel = 'sallyport.io/image'

/** Where Node for the images comes from: the pinned package in node_modules, that is the version the tests ran on. */
const nodeBinary = path.join(top, 'node_modules', `node-linux-${process.arch}`, 'bin', 'node')

/** Makes `sallyport/<name>:local` be what the sources say. Returns whether anything had to be built. */
export async function ensureImage(name: ImageName): Promise<boolean> {
  const recipe = recipes[name]
  const dockerfile = readFileSync(path.join(import.meta.dirname, 'docker', name, 'Dockerfile'))
  const bundle = await bundleProgram(recipe.entry, top)
  const base = baseTag(name)
  const hash = digest(base, dockerfile, bundle)
  const tag = `sallyport/${name}:local`
  const current = await findImage(tag)
  if (current?.labels[hashLabel] === hash) return false

  const baseImage = await findImage(base)
  if (baseImage === undefined) await buildBase(name, base)
  const context = contextTar({ Dockerfile: dockerfile, [recipe.bundle]: bundle })
  await build(tag, context, { labels: { [hashLabel]: hash, [imageLabel]: name }, args: { BASE: base } })
  await removeOld(name, base)
  return true
}

/** Named by what went into it. Debian's updates arrive when the base is made anew: `docker rmi` it, or change the recipe. */
function baseTag(name: ImageName): string {
  const { packages, links } = recipes[name]
  const source = readFileSync(path.join(import.meta.dirname, 'rootfs.ts'))
  const pulled = process.env['SALLYPORT_BASE_IMAGE'] ?? ''
  return `sallyport/base-${name}:${digest(JSON.stringify([packages, links, process.version, process.arch, pulled]), source).slice(0, 16)}`
}

async function buildBase(name: ImageName, tag: string): Promise<void> {
  const pulled = process.env['SALLYPORT_BASE_IMAGE'] ?? ''
  if (!existsSync(nodeBinary)) throw new Error(`no Node for this machine at ${path.relative(top, nodeBinary)}: run npm ci`)
  if (pulled !== '') return buildOnPulled(pulled, name, tag)
  if (!existsSync('/usr/bin/apt-get')) throw new Error('the images are put together from Debian packages, and this machine has no apt: set SALLYPORT_BASE_IMAGE=debian:bookworm-slim')
  const tar = await rootfsTar(recipes[name], { nodeBinary, cache: path.join(top, '.cache') })
  const changes = [`ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`, `LABEL ${imageLabel}=base-${name}`]
  const query = new URLSearchParams({ fromSrc: '-', repo: tag.split(':')[0]!, tag: tag.split(':')[1]! })
  for (const change of changes) query.append('changes', change)
  checkStream(`import of ${tag}`, await callEngine({ method: 'POST', path: `/images/create?${query}`, body: tar, contentType: 'application/x-tar' }))
}

async function buildOnPulled(pulled: string, name: ImageName, tag: string): Promise<void> {
  if ((await findImage(pulled)) === undefined) checkStream(`pull of ${pulled}`, await callEngine({ method: 'POST', path: `/images/create?${new URLSearchParams({ fromImage: pulled })}` }))
  const { packages, links } = recipes[name]
  const linkCommands = Object.entries(links).map(([link, target]) => `[ -e /${link} ] || ln -s ${target} /${link}`)
  const context = contextTar({
    Dockerfile: readFileSync(path.join(import.meta.dirname, 'docker', 'base', 'Dockerfile')),
    'links.sh': Buffer.from(['set -eu', ...linkCommands, ''].join('\n')),
    node: readFileSync(nodeBinary),
  })
  await build(tag, context, { labels: { [imageLabel]: `base-${name}` }, args: { BASE: pulled, PACKAGES: packages.join(' ') } })
}

async function build(tag: string, context: Pack, { labels, args }: { labels: Record<string, string>; args: Record<string, string> }): Promise<void> {
  const query = new URLSearchParams({ t: tag, rm: 'true', forcerm: 'true', labels: JSON.stringify(labels), buildargs: JSON.stringify(args) })
  checkStream(`build of ${tag}`, await callEngine({ method: 'POST', path: `/build?${query}`, body: context, contentType: 'application/x-tar' }))
}

/** A build context: files with fixed times and modes, so that the engine's build cache sees the same bytes again. */
function contextTar(files: Record<string, Buffer>): Pack {
  const tar = pack()
  for (const [name, content] of Object.entries(files)) tar.entry({ name, mode: name === 'node' ? 0o755 : 0o644, mtime: new Date(0) }, content)
  tar.finalize()
  return tar
}

/**
 * Earlier versions of this image and of its base. One that is still used stays: the engine refuses, or does not answer as long as a
 * container of it is busy, and the next build tries again.
 */
async function removeOld(name: ImageName, base: string): Promise<void> {
  for (const [label, keep] of [[name, `sallyport/${name}:local`], [`base-${name}`, base]] as const) {
    const answer = await callEngine({ path: `/images/json?filters=${encodeURIComponent(JSON.stringify({ label: [`${imageLabel}=${label}`] }))}` })
    const images = JSON.parse(answer.text) as { Id: string; RepoTags: string[] | null }[]
    const old = images.filter((image) => !(image.RepoTags ?? []).includes(keep) && !(image.RepoTags ?? []).some((tag) => !tag.startsWith(`sallyport/${label}:`) && tag !== '<none>:<none>'))
    for (const image of old) await callEngine({ method: 'DELETE', path: `/images/${image.RepoTags?.find((tag) => tag !== '<none>:<none>') ?? image.Id}`, timeout: 5_000 }).catch(() => undefined)
  }
}

function digest(...parts: (string | Buffer)[]): string {
  const hash = createHash('sha256')
  for (const part of parts) hash.update(String(part.length)).update('\0').update(part)
  return hash.digest('hex')
}

function readNames(args: readonly string[]): ImageName[] {
  const unknown = args.filter((arg) => !(imageNames as readonly string[]).includes(arg))
  if (unknown.length > 0) throw new Error(`no such image: ${unknown.join(', ')} (there are ${imageNames.join(', ')})`)
  return args.length === 0 ? ['sandbox', 'egress'] : (args as ImageName[])
}

if (import.meta.main) {
  try {
    for (const name of readNames(process.argv.slice(2))) {
      const started = Date.now()
      const built = await ensureImage(name)
      console.log(built ? `image sallyport/${name}:local built in ${((Date.now() - started) / 1000).toFixed(1)} s` : `image sallyport/${name}:local ok, already there`)
    }
  } catch (error) {
    console.error(`images: ${(error as Error).message}`)
    process.exitCode = 1
  }
}
