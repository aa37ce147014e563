/** Which pulls are one: of the same reference, for the same platform, with the same credentials. */
import t from 'tap'
import { Images, type Wanted } from '../../server/images.ts'

const plain: Wanted = { reference: 'far/away:1', platform: null, auth: null }
const ann = { username: 'ann', password: 'a' }

t.test('pulls that come together', async (t) => {
  const cases: [why: string, other: Wanted, pulls: number][] = [
    ['the same', plain, 1],
    ['another tag', { ...plain, reference: 'far/away:2' }, 2],
    ['another platform', { ...plain, platform: { os: 'linux', arch: 'arm64' } }, 2],
    ["with credentials: nobody gets an image through another's", { ...plain, auth: ann }, 2],
  ]
  for (const [why, other, pulls] of cases) {
    const over = Promise.withResolvers<void>()
    const asked: (string | null)[] = []
    const images = new Images({
      image: async () => null,
      pull: (_reference, { auth }) => (asked.push(auth?.username ?? null), over.promise),
    })
    const both = [plain, other].map((wanted) => images.ensure(wanted, () => undefined, 'x'))
    await new Promise(setImmediate)
    t.equal(asked.length, pulls, why)
    over.resolve()
    await Promise.all(both)
    await images.ensure(plain, () => undefined, 'x')
    t.equal(asked.length, pulls + 1, `${why}: one that is over is not joined`)
  }
})

t.test('one that fails fails for all who wait, and is begun again by the next', async (t) => {
  let pulls = 0
  const images = new Images({ image: async () => null, pull: async () => { pulls++; throw new Error('toomanyrequests') } })
  const failed = await Promise.allSettled([1, 2].map(() => images.ensure(plain, () => undefined, 'far/away:1')))
  t.same(failed.map((outcome) => outcome.status === 'rejected' && (outcome.reason as Error).message), Array(2).fill('Failed to pull image far/away:1: the registry limits pulls; try again later.'))
  t.equal(pulls, 1)
  await t.rejects(images.ensure(plain, () => undefined, 'x'))
  t.equal(pulls, 2)
})
