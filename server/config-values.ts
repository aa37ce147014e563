/** What a schema cannot say of single values of the configuration: names of capabilities, images, hosts, levels. Pure. */
import { canonicalAddress } from '#policies/address.ts'
import { isHostName } from '#policies/host.ts'
import type { Problem } from '#policies/problem.ts'
import type { Config } from './config.ts'
import { imageReferenceProblem } from './image-reference.ts'

export const logLevels = ['DEBUG', 'INFO', 'WARNING', 'WARN', 'ERROR', 'CRITICAL', 'FATAL'] as const

/** capabilities(7), up to Linux 5.9. */
const capabilities: ReadonlySet<string> = new Set((
  'AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE ' +
  'LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT ' +
  'SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM ALL').split(' '))
/** Ten years. */
const longestFailureTtl = 315_360_000

/** @param mode null when it is unknown */
export function valueProblems(config: Pick<Config, 'server' | 'log' | 'runtime' | 'docker' | 'egress'>, mode: Config['ingress']['mode'] | null): Problem[] {
  const problems: Problem[] = []
  const { server, log, runtime, docker, egress } = config
  const check = (path: string, value: string | undefined, fits: (value: string) => boolean, reason: string): void => {
    if (value !== undefined && !fits(value)) problems.push({ path, reason })
  }
  // The engine takes a name for "every address".
  if (mode === 'direct') check('server.host', server.host, isAddress, 'must be an IP address: in direct mode sandbox ports are published on it')
  else check('server.host', server.host, isHost, 'must be an IP address or a host name')
  check('server.eip', server.eip, isHost, 'must be an IP address or a host name, without a port')
  check('log.level', log.level, (level) => (logLevels as readonly string[]).includes(level.toUpperCase()), `must be one of ${logLevels.join(', ')}`)
  for (const [path, image] of [['runtime.execd_image', runtime.execd_image], ['egress.image', egress.image]] as const) {
    const reason = image === undefined ? null : imageReferenceProblem(image)
    if (reason !== null) problems.push({ path, reason })
  }
  check('docker.apparmor_profile', docker.apparmor_profile, (profile) => /^[\w./:@+-]{0,255}$/.test(profile), 'must be the name of an AppArmor profile')
  for (const [index, name] of docker.drop_capabilities.entries()) {
    check(`docker.drop_capabilities[${index}]`, name, (text) => capabilities.has(text.toUpperCase().replace(/^CAP_/, '')), 'is not the name of a capability')
  }
  return problems
}

/** PENDING_FAILURE_TTL: how long, in seconds, a sandbox that failed stays visible. */
export function readFailureTtl(text: string | undefined, problems: Problem[]): number {
  if (text === undefined || text.trim() === '') return 3600
  const seconds = /^\d{1,9}$/.test(text.trim()) ? Number(text.trim()) : 0
  if (seconds < 1 || seconds > longestFailureTtl) problems.push({ path: 'PENDING_FAILURE_TTL', reason: `must be a number of seconds from 1 to ${longestFailureTtl}` })
  return seconds
}

function isHost(text: string): boolean {
  return isAddress(text.replace(/^\[(.*:.*)\]$/, '$1')) || isHostName(text)
}

/** Not the short and octal forms that some resolvers take for one. */
function isAddress(text: string): boolean {
  return canonicalAddress(text) !== null
}
