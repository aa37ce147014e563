import t from 'tap'
import { Expiry } from '../../server/expiry.ts'

t.test('deadlines by a clock we drive', async (t) => {
  const clock = { now: 1_000_000 }
  const expired: string[] = []
  const expiry = new Expiry({ now: () => clock.now, expire: async (id) => void expired.push(id) })
  t.teardown(() => expiry.close())
  const year = 365 * 86_400_000
  expiry.set('far', clock.now + 100 * year)
  expiry.set('soon', clock.now + 5000)
  expiry.set('moved', clock.now + 5000)
  expiry.set('never', clock.now + 5000)
  expiry.set('never', null)
  expiry.tick()
  t.same(expired, [], 'a deadline beyond 24.8 days does not fire at once')
  expiry.set('moved', clock.now + 9000)
  clock.now += 5000
  expiry.tick()
  t.same(expired, ['soon'])
  clock.now += 200 * year
  expiry.tick()
  t.same(expired, ['soon', 'far', 'moved'], 'a clock that was stepped')
  await new Promise(setImmediate)
  t.equal(expiry.deadline('far'), null)
})

t.test('what could not be removed is tried again, one attempt at a time', async (t) => {
  const clock = { now: 0 }
  const attempts: PromiseWithResolvers<void>[] = []
  const expiry = new Expiry({ now: () => clock.now, expire: () => (attempts.push(Promise.withResolvers()), attempts.at(-1)!.promise) })
  t.teardown(() => expiry.close())
  expiry.set('a', 10)
  clock.now = 10
  expiry.tick()
  clock.now = 10_000
  expiry.tick()
  t.equal(attempts.length, 1, 'not while one is under way')
  attempts[0]!.reject(new Error('engine is away'))
  await new Promise(setImmediate)
  expiry.tick()
  t.equal(attempts.length, 2)
  attempts[1]!.resolve()
  await new Promise(setImmediate)
  t.equal(expiry.deadline('a'), null)
})

t.test('a renewal during an attempt is kept', async (t) => {
  const clock = { now: 10 }
  const attempt = Promise.withResolvers<void>()
  const expiry = new Expiry({ now: () => clock.now, expire: () => attempt.promise })
  t.teardown(() => expiry.close())
  expiry.set('a', 10)
  expiry.tick()
  expiry.set('a', 99)
  attempt.resolve()
  await new Promise(setImmediate)
  t.equal(expiry.deadline('a'), 99)
})
