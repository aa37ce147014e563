/** Saying no: whoever guesses at sandboxes makes the gateway do this, as often as they like. */
import type { ServerResponse } from 'node:http'
import { refuse } from '../gateway/respond.ts'
import type { Visit } from '../gateway/visit.ts'
import type { Micro } from './micro.ts'
import { browserFields, visitOf } from './visits.ts'

let said = ''
const response = { headersSent: false, writeHead: () => undefined, end: (text: string) => void (said = text) } as unknown as ServerResponse

/** @param accept of the client; what an answer to it must hold */
function asking(accept: string, answer: string): () => string {
  const visit: Visit = Object.assign(visitOf(browserFields), { response })
  visit.request.headers.accept = accept
  const work = (): string => {
    refuse(visit, 'EDGE_NO_ROUTE', '', false)
    return said
  }
  if (!work().includes(answer)) throw new Error(`the bench is wrong: ${said}`)
  return work
}

export const bench: Micro = {
  title: 'refuse',
  cases: {
    'text': asking('*/*', 'OpenSandbox Ingress: '),
    'JSON': asking('application/json', '"code":"EDGE_NO_ROUTE"'),
    'page': asking('text/html,application/xhtml+xml,*/*;q=0.8', '<!doctype html>'),
  },
}
