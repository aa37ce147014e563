import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { Turns } from '../../server/turns.ts'

/** Works that end when they are told to; `begun` says which have begun. */
function works(turns: Turns): { begun: string[]; start(name: string): { end(error?: Error): void; done: Promise<string> } } {
  const begun: string[] = []
  return {
    begun,
    start(name) {
      const { promise, resolve, reject } = Promise.withResolvers<string>()
      const done = turns.run(() => { begun.push(name); return promise })
      return { done, end: (error) => (error === undefined ? resolve(name) : reject(error)) }
    },
  }
}

t.test('some at a time, in the order they came', async (t) => {
  const { begun, start } = works(new Turns(2, 60_000))
  const [a, b, c, d] = ['a', 'b', 'c', 'd'].map(start) as [ReturnType<typeof start>, ReturnType<typeof start>, ReturnType<typeof start>, ReturnType<typeof start>]
  t.same(begun, ['a', 'b'])
  b.end(new Error('boom'))
  await t.rejects(b.done, { message: 'boom' }, 'whose work fails hears of it')
  await delay(0)
  t.same(begun, ['a', 'b', 'c'], 'and makes room')
  a.end()
  c.end()
  t.same(await Promise.all([a.done, c.done]), ['a', 'c'])
  await delay(0)
  d.end()
  t.equal(await d.done, 'd')
  const next = ['e', 'f', 'g'].map(start)
  t.same(begun, ['a', 'b', 'c', 'd', 'e', 'f'], 'as many as before')
  for (const each of next) each.end()
  t.same(await Promise.all(next.map((each) => each.done)), ['e', 'f', 'g'])
})

t.test('what hangs holds nobody up for ever', async (t) => {
  const turns = new Turns(1, 20)
  const { begun, start } = works(turns)
  const hanging = start('hanging')
  const next = start('next')
  next.end()
  t.equal(await next.done, 'next')
  hanging.end()
  t.equal(await hanging.done, 'hanging', 'it goes on all the same')
  const [one, two] = [start('one'), start('two')]
  t.same(begun, ['hanging', 'next', 'one'], 'and its turn is not given back twice')
  one.end()
  two.end()
  t.same(await Promise.all([one.done, two.done]), ['one', 'two'])
})
