/**
 * The red team's range. An attack is a row: words for arsenal.py, and an address or a name of its own that tells whether it got
 * out. All rows of a table first run where nothing holds them, and each must arrive in the tests' internet there; then all run as
 * root in a sandbox that the server made with a policy, and none may arrive. What an attempt itself says is not trusted.
 */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Test } from 'tap'
import { packetsTo, questionsFor } from '#test/support/attack.ts'
import { exec } from '#test/support/containers.ts'
import type { Internet } from '#test/support/internet.ts'

const program = await readFile(join(import.meta.dirname, 'arsenal.py'), 'utf8')

/** The tests' DNS server, which is also the resolver that the sidecar asks. */
export const resolver = '198.51.100.53'

export type Row<Place extends string = string> = {
  readonly why: string
  /** Where it must work first: a key of the places given to `attack`. */
  readonly first: Place
  readonly words: readonly string[]
  /** An address of the internet where packets arrive, or a name that is asked for, when it works. */
  readonly address?: string
  readonly name?: string
}

let last = 0
/** An address that no other row of this file uses. */
export function ownPlace(): string {
  last++
  return `198.18.${100 + (last >> 8)}.${last & 255}`
}
/** A name that no other row of this file uses, outside every policy. */
export function ownName(): string {
  return `n${++last}.leak.example`
}

/** Success is a packet at an address of its own. */
export function reaches<Place extends string>(why: string, first: Place, words: (address: string) => readonly string[], address = ownPlace()): Row<Place> {
  return { why, first, words: words(address), address }
}

/** Success is a question for a name of its own. */
export function asks<Place extends string>(why: string, first: Place, words: (name: string) => readonly string[], name = ownName()): Row<Place> {
  return { why, first, words: words(name), name }
}

/** Runs attempts in a container, eight at a time; what each said. */
export async function fire(container: string, attempts: readonly (readonly string[])[], seconds = 40): Promise<string[]> {
  const { stdout, stderr, code } = await exec(container, ['python3', '-c', program, JSON.stringify(attempts)], seconds)
  if (code !== 0) throw new Error(`the arsenal ended with ${code}: ${stderr}${stdout}`)
  return JSON.parse(stdout) as string[]
}

/** Packets or questions that arrived for each row since the internet was told to forget. */
export async function arrivals(internet: Internet, rows: readonly Row[]): Promise<number[]> {
  const [flows, questions] = [await internet.flows(), await internet.questions()]
  return rows.map(({ address, name }) => (address === undefined ? questionsFor(questions, name ?? '') : packetsTo(flows, address)))
}

export type Range<Place extends string> = {
  readonly internet: Internet
  /** Containers in which attacks must work. */
  readonly places: Readonly<Record<Place, string>>
  /** Main containers of sandboxes with a policy, by what is special about them. */
  readonly guarded: ReadonlyMap<string, string>
}

/** The whole procedure for a table. */
export async function attack<Place extends string>(t: Test, { internet, places, guarded }: Range<Place>, rows: readonly Row<Place>[]): Promise<void> {
  const signs = rows.map(({ address, name }) => address ?? name)
  t.same(signs.filter((sign, i) => signs.indexOf(sign) !== i), [], 'each row has an address or a name of its own')
  for (const place of new Set(rows.map(({ first }) => first))) {
    const mine = rows.filter(({ first }) => first === place)
    await internet.forget()
    const said = await fire(places[place], mine.map(({ words }) => words))
    const seen = await arrivals(internet, mine)
    for (const [i, row] of mine.entries()) t.ok((seen[i] ?? 0) > 0, `${row.why}: works from ${place}`, { said: said[i] })
  }
  for (const [kind, container] of guarded) await hold(t, internet, [`from ${kind}`, container], rows)
}

/** The second half alone: all rows run in a container under a policy, and none may arrive. */
export async function hold(t: Test, internet: Internet, [where, container]: readonly [where: string, container: string], rows: readonly Row[]): Promise<void> {
  await internet.forget()
  const said = await fire(container, rows.map(({ words }) => words))
  const seen = await arrivals(internet, rows)
  for (const [i, row] of rows.entries()) t.equal(seen[i], 0, `${row.why}: nothing arrives ${where}`, { said: said[i] })
}
