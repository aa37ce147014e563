/**
 * What five hundred sandboxes cost the server: a page of two hundred of them, and memory. They are made over the API, but by an engine that
 * only writes them down (`peers/fake-docker.ts`): five hundred real containers would take this bench many minutes, and cost the server the same.
 */
import { readFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { FakeDocker } from '../peers/fake-docker.ts'
import type { Cleanups } from '../program.ts'
import { percentile, type Arena, type Effort, type Sample, type Target } from '../rounds.ts'
import { ServerProgram } from './server-program.ts'

const sandboxes = 500
const pages = 40
/** ms an idle server is left alone before its memory is read. */
const rest = 3000
const body = { image: { uri: 'sallyport/sandbox:local' }, entrypoint: ['sleep', '600'], metadata: { team: 'bench', 'example.com/purpose': 'a-page-of-many' }, env: { LANG: 'C.UTF-8' } }

export const serverMany: Target = { title: 'Lifecycle server: five hundred sandboxes', start }

async function start(_: Effort, cleanups: Cleanups): Promise<Arena> {
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-engine-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  const engine = new FakeDocker()
  await engine.listen(path.join(folder, 'docker.sock'))
  cleanups.add(() => engine.close())
  const program = await ServerProgram.start(cleanups, { server: { creates_per_minute: 0 }, docker: { host_guard: 'off' } }, { DOCKER_HOST: `unix://${path.join(folder, 'docker.sock')}` })
  // One first, so that code and connections are there.
  await program.remove(await program.create(body))
  await page(program)
  const empty = await restingMemory(program)
  for (let made = 0; made < sandboxes; made += 10) await Promise.all(Array.from({ length: 10 }, () => program.create(body)))

  const made = (await restingMemory(program)) - empty
  await program.restart()
  await page(program)
  const restarted = (await restingMemory(program)) - empty
  return {
    loads: [{
      title: 'a page of 200 out of 500', rounds: 5, baseline: 'allowed', goals: [{ contender: 'server', measure: 'p50', sense: 'at most', limit: 1 }],
      measures: [{ key: 'p50', label: 'p50', unit: 'ms' }],
      contenders: { allowed: async () => ({ p50: 60 }), server: () => timePages(program, engine) },
    }, {
      title: 'memory (RSS) that 500 sandboxes add to the idle server', rounds: 1, baseline: 'allowed',
      goals: [{ contender: 'after making them', measure: 'added', sense: 'at most', limit: 1 }, { contender: 'after a restart', measure: 'added', sense: 'at most', limit: 1 }],
      measures: [{ key: 'added', label: 'added', unit: 'MB' }],
      contenders: { allowed: async () => ({ added: 40 }), 'after making them': async () => ({ added: made }), 'after a restart': async () => ({ added: restarted }) },
    }],
    notes: [
      'The yardstick is a fixed allowance: 60 ms, 40 MB. A page that asks the engine anything fails the run.',
      'The sandboxes are made over the API, but the Docker engine is played by the bench, which only writes containers down: 500 real ones take too long here, and the server holds the same of them.',
    ],
  }
}

/** @throws when the engine was asked something meanwhile */
async function timePages(program: ServerProgram, engine: FakeDocker): Promise<Sample> {
  const before = engine.calls
  const times: number[] = []
  for (let turn = 0; turn < pages; turn++) {
    const begin = performance.now()
    await page(program, turn % 2 + 1)
    times.push(performance.now() - begin)
  }
  // The half-minute sweep may fall into the round: it lists once, looks at the network once.
  if (engine.calls - before > 2) throw new Error(`${engine.calls - before} calls of the engine for ${pages} pages`)
  return { p50: percentile(times.toSorted((a, b) => a - b), 0.5) }
}

async function page(program: ServerProgram, number = 1): Promise<void> {
  const { status, value } = await program.call('GET', `/v1/sandboxes?pageSize=200&page=${number}`)
  if (status !== 200 || !Array.isArray((value as { items?: unknown }).items)) throw new Error(`a page was answered with ${status}`)
}

/** MB. */
async function restingMemory({ pid }: ServerProgram): Promise<number> {
  await delay(rest)
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
}
