/** The cookie that a browser gets for the token it came in with. */
import t from 'tap'
import { wholeSandbox } from '#policies/access-token.ts'
import { mintAccessToken, readSecret } from '#policies/access.ts'
import { entryCookie } from '../../gateway/entry.ts'

t.test('a browser keeps its entry for an hour at most, and never longer than the token lasts', async (t) => {
  const secret = readSecret('c2VjcmV0LWE=') as Uint8Array
  const now = 1_800_000_000
  const rows: [left: bigint, age: number, why: string][] = [
    [600n, 600, 'as long as the token'], [1n, 1, ''], [3_599n, 3_599, ''], [3_600n, 3_600, 'an hour'], [3_601n, 3_600, 'no more than that'],
    [10n * 31_536_000n, 3_600, 'ten years'], [2n ** 64n - 1n - BigInt(now), 3_600, 'for ever'], [0n, 0, 'its last second'], [-1n, 0, 'over'],
  ]
  for (const [left, age, why] of rows) {
    const token = mintAccessToken({ id: 'sec', port: 9100, epoch: 0, scope: wholeSandbox, keyId: 'a', secret, expires: BigInt(now) + left })
    for (const prefix of ['', '/sec/9100']) t.equal(/; Max-Age=(-?\d+)$/.exec(entryCookie(token, prefix, true, now + 0.9))?.[1], String(age), `${left} s left ${prefix} ${why}`)
  }
})
