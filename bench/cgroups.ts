/**
 * Cgroups of the bench's own: some limit how much processor a process gets, by version 1 or 2 of the cpu controller, whichever the machine has;
 * others only tell its processes from those of others.
 */
import { existsSync } from 'node:fs'
import { mkdir, readFile, rmdir, writeFile } from 'node:fs/promises'
import path from 'node:path'
import type { Cleanups } from './program.ts'

const prefix = 'sp-bench-'
/** Microseconds. Shorter than usual, so that a round of a second does not begin or end with a noticeable part of a period. */
const period = 20_000

/** Where limits are written: a file per limit, or both numbers in one (cpu(4), cgroup-v2.rst). */
type Controller = { readonly folder: string; limit(cgroup: string, quota: number): Promise<void> }

/**
 * Makes one cgroup per name. Notes first how to remove them, so programs that are started later have ended by then; leftovers of a killed run go first.
 * @param share of one processor
 * @returns for each name, what puts a process and all its threads into it
 * @throws Error when there is no cpu controller to use
 */
export async function makeQuotas(names: readonly string[], share: number, cleanups: Cleanups): Promise<((pid: number) => Promise<void>)[]> {
  const { folder, limit } = await findController()
  const cgroups = names.map((name) => path.join(folder, prefix + name))
  for (const cgroup of cgroups) await remove(cgroup)
  for (const cgroup of cgroups) {
    cleanups.add(() => remove(cgroup))
    await mkdir(cgroup)
    await limit(cgroup, Math.round(share * period))
  }
  return cgroups.map((cgroup) => (pid) => writeFile(path.join(cgroup, 'cgroup.procs'), String(pid)))
}

/** The folder of a cgroup without limits, below the tree of version 2. @throws Error when none is mounted */
export async function makeGroup(name: string, cleanups: Cleanups): Promise<string> {
  const mounts = (await readFile('/proc/self/mounts', 'utf8')).split('\n').map((line) => line.split(' '))
  const tree = mounts.find(([, , type]) => type === 'cgroup2')?.[1]
  if (tree === undefined) throw new Error('no tree of cgroups of version 2 is mounted')
  const group = path.join(tree, prefix + name)
  await remove(group)
  cleanups.add(() => remove(group))
  await mkdir(group)
  return group
}

async function findController(): Promise<Controller> {
  const first = '/sys/fs/cgroup/cpu'
  if (existsSync(path.join(first, 'cpu.cfs_quota_us'))) {
    return {
      folder: first,
      async limit(cgroup, quota) {
        await writeFile(path.join(cgroup, 'cpu.cfs_period_us'), String(period))
        await writeFile(path.join(cgroup, 'cpu.cfs_quota_us'), String(quota))
      },
    }
  }
  const second = '/sys/fs/cgroup'
  try {
    await writeFile(path.join(second, 'cgroup.subtree_control'), '+cpu')
  } catch (error) {
    throw new Error('no cgroup cpu controller to limit processes with', { cause: error })
  }
  return { folder: second, limit: (cgroup, quota) => writeFile(path.join(cgroup, 'cpu.max'), `${quota} ${period}`) }
}

/** A process that has just ended keeps its cgroup busy for a moment; one that a killed run left is ended. */
async function remove(cgroup: string): Promise<void> {
  for (let attempt = 0; ; attempt++) {
    try {
      return await rmdir(cgroup)
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (code === 'ENOENT') return
      if (code !== 'EBUSY' || attempt === 100) throw error
    }
    const left = await readFile(path.join(cgroup, 'cgroup.procs'), 'utf8').catch(() => '')
    for (const pid of left.split('\n').filter((line) => line !== '')) endProcess(Number(pid))
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

function endProcess(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It was faster.
  }
}
