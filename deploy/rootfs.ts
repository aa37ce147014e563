/**
 * A root file system out of Debian packages, without a registry, without root and without running anything of the packages: apt resolves and
 * downloads (from the machine's own sources, signatures checked), dpkg-deb unpacks, and one sorted tar with every time at 0 comes out.
 */
import { execa } from 'execa'
import { createReadStream } from 'node:fs'
import { mkdir, readdir, rm, stat, writeFile } from 'node:fs/promises'
import path from 'node:path'
import { extract, pack, type Header, type Pack } from 'tar-stream'
import { omittedPackages, type Recipe } from './recipes.ts'

type Entry = { header: Partial<Header> & { name: string }; content: Buffer }

const downloadTimeout = 240_000
/** Debian's merged /usr: packages still name these directories at the top. */
const mergedDirectories = ['bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32']
/** Documentation that nobody reads inside an image; copyright files stay. */
const unwanted = /^usr\/share\/(?:man|locale|info|lintian|bash-completion|zsh|bug|menu|doc-base|doc\/(?!.*copyright$))/

/** The base of one image as a tar stream: the packages' files, the recipe's links, and Node at /usr/bin/node. */
export async function rootfsTar(recipe: Recipe, { nodeBinary, cache }: { nodeBinary: string; cache: string }): Promise<Pack> {
  const archives = await downloadPackages(recipe.packages, cache)
  const entries = new Map<string, Entry>()
  for (const name of mergedDirectories.filter((name) => !name.endsWith('32'))) addLink(entries, name, `usr/${name}`)
  for (const archive of archives) await readPackage(archive, entries)
  finishBase(entries)
  for (const [name, target] of Object.entries(recipe.links)) if (!entries.has(name)) addLink(entries, name, target)
  return writeTar(entries, nodeBinary)
}

/**
 * Debian archives of the packages and all their dependencies. apt is told that nothing is installed, so the closure is whole.
 * With stale or missing package lists a private copy of them is fetched; the machine's own state is never changed.
 */
export async function downloadPackages(packages: readonly string[], cache: string): Promise<string[]> {
  const folder = path.join(cache, 'apt', packages.length === 1 ? packages[0]! : `set-${packages.length}-${packages.at(-1)}`)
  const lists = path.join(cache, 'apt', 'lists')
  await rm(folder, { recursive: true, force: true })
  await mkdir(path.join(folder, 'archives', 'partial'), { recursive: true })
  await mkdir(path.join(lists, 'partial'), { recursive: true })
  await writeFile(path.join(folder, 'status'), '')
  const options = {
    'Dir::State::status': path.join(folder, 'status'),
    'Dir::Cache': folder,
    'Dir::Cache::archives': path.join(folder, 'archives'),
    'APT::Sandbox::User': '',
    'APT::Install-Recommends': '0',
    'Acquire::Retries': '2',
    'Acquire::http::Timeout': '20',
  }
  const apt = (...args: string[]) => execa('apt-get', [...Object.entries(options).map(([key, value]) => `-o${key}=${value}`), '-qq', '-y', ...args], { timeout: downloadTimeout, env: { LC_ALL: 'C' } })
  const install = ['install', '--download-only', '--no-install-recommends', ...packages]
  try {
    await apt(...install)
  } catch {
    await apt(`-oDir::State::Lists=${lists}`, 'update').catch(() => undefined)
    await apt(`-oDir::State::Lists=${lists}`, ...install)
  }
  const files = (await readdir(path.join(folder, 'archives'))).filter((name) => name.endsWith('.deb') && !omittedPackages.has(name.slice(0, name.indexOf('_'))))
  return files.sort().map((name) => path.join(folder, 'archives', name))
}

async function readPackage(archive: string, entries: Map<string, Entry>): Promise<void> {
  const unpack = execa('dpkg-deb', ['--fsys-tarfile', archive], { buffer: false, timeout: downloadTimeout })
  for await (const file of unpack.stdout.pipe(extract())) {
    const chunks: Buffer[] = []
    for await (const chunk of file) chunks.push(chunk as Buffer)
    addFile(entries, file.header, Buffer.concat(chunks))
  }
  await unpack
}

function addFile(entries: Map<string, Entry>, { name: rawName, type, mode, linkname, uid, gid }: Entry['header'], content: Buffer): void {
  const name = mergedName(rawName)
  if (name === '' || unwanted.test(name) || (type === 'directory' && entries.has(name))) return
  // A hard link names another member of the archive, so it moves with it; a symbolic link is text that stays.
  const target = type === 'link' ? { linkname: mergedName(linkname ?? '') } : type === 'symlink' ? { linkname: linkname ?? '' } : {}
  entries.set(name, { header: { name, type: type ?? 'file', mode: mode ?? 0o644, uid: uid ?? 0, gid: gid ?? 0, mtime: new Date(0), ...target }, content })
}

function mergedName(rawName: string): string {
  const name = rawName.replace(/^\.?\/+/, '').replace(/\/+$/, '')
  const top = name.split('/', 1)[0]!
  return mergedDirectories.includes(top) ? `usr/${name}` : name
}

function addLink(entries: Map<string, Entry>, name: string, target: string): void {
  entries.set(name, { header: { name, type: 'symlink', linkname: target, mode: 0o777, uid: 0, gid: 0, mtime: new Date(0) }, content: Buffer.alloc(0) })
}

/** What the maintainer scripts of base-files, base-passwd and ca-certificates would have done. */
function finishBase(entries: Map<string, Entry>): void {
  for (const [name, mode] of [['tmp', 0o1777], ['var/tmp', 0o1777], ['root', 0o700], ['proc', 0o755], ['sys', 0o755], ['dev', 0o755], ['run', 0o755], ['etc', 0o755], ['opt', 0o755]] as const)
    addFile(entries, { name, type: 'directory', mode }, Buffer.alloc(0))
  for (const [name, master] of [['etc/passwd', 'passwd.master'], ['etc/group', 'group.master']] as const) {
    const found = entries.get(`usr/share/base-passwd/${master}`)
    if (found !== undefined) addFile(entries, { name, mode: 0o644 }, found.content)
  }
  const certificates = [...entries].filter(([name]) => /^usr\/share\/ca-certificates\/.*\.crt$/.test(name)).sort(([a], [b]) => (a < b ? -1 : 1))
  addFile(entries, { name: 'etc/ssl/certs/ca-certificates.crt', mode: 0o644 }, Buffer.concat(certificates.map(([, entry]) => entry.content)))
}

function writeTar(entries: Map<string, Entry>, nodeBinary: string): Pack {
  const tar = pack()
  const write = async (): Promise<void> => {
    // Hard links come after everything else: their target must exist when they are made.
    const rank = ({ header }: Entry): number => (header.type === 'link' ? 1 : 0)
    const sorted = [...entries.values()].sort((a, b) => rank(a) - rank(b) || (a.header.name < b.header.name ? -1 : 1))
    for (const { header, content } of sorted) {
      await new Promise<void>((resolve, reject) => tar.entry({ ...header, size: content.length }, content, (error) => (error ? reject(error) : resolve())))
    }
    const { size } = await stat(nodeBinary)
    await new Promise<void>((resolve, reject) => {
      const file = tar.entry({ name: 'usr/bin/node', mode: 0o755, size, mtime: new Date(0) }, (error) => (error ? reject(error) : resolve()))
      createReadStream(nodeBinary).on('error', reject).pipe(file)
    })
    tar.finalize()
  }
  write().catch((error: unknown) => tar.destroy(error as Error))
  return tar
}
