/** May this request go on, and where to? All of it: target, Host, route, access, state and address. */
import { mintAccessToken } from '#policies/access.ts'
import { wholeSandbox } from '#policies/access-token.ts'
import { admit } from '../gateway/admit.ts'
import type { Micro } from './micro.ts'
import { browserFields, edgeWith, visitOf } from './visits.ts'

const secret = new Uint8Array(32).fill(7)
const token = 'a-token-that-only-the-bench-knows'
const sandbox = { host: '10.0.0.5', state: 'Running', lifecycle: 'bench' } as const
const edge = edgeWith([{ id: 'sandbox5', ...sandbox }, { id: 'secured', ...sandbox, secureAccessToken: token }], new Map([['a', secret]]))
const strong = mintAccessToken({ id: 'secured', port: 8080, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: BigInt(Math.round(Date.now() / 1000) + 36_000) })
const naming = (to: string, ...more: string[]): string[] => [...browserFields.slice(0, -1), to, ...more]
const open = visitOf(browserFields)
const withToken = visitOf(naming('secured-8080', 'OpenSandbox-Secure-Access', token))
const withStrong = visitOf(naming('secured-8080', 'Sallyport-Access', strong))
const withoutProof = visitOf(naming('secured-8080'))
const nowhere = visitOf(naming('nobody-8080'))

for (const [visit, answer] of [[open, null], [withToken, null], [withStrong, null], [withoutProof, 'EDGE_UNAUTHORIZED'], [nowhere, 'EDGE_NO_ROUTE']] as const) {
  const code = admit(edge, visit)?.code ?? null
  if (code !== answer) throw new Error(`the bench is wrong: ${code} instead of ${answer}`)
}

export const bench: Micro = {
  title: 'admit',
  cases: {
    'open sandbox': () => admit(edge, open),
    'token in a header': () => admit(edge, withToken),
    'strong token, seen before': () => admit(edge, withStrong),
    'secured, no proof': () => admit(edge, withoutProof),
    'no such sandbox': () => admit(edge, nowhere),
  },
}
