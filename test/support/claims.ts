/** Whether the tests' internet may hold a range: never one that this machine uses itself. */
import { execa } from 'execa'
import { readFile } from 'node:fs/promises'
import ipaddr from 'ipaddr.js'

type Cidr = [ipaddr.IPv4 | ipaddr.IPv6, number]

/**
 * Throws, naming every range in the way: the machine's own routes, addresses and resolvers stay as they are. A smaller network of
 * the machine inside a claim is no harm: its route is the more specific one and goes on.
 */
export async function checkClaims(claims: readonly string[]): Promise<void> {
  const [routed, resolving] = [await routedRanges(), await resolvers()]
  const problems: string[] = []
  for (const claim of claims) {
    const cidr = readCidr(claim)
    const inTheWay = [...routed.filter((range) => contains(readCidr(range.text), cidr)), ...resolving.filter((range) => contains(cidr, readCidr(range.text)))]
    problems.push(...inTheWay.map((range) => `${claim} overlaps ${range.text} (${range.what})`), ...(await localProblem(claim)))
  }
  if (problems.length > 0) throw new Error(`the test internet cannot hold what this machine uses:\n  ${problems.join('\n  ')}`)
}

function contains(outer: Cidr, inner: Cidr): boolean {
  if (outer[0].kind() !== inner[0].kind() || outer[1] > inner[1]) return false
  return inner[0].match(outer[0] as ipaddr.IPv4 & ipaddr.IPv6, outer[1])
}

function readCidr(text: string): Cidr {
  if (text.includes('/')) return ipaddr.parseCIDR(text)
  const address = ipaddr.parse(text)
  return [address, address.kind() === 'ipv4' ? 32 : 128]
}

type Used = { readonly text: string; readonly what: string }

async function routedRanges(): Promise<Used[]> {
  const listed = await Promise.all(['-4', '-6'].map((family) => execa`ip ${family} -j route show table all`))
  const routes = listed.flatMap(({ stdout }) => JSON.parse(stdout || '[]') as { dst: string; dev?: string }[])
  return routes.filter((route) => route.dst !== 'default').map((route) => ({ text: route.dst, what: `routed to ${route.dev ?? 'nowhere'}` }))
}

async function resolvers(): Promise<Used[]> {
  const text = await readFile('/etc/resolv.conf', 'utf8').catch(() => '')
  const addresses = [...text.matchAll(/^\s*nameserver\s+([0-9a-fA-F.:]+)\s*$/gm)].map((match) => match[1]!)
  return addresses.map((address) => ({ text: address, what: "this machine's resolver" }))
}

/** Policy routing can hide a route from the tables above; the kernel's own answer counts. Having no route at all is fine. */
async function localProblem(claim: string): Promise<string[]> {
  const { stdout, failed } = await execa({ reject: false })`ip -j route get ${readCidr(claim)[0].toString()}`
  if (failed) return []
  const [route] = JSON.parse(stdout) as { type?: string; gateway?: string; dev?: string }[]
  if (route === undefined || route.gateway !== undefined) return []
  return [`${claim} is reached without a gateway (${route.type ?? 'unicast'} on ${route.dev ?? '?'})`]
}
