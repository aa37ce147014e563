/**
 * Where the tests' internet lives on this machine, and how every trace of it is removed. Names are fixed: the keeper's lock
 * (internet-keeper.ts) makes sure that only one such internet is up at a time.
 */
import { execa } from 'execa'

/** The network namespace that holds every address the tests talk to. */
export const netns = 'sp-internet-tests'
/** The host's end of the veth, and the end inside the namespace. */
export const hostLink = 'sp-internet'
export const innerLink = 'uplink'
/**
 * Addresses of the link. Not inside a claimed range: the namespace holds those as `local` routes, and a local route would
 * swallow the answers to the host's end.
 */
export const hostAddress = '198.19.255.1'
export const innerAddress = '198.19.255.2'
export const hostAddress6 = 'fd5a:1170:ffff::1'
export const innerAddress6 = 'fd5a:1170:ffff::2'
/** Always claimed: documentation and benchmark ranges (RFC 5737, 2544, 3849). 192.0.2.0/24 and 203.0.113.0/24 may be the machine's own. */
export const ownRanges = ['198.51.100.0/24', '198.18.0.0/16', '2001:db8::/32']
/** The DNS server answers on port 53 of every claimed address; this is the one to configure. */
export const dnsAddress = '198.51.100.53'
/** Marks our rules in DOCKER-USER. */
export const ruleComment = 'sp-internet'
/** Abstract unix socket (freed by the kernel with its process) that makes internets wait for each other. */
export const lockName = '\0sallyport-test-internet'

/** Removes the namespace, the link (and with it every host route) and the DOCKER-USER rules. Nothing there is fine. */
export async function removeInternet(): Promise<void> {
  const found = await execa({ reject: false })`ip netns pids ${netns}`
  for (const pid of found.stdout.split('\n').filter(Boolean)) killIfAlive(Number(pid))
  await execa({ reject: false })`ip link delete ${hostLink}`
  await execa({ reject: false })`ip netns delete ${netns}`
  for (const rule of await ourRules()) await execa({ reject: false })`iptables -w 10 ${rule}`
}

/** Our rules in DOCKER-USER, as arguments that delete them. */
async function ourRules(): Promise<string[][]> {
  const listed = await execa({ reject: false })`iptables -w 10 -S DOCKER-USER`
  return listed.stdout
    .split('\n')
    .filter((line) => line.includes(`--comment ${ruleComment} `) || line.includes(`--comment "${ruleComment}" `))
    .map((line) => ['-D', ...line.split(' ').slice(1).map((word) => word.replaceAll('"', ''))])
}

function killIfAlive(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It went by itself between the listing and now.
  }
}
