/** The grammar of image references (distribution/reference), checked before the engine is asked. Pure. */

const host = /^(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])(?::\d{1,5})?$/
const part = /^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$/
const tag = /^\w[\w.-]{0,127}$/
const digest = /^[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,128}$/
/** Longest name, registry included. */
const mostName = 255

/** What is wrong with `[registry[:port]/]repository[:tag][@digest]`, or null. */
export function imageReferenceProblem(text: string): string | null {
  const at = text.indexOf('@')
  const beforeDigest = at === -1 ? text : text.slice(0, at)
  if (at !== -1 && !digest.test(text.slice(at + 1))) return 'is not an image reference: the digest must be like sha256:<hex digits>'
  const colon = beforeDigest.indexOf(':', beforeDigest.lastIndexOf('/') + 1)
  const name = colon === -1 ? beforeDigest : beforeDigest.slice(0, colon)
  if (colon !== -1 && !tag.test(beforeDigest.slice(colon + 1))) return 'is not an image reference: the tag must be letters, digits, "_", "." and "-", at most 128'
  if (name.length > mostName) return `is not an image reference: the name is longer than ${mostName} characters`
  const parts = name.split('/')
  const first = parts[0] ?? ''
  // As the engine tells a registry from a part of the repository.
  if (parts.length > 1 && (/[.:]/.test(first) || first === 'localhost')) {
    if (!host.test(first)) return 'is not an image reference: the registry must be a host and perhaps a port'
    parts.shift()
  }
  if (parts.every((each) => part.test(each))) return null
  return parts.every((each) => part.test(each.toLowerCase())) ? 'is not an image reference: the repository must be lower case' : 'is not an image reference'
}
