/**
 * Reads `deploy/docker/compose.yaml` and says it in the engine's words, so that a test starts exactly what stands there. Knows the part of YAML
 * and of compose that the file uses; anything else is an error, so that nothing in the file goes untested.
 */
import type Docker from 'dockerode'

type Value = string | Value[] | { [key: string]: Value }
type Line = { readonly indent: number; readonly text: string }

/** Service name to what the engine is asked to create. `variables` is the environment of `docker compose`. @throws Error on what it does not know */
export function readCompose(text: string, variables: Readonly<Record<string, string>>): Map<string, Docker.ContainerCreateOptions> {
  const lines = text.split('\n').filter((line) => !/^\s*(#|$)/.test(line)).map((line) => ({ indent: line.search(/\S/), text: substitute(line.trim(), variables) }))
  const { name: _, services, ...unknown } = readMap(lines) as { name: string; services: Record<string, Record<string, Value>> }
  refuse('', unknown)
  return new Map(Object.entries(services).map(([name, service]) => [name, toContainer(name, service)]))
}

function toContainer(name: string, service: Record<string, Value>): Docker.ContainerCreateOptions {
  const { image, pull_policy, command, network_mode, user, cap_drop, cap_add, security_opt, read_only, tmpfs, volumes, restart, ...unknown } = service as Record<string, string & string[]>
  refuse(name, unknown)
  if (pull_policy !== 'never') throw new Error(`${name}: would ask a registry`)
  return {
    Image: image!,
    Cmd: command!,
    ...(user === undefined ? {} : { User: user }),
    HostConfig: {
      NetworkMode: network_mode!,
      CapDrop: cap_drop!,
      CapAdd: cap_add ?? [],
      SecurityOpt: security_opt!,
      ReadonlyRootfs: read_only === 'true',
      Tmpfs: Object.fromEntries((tmpfs ?? []).map((place) => [place, ''])),
      Binds: volumes!,
      RestartPolicy: { Name: restart! },
    },
  }
}

function refuse(where: string, unknown: object): void {
  if (Object.keys(unknown).length > 0) throw new Error(`compose.yaml ${where}: what is ${Object.keys(unknown).join(', ')}?`)
}

/** `${NAME}`, `${NAME:?message}` and `${NAME:-default}`. */
function substitute(text: string, variables: Readonly<Record<string, string>>): string {
  return text.replaceAll(/\$\{(\w+)(?::([?-])([^}]*))?\}/g, (_, name: string, how: string | undefined, rest: string) => {
    const value = variables[name] ?? (how === '-' ? rest : undefined)
    if (value === undefined) throw new Error(`compose.yaml: ${name} is not set`)
    return value
  })
}

function readMap(lines: readonly Line[]): Record<string, Value> {
  const map: Record<string, Value> = {}
  for (let at = 0; at < lines.length; ) {
    const { indent, text } = lines[at]!
    const [, key, value] = /^([\w-]+):(?: (.*))?$/.exec(text) ?? []
    if (key === undefined) throw new Error(`compose.yaml: cannot read "${text}"`)
    let next = at + 1
    while (next < lines.length && lines[next]!.indent > indent) next++
    const below = lines.slice(at + 1, next)
    map[key] = value === undefined ? (below[0]?.text.startsWith('- ') ? below.map((line) => readScalar(line.text.slice(2))) : readMap(below)) : readValue(value)
    at = next
  }
  return map
}

/** A list in brackets whose items hold no comma, or a scalar. */
function readValue(text: string): Value {
  return text.startsWith('[') && text.endsWith(']') ? text.slice(1, -1).split(',').map((item) => readScalar(item.trim())) : readScalar(text)
}

function readScalar(text: string): string {
  return text.startsWith('"') ? (JSON.parse(text) as string) : text
}
