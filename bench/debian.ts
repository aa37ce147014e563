/**
 * Peers and load generators out of Debian packages, unpacked into .cache/bench and never installed: no service starts, nothing of the machine
 * changes. Only packages that the machine does not have are unpacked, so that its own C library is used with them.
 */
import { execa } from 'execa'
import { existsSync } from 'node:fs'
import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import path from 'node:path'

/** Where everything is kept that the next run can use again. */
export const cache = path.join(import.meta.dirname, '..', '.cache', 'bench')
const timeout = 240_000

/** How to run a program: its path, and the environment that lets it find its libraries. */
export type Tool = { readonly file: string; readonly env: Readonly<Record<string, string>> }

/**
 * The machine's own program, or one unpacked from its Debian package.
 * @throws Error when neither is to be had
 */
export async function findTool(program: string, debianPackage: string): Promise<Tool> {
  const installed = (process.env.PATH ?? '').split(':').concat('/usr/sbin', '/sbin').map((folder) => path.join(folder, program)).find((file) => existsSync(file))
  if (installed !== undefined) return { file: installed, env: {} }
  const folder = path.join(cache, debianPackage)
  if (!existsSync(folder)) await unpack(debianPackage, folder)
  const file = ['usr/sbin', 'usr/bin', 'sbin', 'bin'].map((sub) => path.join(folder, sub, program)).find((candidate) => existsSync(candidate))
  if (file === undefined) throw new Error(`${debianPackage} holds no program ${program}`)
  const libraries = await libraryPath(folder)
  return { file, env: libraries === '' ? {} : { LD_LIBRARY_PATH: libraries } }
}

async function unpack(debianPackage: string, folder: string): Promise<void> {
  const work = `${folder}.new`
  await rm(work, { recursive: true, force: true })
  await mkdir(path.join(work, 'archives', 'partial'), { recursive: true })
  await download(debianPackage, path.join(work, 'archives'))
  const archives = (await readdir(path.join(work, 'archives'))).filter((name) => name.endsWith('.deb'))
  for (const archive of archives) await execa('dpkg-deb', ['-x', path.join(work, 'archives', archive), work], { timeout })
  await rm(path.join(work, 'archives'), { recursive: true })
  await rename(work, folder)
}

/** The package and those of its dependencies that are not installed, by apt and its signature checks; package lists of our own when the machine has none. */
async function download(debianPackage: string, archives: string): Promise<void> {
  const lists = path.join(cache, '..', 'apt', 'lists')
  const apt = (...args: string[]) => execa('apt-get', [`-oDir::Cache::archives=${archives}`, '-oDebug::NoLocking=1', '-oAPT::Sandbox::User=', '-qq', '-y', ...args], { timeout, env: { LC_ALL: 'C' } })
  const install = ['install', '--download-only', '--no-install-recommends', debianPackage]
  try {
    await apt(...install)
  } catch {
    await mkdir(path.join(lists, 'partial'), { recursive: true })
    await apt(`-oDir::State::Lists=${lists}`, 'update')
    await apt(`-oDir::State::Lists=${lists}`, ...install)
  }
}

async function libraryPath(folder: string): Promise<string> {
  const roots = ['usr/lib', 'lib'].map((sub) => path.join(folder, sub)).filter((root) => existsSync(root))
  const found = await Promise.all(roots.map(async (root) => (await readdir(root)).filter((name) => name.endsWith('-linux-gnu')).map((name) => path.join(root, name))))
  return found.flat().join(':')
}
