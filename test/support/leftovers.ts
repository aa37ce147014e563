/**
 * What a killed test run leaves on the machine, and its removal. Everything the tests make carries the id of the process that
 * made it: containers and networks in a name or label, programs in a file of the stack's folder.
 */
import Docker from 'dockerode'
import { existsSync } from 'node:fs'
import { readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import { labels } from '#policies/wire.ts'

/** On the containers and networks the tests make themselves: the process id of their test. */
export const ownerLabel = 'sallyport.test/owner'
/** Starts the names of instances, networks and folders: `sp-test-<process id>-…`. */
export const namePrefix = 'sp-test-'
/** In a stack's folder: process ids of its programs, one a line. */
export const programsFile = 'programs'

/** Ends and removes what runs that are over left behind. Runs that go on are not touched. */
export async function sweepLeftovers(docker: Docker): Promise<void> {
  for (const folder of await readdir(tmpdir())) if (isOver(ownerOf(folder))) await sweepFolder(join(tmpdir(), folder))
  const containers = await docker.listContainers({ all: true })
  const dead = containers.filter(({ Labels }) => isOver(Labels[ownerLabel] ?? ownerOf(Labels[labels.instance] ?? '')))
  await Promise.all(dead.map(({ Id }) => docker.getContainer(Id).remove({ force: true, v: true }).catch(ignoreGone)))
  for (const network of await docker.listNetworks()) {
    if (isOver(network.Labels?.[ownerLabel] ?? ownerOf(network.Name))) await docker.getNetwork(network.Id).remove().catch(ignoreGone)
  }
  for (const netns of (await execa`ip netns list`).stdout.split('\n')) {
    const name = netns.split(' ')[0] ?? ''
    if (isOver(ownerOf(name))) await execa({ reject: false })`ip netns delete ${name}`
  }
}

/** Programs of a killed test go on without it; they are ended only when they are still ours. */
async function sweepFolder(folder: string): Promise<void> {
  const pids = await readFile(join(folder, programsFile), 'utf8').catch(() => '')
  for (const pid of pids.split('\n').filter(Boolean)) {
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
    if (/\0(server|gateway)\/main\.ts\0/.test(command)) process.kill(Number(pid), 'SIGKILL')
  }
  await rm(folder, { recursive: true, force: true })
}

/** The process id in a name of ours. */
export function ownerOf(name: string): string | undefined {
  return new RegExp(`^${namePrefix}(\\d+)-`).exec(name)?.[1]
}

/** Whether that process has ended. */
export function isOver(owner: string | undefined): boolean {
  return owner !== undefined && !existsSync(`/proc/${owner}`)
}

/** Somebody else removed it, or is doing so. */
export function ignoreGone(error: { statusCode?: number }): void {
  if (error.statusCode !== 404 && error.statusCode !== 409) throw error
}
