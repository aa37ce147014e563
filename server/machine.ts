/** What the machine behind the engine has, and what it can never give: refused before anything is written or made. Pure. */
import type { Problem } from '#policies/problem.ts'
import type { Platform } from './group.ts'
import type { Limits } from './resources.ts'

/** `arch` as image indexes write it (amd64, arm64). */
export type Machine = {
  readonly os: string
  readonly arch: string
  readonly cpus: number
  /** OCI runtimes the engine knows. */
  readonly runtimes: readonly string[]
  /** What decides how the engine runs a container that asks for nothing special. */
  readonly engine: { readonly version: string; readonly runtime: string; readonly cgroups: string }
}

export function machineProblems(wanted: { readonly platform: Platform | null; readonly limits: Limits }, machine: Machine): Problem[] {
  const problems: Problem[] = []
  const { platform, limits } = wanted
  if (platform !== null && platform.os !== machine.os) problems.push({ path: 'platform.os', reason: `this machine runs ${machine.os} only` })
  if (platform !== null && platform.arch !== machine.arch) problems.push({ path: 'platform.arch', reason: `this machine runs ${machine.arch} only` })
  if (limits.nanoCpus > machine.cpus * 1e9) problems.push({ path: 'resourceLimits.cpu', reason: `is more than the ${machine.cpus} CPUs of this machine` })
  return problems
}

/** The engine says it in the kernel's words. */
export function archOf(kernel: string): string {
  if (kernel === 'x86_64') return 'amd64'
  return kernel === 'aarch64' ? 'arm64' : kernel
}
