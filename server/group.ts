/**
 * A sandbox is a group: one network namespace and the containers in it. The first member owns the namespace, the
 * others join it. With a network policy the first member is the egress sidecar, a *gate*: nothing else may run
 * before it has confirmed that the rules are in the kernel, and the group ends when it does.
 * Here are the shapes; `plan.ts` decides what to do, `carry-out.ts` does it.
 */
import type { NetworkPolicy } from '#policies/document.ts'
import { labels } from '#policies/wire.ts'

/** What a group is made of, in the order in which it is made. Names are unique within the group. */
export type Member = { readonly name: string; readonly gate: boolean }

/** What Docker says about one container of ours. */
export type ContainerState = 'created' | 'running' | 'paused' | 'restarting' | 'exited' | 'dead' | 'removing'
export type Fact = {
  readonly containerId: string
  readonly member: string
  readonly state: ContainerState
  /** null while it runs, or while Docker has not told. */
  readonly exitCode: number | null
  /** IPv4 address on its network; empty when it joined another's namespace or is not running. */
  readonly address: string
  /** ms since 1970; null while nobody has looked: Docker's list does not tell. */
  readonly startedAt: number | null
}

/** How far the making of a group has come. Written before the first Docker object exists. */
export type Phase = 'creating' | 'ready' | 'failed'

export type Platform = { readonly os: string; readonly arch: string }
export type HostPorts = { readonly http?: number; readonly execd?: number; readonly egress?: number }

/** Everything about a sandbox that must survive a restart. Kept in the store, one row each. Times in ms since 1970. */
export type SandboxRecord = {
  readonly id: string
  readonly phase: Phase
  /** A client was told the id while `creating`: a failure stays visible to it. */
  readonly announced: boolean
  /** Why it failed; a code and a sentence. */
  readonly reason: string | null
  readonly message: string | null
  readonly createdAt: number
  /** When `phase` or the run state last changed. */
  readonly changedAt: number
  /** null: lives until it is deleted. */
  readonly expiresAt: number | null
  /** A failed sandbox is forgotten then. */
  readonly keepUntil: number | null
  readonly image: string
  readonly entrypoint: readonly string[]
  readonly metadata: Readonly<Record<string, string>> | null
  readonly platform: Platform | null
  readonly egress: { readonly token: string; readonly policy: NetworkPolicy } | null
  readonly secureAccessToken: string | null
  /** Tokens minted for a lower one are revoked; absent in records of older versions: 0. */
  readonly accessEpoch?: number
  readonly hostPorts: HostPorts
  /** Containers taken over from the original server; absent when we made them. */
  readonly adopted?: readonly string[]
  readonly renewExtendSeconds: number | null
}

/** A sandbox as the server holds it in memory: what is stored, and what Docker said last. */
export type Group = {
  readonly record: SandboxRecord
  readonly facts: readonly Fact[]
  /** While `creating`: what is being done. */
  readonly progress: string | null
}

/** Container name of the only member an OpenSandbox sandbox always has. */
export const mainMember = 'main'
export const egressMember = 'egress'

/** Which member a container is, by its labels; those of the original name none. */
export function memberOf(own: Readonly<Record<string, string>>): string {
  return own[labels.role] ?? (labels.egressSidecarFor in own ? egressMember : mainMember)
}

/** The members of a sandbox, owner of the namespace first. */
export function membersOf(record: { readonly egress: unknown }): Member[] {
  const main = { name: mainMember, gate: false }
  return record.egress === null ? [main] : [{ name: egressMember, gate: true }, main]
}
