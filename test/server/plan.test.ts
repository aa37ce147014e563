import t from 'tap'
import type { ContainerState, Fact, Member } from '../../server/group.ts'
import { plan, type Step, type Want } from '../../server/plan.ts'

const alone: Member[] = [{ name: 'main', gate: false }]
const guarded: Member[] = [{ name: 'egress', gate: true }, { name: 'main', gate: false }]
const many: Member[] = [{ name: 'egress', gate: true }, { name: 'web', gate: false }, { name: 'db', gate: false }]

function facts(states: Record<string, ContainerState>, startedAt: Record<string, number> = {}): Fact[] {
  return Object.entries(states).map(([member, state]) => ({ containerId: `id-${member}`, member, state, exitCode: null, address: '', startedAt: startedAt[member] ?? null }))
}

function words(steps: readonly Step[]): string {
  return steps.map((step) => ('member' in step ? `${step.do} ${step.member}` : step.do === 'fail' ? step.reason : step.do)).join(', ')
}

const table: [why: string, want: Want, members: Member[], states: Record<string, ContainerState>, steps: string][] = [
  ['one container', 'built', alone, {}, 'create main, start main, settle'],
  ['the gate is confirmed before main exists', 'built', guarded, {}, 'create egress, start egress, confirm egress, create main, start main, settle'],
  ['members join behind the gate in order', 'built', many, {}, 'create egress, start egress, confirm egress, create web, start web, create db, start db, settle'],
  ['what is there is not made again, the gate is asked again', 'built', guarded, { egress: 'running', main: 'created' }, 'confirm egress, start main, settle'],
  ['a dead gate undoes it', 'built', guarded, { egress: 'exited' }, 'remove egress, CREATE_INTERRUPTED'],
  ['all is well', 'kept', guarded, { egress: 'running', main: 'running' }, ''],
  ['paused is well', 'kept', guarded, { egress: 'running', main: 'paused' }, ''],
  ['the gate ended: main first, then what is left of the gate', 'kept', guarded, { egress: 'exited', main: 'running' }, 'remove main, remove egress, EGRESS_GONE'],
  ['the gate was removed', 'kept', guarded, { main: 'running' }, 'remove main, EGRESS_GONE'],
  ['the gate ended while main was paused', 'kept', guarded, { egress: 'dead', main: 'paused' }, 'remove main, remove egress, EGRESS_GONE'],
  ['main ended by itself: the gate guards nothing', 'kept', guarded, { egress: 'running', main: 'exited' }, 'remove egress'],
  ['both ended, as after an engine restart', 'kept', guarded, { egress: 'exited', main: 'exited' }, 'remove egress'],
  ['ended and cleaned up', 'kept', guarded, { main: 'exited' }, ''],
  ['main was removed by hand', 'kept', guarded, { egress: 'running' }, 'remove egress, forget'],
  ['everything was removed by hand', 'kept', alone, {}, 'forget'],
  ['one of many was removed by hand', 'kept', many, { egress: 'running', web: 'running' }, 'remove web, remove egress, forget'],
  ['one of many ended: the others go on', 'kept', many, { egress: 'running', web: 'running', db: 'exited' }, ''],
  ['removed in reverse order', 'gone', guarded, { egress: 'running', main: 'running' }, 'remove main, remove egress, forget'],
  ['strangers in the group go first', 'gone', guarded, { egress: 'running', main: 'running', odd: 'running' }, 'remove odd, remove main, remove egress, forget'],
  ['the record stays', 'ended', guarded, { egress: 'running' }, 'remove egress'],
  ['nothing to do but forget', 'gone', alone, {}, 'forget'],
]
for (const [why, want, members, states, steps] of table) t.equal(words(plan(want, members, facts(states))), steps, `${want}: ${why}`)

const started: [why: string, members: Member[], states: Record<string, ContainerState>, startedAt: Record<string, number>, steps: string][] = [
  ['the gate first, as it was made', guarded, { egress: 'running', main: 'running' }, { egress: 1, main: 2 }, ''],
  ['the gate again: main is left in a namespace that is no more', guarded, { egress: 'running', main: 'running' }, { egress: 3, main: 2 }, 'remove main, remove egress, EGRESS_GONE'],
  ['also while main was paused', guarded, { egress: 'running', main: 'paused' }, { egress: 3, main: 2 }, 'remove main, remove egress, EGRESS_GONE'],
  ['main again, by hand: it joined the namespace that is', guarded, { egress: 'running', main: 'running' }, { egress: 3, main: 4 }, ''],
  ['one of many is left behind', many, { egress: 'running', web: 'running', db: 'running' }, { egress: 3, web: 2, db: 4 }, 'remove db, remove web, remove egress, EGRESS_GONE'],
  ['the one left behind has ended', many, { egress: 'running', web: 'exited', db: 'running' }, { egress: 3, web: 2, db: 4 }, ''],
  ['nobody has looked yet', guarded, { egress: 'running', main: 'running' }, { egress: 3 }, ''],
]
for (const [why, members, states, startedAt, steps] of started) t.equal(words(plan('kept', members, facts(states, startedAt))), steps, `started: ${why}`)

t.test('from any state, building starts nothing before its gate was confirmed', async (t) => {
  const possible: (ContainerState | null)[] = [null, 'created', 'running', 'paused', 'exited', 'dead', 'removing']
  for (const egress of possible) {
    for (const main of possible) {
      const steps = words(plan('built', guarded, facts({ ...(egress && { egress }), ...(main && { main }) } as Record<string, ContainerState>)))
      const started = steps.indexOf('start main')
      t.ok(started === -1 || (steps.includes('confirm egress') && steps.indexOf('confirm egress') < started), `${egress}/${main}: ${steps}`)
    }
  }
})

t.test('the end of a sidecar is told with its exit code', async (t) => {
  const message = (exitCode: number | null): string | undefined => plan('kept', guarded, facts({ egress: 'exited', main: 'running' }).map((fact) => (fact.member === 'egress' ? { ...fact, exitCode } : fact))).flatMap((step) => (step.do === 'fail' ? step.message : []))[0]
  t.equal(message(137), 'The egress sidecar of this sandbox ended with exit code 137, so the sandbox was ended.')
  t.equal(message(0), 'The egress sidecar of this sandbox ended with exit code 0, so the sandbox was ended.')
  t.equal(message(null), 'The egress sidecar of this sandbox ended, so the sandbox was ended.')
})
