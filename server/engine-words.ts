/**
 * The engine's refusals in our words. Its own text names registries, resolvers, paths and other containers, so it stays in the log:
 * only what is in these two tables reaches a client. Pure.
 */
import type { Problem } from '#policies/problem.ts'

/** Of a container that was to be made or started: which field of the create request is wrong. */
const refusals: readonly (readonly [RegExp, Problem])[] = [
  [/exec: "[^"]*": (?:stat [^:]*: no such file or directory|executable file not found)/, { path: 'entrypoint[0]', reason: 'names no program of this image' }],
  [/exec: "[^"]*": (?:stat [^:]*: )?(?:permission denied|not a directory|is a directory)/, { path: 'entrypoint[0]', reason: 'names nothing of this image that can be run' }],
  [/Range of CPUs is from/, { path: 'resourceLimits.cpu', reason: 'is more, or less, than this machine can give' }],
  [/Minimum memory limit allowed/, { path: 'resourceLimits.memory', reason: 'is less than a container needs' }],
  [/could not select device driver/, { path: 'resourceLimits.gpu', reason: 'this machine has no GPUs for sandboxes' }],
  [/invalid reference format/, { path: 'image.uri', reason: 'is not an image reference' }],
]

/** Of a pull. */
const pullFaults: readonly (readonly [RegExp, string])[] = [
  [/no such host|dial tcp|connection refused|i\/o timeout|Client\.Timeout|TLS handshake|x509|server gave HTTP response|EOF$/, 'the registry cannot be reached'],
  [/toomanyrequests|rate limit/i, 'the registry limits pulls; try again later'],
  [/pull access denied|repository does not exist|requested access to the resource is denied/, 'there is no such image, or these credentials may not pull it'],
  [/unauthorized|authentication required|incorrect username or password/i, 'the registry does not take these credentials'],
  [/no matching manifest|does not match the specified platform/, 'it is not made for this platform'],
  [/manifest unknown|manifest for .* not found|not found: manifest/, 'there is no such tag or digest'],
  [/no space left on device/, 'the machine has no room for it'],
]

/** null: words we do not know, or nothing a client could mend. */
export function readRefusal(text: string): Problem | null {
  return refusals.find(([words]) => words.test(text))?.[1] ?? null
}

export function pullFaultText(text: string): string {
  return pullFaults.find(([words]) => words.test(text))?.[1] ?? 'the engine could not pull it'
}
