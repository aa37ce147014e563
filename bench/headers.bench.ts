/** What crosses, in both directions: read once, added to, and the answer's fields back. */
import { addForwarded, readRequestHead } from '../gateway/headers.ts'
import { prefixRewriter, responseFields } from '../gateway/response-headers.ts'
import type { Micro } from './micro.ts'
import { browserFields } from './visits.ts'

const head = readRequestHead(browserFields, false)
const ownFields = head.out.length
const forwarding = { peer: '192.0.2.7', proto: 'http', port: '28888', prefix: '', requestId: 'bench-1' } as const
const answer = {
  'content-type': 'text/html; charset=utf-8', 'content-length': '1234', date: 'Thu, 26 Nov 2026 00:00:00 GMT', etag: '"abc"', vary: 'accept-encoding', 'cache-control': 'no-cache',
  connection: 'keep-alive', 'keep-alive': 'timeout=5', 'set-cookie': ['a=b; Path=/; HttpOnly', 'c=d; Domain=example.com'],
}
const rewrite = prefixRewriter('/sandbox5/8080', '/sandbox5/8080', '10.0.0.5:8080')

export const bench: Micro = {
  title: 'header fields in both directions',
  cases: {
    'readRequestHead, 9 fields': () => readRequestHead(browserFields, false),
    'addForwarded': () => {
      head.out.length = ownFields
      addForwarded(head, forwarding)
      return head
    },
    'responseFields, 10 fields': () => responseFields(answer, null, 'sandbox5-8080.sandbox.example'),
    'responseFields, 10 fields, URI mode': () => responseFields(answer, rewrite, 'gateway.example'),
  },
}
