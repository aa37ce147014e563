/** Finding the sandbox of a request must not cost more with 100,000 routes than with 10: within what memory and luck add, a thousandth of a request. */
import { readRequestHead } from '../gateway/headers.ts'
import { Locator } from '../gateway/locate.ts'
import { RouteTable } from '../gateway/routes.ts'
import type { Micro } from './micro.ts'

const few = tableOf(10)
const many = tableOf(100_000)
const domain = 'sandbox.example'
const header = { few: new Locator({ mode: 'header', baseDomain: '' }, few), many: new Locator({ mode: 'header', baseDomain: '' }, many) }
const wildcard = new Locator({ mode: 'wildcard', baseDomain: domain }, many)
const uri = new Locator({ mode: 'uri', baseDomain: '' }, many)
const plain = readRequestHead(['Host', 'gateway.example'], false)
const hosted = readRequestHead(['Host', `sandbox5-8080.${domain}`], false)
/** Several in turn: how far one entry lies down the chain of its bucket is luck. */
const ten = Array.from({ length: 10 }, (_, index) => headNaming(`sandbox${index}-8080`))
const nobody = headNaming('nobody-8080')
/** More tokens than the gateway remembers parsed, so that most are parsed anew. */
const spread = Array.from({ length: 65_536 }, (_, index) => headNaming(`sandbox${(index * 7919) % 100_000}-8080`))
let turn = 0

export const bench: Micro = {
  title: 'locate',
  cases: {
    'header, the same ten of 10 routes': () => header.few.locate(ten[turn++ % 10]!, '/a/path?query'),
    'header, the same ten of 100,000 routes': () => header.many.locate(ten[turn++ % 10]!, '/a/path?query'),
    'header, always another of 100,000 routes': () => header.many.locate(spread[turn++ & 0xffff]!, '/a/path?query'),
    'wildcard, the same of 100,000 routes': () => wildcard.locate(hosted, '/a/path?query'),
    'uri, the same of 100,000 routes': () => uri.locate(plain, '/sandbox5/8080/a/path?query'),
    'header, no such sandbox, 10 routes': () => header.few.locate(nobody, '/'),
    'header, no such sandbox, 100,000 routes': () => header.many.locate(nobody, '/'),
  },
  goals: [{ name: 'header, the same ten of 100,000 routes', against: 'header, the same ten of 10 routes', limit: 1.5 }, { name: 'header, no such sandbox, 100,000 routes', against: 'header, no such sandbox, 10 routes', limit: 1.5 }],
}

function tableOf(count: number): RouteTable {
  const table = new RouteTable(() => false)
  for (let index = 0; index < count; index++) table.put({ id: `sandbox${index}`, host: `10.${index >> 16}.${(index >> 8) & 255}.${index & 255}`, state: 'Running', lifecycle: `life${index}` })
  return table
}

function headNaming(token: string): ReturnType<typeof readRequestHead> {
  return readRequestHead(['Host', 'gateway.example', 'OpenSandbox-Ingress-To', token], false)
}
