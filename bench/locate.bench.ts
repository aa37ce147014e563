/** Finding the sandbox of a request must not cost more with 100,000 routes than with 10: within what memory and luck add, a thousandth of a request. */
import { readRequestHead } from '../gateway/headers.ts'
import { Locator } from '../gateway/locate.ts'
import { RouteTable } from '../gateway/routes.ts'
import type { Micro, MicroGoal } from './micro.ts'

const few = tableOf(10)
const many = tableOf(100_000)
const domain = 'sandbox.example'
const [header, wildcard, uri] = (['header', 'wildcard', 'uri'] as const).map((mode) => ({ few: new Locator({ mode, baseDomain: domain }, few), many: new Locator({ mode, baseDomain: domain }, many) })) as [Pair, Pair, Pair]
const plain = readRequestHead(['Host', 'gateway.example'], false)
/** Several in turn: how far one entry lies down the chain of its bucket is luck. */
const ten = Array.from({ length: 10 }, (_, index) => headNaming(`sandbox${index}-8080`))
const hosts = Array.from({ length: 10 }, (_, index) => readRequestHead(['Host', `sandbox${index}-8080.${domain}`], false))
const paths = Array.from({ length: 10 }, (_, index) => `/sandbox${index}/8080/a/path?query`)
const nobody = headNaming('nobody-8080')
/** More tokens than the gateway remembers parsed, so that most are parsed anew. */
const spread = Array.from({ length: 65_536 }, (_, index) => headNaming(`sandbox${(index * 7919) % 100_000}-8080`))
let turn = 0
type Pair = { readonly few: Locator; readonly many: Locator }
const within = (name: string): MicroGoal => ({ name: `${name} 100,000 routes`, against: `${name} 10 routes`, limit: 1.5 })

export const bench: Micro = {
  title: 'locate',
  cases: {
    'header, the same ten of 10 routes': () => header.few.locate(ten[turn++ % 10]!, '/a/path?query'),
    'header, the same ten of 100,000 routes': () => header.many.locate(ten[turn++ % 10]!, '/a/path?query'),
    'header, always another of 100,000 routes': () => header.many.locate(spread[turn++ & 0xffff]!, '/a/path?query'),
    'wildcard, the same ten of 10 routes': () => wildcard.few.locate(hosts[turn++ % 10]!, '/a/path?query'),
    'wildcard, the same ten of 100,000 routes': () => wildcard.many.locate(hosts[turn++ % 10]!, '/a/path?query'),
    'uri, the same ten of 10 routes': () => uri.few.locate(plain, paths[turn++ % 10]!),
    'uri, the same ten of 100,000 routes': () => uri.many.locate(plain, paths[turn++ % 10]!),
    'header, no such sandbox, of 10 routes': () => header.few.locate(nobody, '/'),
    'header, no such sandbox, of 100,000 routes': () => header.many.locate(nobody, '/'),
  },
  goals: ['header, the same ten of', 'wildcard, the same ten of', 'uri, the same ten of', 'header, no such sandbox, of'].map(within),
}

function tableOf(count: number): RouteTable {
  const table = new RouteTable(() => false)
  for (let index = 0; index < count; index++) table.put({ id: `sandbox${index}`, host: `10.${index >> 16}.${(index >> 8) & 255}.${index & 255}`, state: 'Running', lifecycle: `life${index}` })
  return table
}

function headNaming(token: string): ReturnType<typeof readRequestHead> {
  return readRequestHead(['Host', 'gateway.example', 'OpenSandbox-Ingress-To', token], false)
}
