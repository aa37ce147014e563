/** May this client reach the sandbox? Asked on every request to a secured one, so it is part of the price of a request. */
import { decideAccess, decideStrongAccess, mintAccessToken, signShort } from '#policies/access.ts'
import { wholeSandbox } from '#policies/access-token.ts'
import type { Micro } from './micro.ts'

const secret = new Uint8Array(32).fill(7)
const keys = new Map([['a', secret]])
const [id, port, now] = ['bench', 8080, 1_800_000_000]
const token = 'a-token-that-only-the-bench-knows'
const expires = (now + 3600).toString(36)
const plain = { id, port }
const signed = { id, port, expires, signature: signShort('a', secret, id, port, expires) }
const strong = mintAccessToken({ id, port, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: BigInt(now + 3600) })

export const bench: Micro = {
  title: 'access',
  cases: {
    'open sandbox': () => decideAccess({ token: '', header: undefined, route: plain, keys, now }),
    'token in a header': () => decideAccess({ token, header: token, route: plain, keys, now }),
    'token in a header, wrong': () => decideAccess({ token, header: 'another', route: plain, keys, now }),
    'short signature': () => decideAccess({ token, header: undefined, route: signed, keys, now }),
    'strong token': () => decideStrongAccess({ token: strong, id, port, method: 'GET', path: '/a/path', epoch: 0, keys, now }),
  },
}
