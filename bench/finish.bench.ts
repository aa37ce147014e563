/** The end of a request: its line and its place in the counters. */
import { admit } from '../gateway/admit.ts'
import { accessLine } from '../gateway/visit.ts'
import type { Micro } from './micro.ts'
import { browserFields, edgeWith, visitOf } from './visits.ts'

const edge = edgeWith([{ id: 'sandbox5', host: '10.0.0.5', state: 'Running', lifecycle: 'bench' }])
const visit = visitOf(browserFields)
if (admit(edge, visit) !== null) throw new Error('the bench is wrong: the request is refused')
visit.dialledAt = visit.locatedAt + 0.05
visit.firstByteAt = visit.dialledAt + 2
visit.status = 200
visit.bytesOut = 1234
const end = visit.firstByteAt + 0.1
let wall = Date.now()

export const bench: Micro = {
  title: 'end of a request',
  cases: {
    'accessLine, within a millisecond': () => accessLine(visit, wall, end),
    'accessLine, first of a millisecond': () => accessLine(visit, ++wall, end),
    'Metrics.done': () => edge.metrics.done(visit, end),
  },
}
