/** Runs attack.py (what root in a sandbox tries) inside a container. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { exec, type Output } from './containers.ts'
import type { Flow, SeenQuestion } from './internet.ts'

const program = await readFile(join(import.meta.dirname, '../system/attack.py'), 'utf8')

/** The command for an attack and its arguments, for `exec` in any container with python3. */
export function attackCommand(name: string, ...args: readonly string[]): string[] {
  return ['python3', '-c', program, name, ...args]
}

export function attack(container: string, name: string, ...args: readonly string[]): Promise<Output> {
  return exec(container, attackCommand(name, ...args))
}

/** Runs several attempts at once, each written as words; gives what each said, `ok` for those that were answered. */
export async function attackTogether(container: string, tries: readonly (readonly string[])[]): Promise<string[]> {
  const { stdout } = await attack(container, 'together', ...tries.map((words) => words.join(' ')))
  return stdout.trimEnd().split('\n')
}

/** Packets that arrived at an address, whatever the protocol and port. */
export function packetsTo(flows: readonly Flow[], address: string): number {
  return flows.filter((flow) => flow.to === address).reduce((sum, flow) => sum + flow.packets, 0)
}

/** Questions for a name or anything below it, in any spelling. */
export function questionsFor(questions: readonly SeenQuestion[], name: string): number {
  return questions.filter((question) => `.${question.name.toLowerCase()}`.endsWith(`.${name}`)).length
}
