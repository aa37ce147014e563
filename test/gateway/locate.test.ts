/** How hosts and tokens are read, and that what is remembered of those that clients make up is bounded, and wrong for none of them. */
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { RequestHead } from '../../gateway/headers.ts'
import { Locator, type LocateOptions } from '../../gateway/locate.ts'
import { RouteTable } from '../../gateway/routes.ts'
import { entry } from './support.ts'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

const MiB = 1024 * 1024

function heap(): number {
  for (let round = 0; round < 3; round++) collect()
  return process.memoryUsage().heapUsed
}

t.test('a dot at the end makes a host no other one', async (t) => {
  const table = new RouteTable(() => false)
  table.put(entry({ id: 'a' }))
  const rows: [host: string, baseDomain: string, found: boolean][] = [
    ['a-80.gw.test.', 'gw.test', true],
    ['A-80.GW.test.:28888', 'gw.test', true],
    ['a-80.example.', '', true],
    ['a-80.', '', true],
    ['a-80.gw.test..', 'gw.test', false],
    ['a-80..gw.test', 'gw.test', false],
    ['a-80.', 'gw.test', false],
    ['gw.test.', 'gw.test', false],
    ['.', 'gw.test', false],
  ]
  for (const [host, baseDomain, found] of rows) {
    t.equal(new Locator({ mode: 'wildcard', baseDomain }, table).locate(Object.assign(new RequestHead(), { host }), '/').ok, found, `${host} below ${baseDomain}`)
  }
})

t.test('names that nobody has: full memories do not grow', { timeout: 60_000 }, async (t) => {
  const table = new RouteTable(() => false)
  table.put(entry({ id: 'a' }))
  const wildcard: LocateOptions = { mode: 'wildcard', baseDomain: '' }
  const below: LocateOptions = { mode: 'auto', baseDomain: 'gw.test' }
  const long = 'x'.repeat(2_000)
  /** Each name is one that never came before. Remembered, 200,000 of them would take 50 MiB and more, and 10,000 long ones 20 MiB. */
  const rows: [why: string, options: LocateOptions, name: (n: number) => Partial<RequestHead>, known: Partial<RequestHead>, count: number][] = [
    ['sandboxes that are none, by token', wildcard, (n) => ({ ingressTo: `nobody-${n}-80` }), { ingressTo: 'a-80' }, 200_000],
    ['signed tokens', wildcard, (n) => ({ ingressTo: `a-80-x2qxvk-${n.toString(16).padStart(8, '0')}a` }), { ingressTo: 'a-80' }, 200_000],
    ['tokens that cannot be read', wildcard, (n) => ({ deprecatedIngressTo: `nonsense${n}` }), { deprecatedIngressTo: 'a-80' }, 200_000],
    ['sandboxes that are none, by host', wildcard, (n) => ({ host: `nobody-${n}-80.example` }), { host: 'a-80.example' }, 200_000],
    ['the same below the base domain', below, (n) => ({ host: `nobody-${n}-80.gw.test` }), { host: 'a-80.gw.test' }, 200_000],
    ['hosts elsewhere', below, (n) => ({ host: `host-${n}.example` }), { host: 'a-80.gw.test' }, 200_000],
    ['spellings of one host', below, (n) => ({ host: `a-80.gw.test:${n}` }), { host: 'a-80.gw.test' }, 200_000],
    ['long tokens', wildcard, (n) => ({ ingressTo: `${long}${n}-80` }), { ingressTo: 'a-80' }, 10_000],
    ['long hosts', below, (n) => ({ host: `${long}${n}-80.gw.test` }), { host: 'a-80.gw.test' }, 10_000],
  ]
  for (const [why, options, name, known, count] of rows) {
    const locator = new Locator(options, table)
    let wrong = 0
    const flood = (from: number, to: number): void => {
      for (let n = from; n < to; n++) {
        locator.locate(Object.assign(new RequestHead(), name(n)), '/')
        if (n % 1_000 !== 0) continue
        const found = locator.locate(Object.assign(new RequestHead(), known), '/')
        if (!found.ok || found.route.id !== 'a' || found.route.port !== 80) wrong++
      }
    }
    // More than it remembers, so that what follows takes no memory any more.
    const full = count === 200_000 ? 25_000 : 100
    flood(0, full)
    const before = heap()
    flood(full, full + count)
    const grown = (heap() - before) / MiB
    t.ok(grown < 4, `${why}: ${grown.toFixed(1)} MiB more for ${count}`)
    t.equal(wrong, 0, `${why}: a sandbox is found all the time`)
  }
})
