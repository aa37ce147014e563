/** The only writer of error bodies: a fault becomes JSON for programs, a small page for browsers, and the original's text for the rest. */
import { STATUS_CODES } from 'node:http'
import { faults, type FaultCode } from '#policies/fault.ts'
import { breakOff } from './break-off.ts'
import type { Visit } from './visit.ts'

/** Seconds after which another try makes sense. */
const retryAfter: Partial<Record<FaultCode, string>> = {
  EDGE_NOT_READY: '1',
  EDGE_ROUTES_STALE: '5',
  EDGE_DRAINING: '1',
  EDGE_OVERLOADED: '1',
  EDGE_VERIFIER_MISSING: '30',
  EDGE_TOO_MANY_ATTEMPTS: '30',
}

/**
 * Answers a request with a fault. When a part of a response is already out, the connection is broken instead: a client must never
 * take half an answer for a whole one.
 * @param detail shown to the client; '' means the fault's own text
 */
export function refuse(visit: Visit, code: FaultCode, detail: string, draining: boolean): void {
  const { response } = visit
  visit.code = code
  if (response === null) return refuseUpgrade(visit, code, detail)
  if (response.headersSent) return breakOff(visit.socket, visit.peer)
  const status = faults[code].status
  visit.status = status
  const { type, body } = render(visit, code, detail)
  const headers = faultHeaders(visit, code, type, body)
  // A malformed request has no certain end, and a client that waits for 100 Continue may or may not send its body now: whatever
  // follows could be taken for a request that nobody sent (RFC 9112 §11.2, RFC 9110 §10.1.1).
  if (code === 'EDGE_BAD_REQUEST' || visit.awaitsContinue || draining) {
    visit.peer.closing = true
    headers.push('connection', 'close')
  }
  // With the phrase: one of the sandbox's may have been set by an attempt that failed.
  response.writeHead(status, STATUS_CODES[status], headers)
  response.end(body)
}

/** ms a client has to take a refused upgrade and close. */
const lingerMs = 1_000

/** The same for a request whose response object Node has already handed over to us as a bare socket. */
function refuseUpgrade(visit: Visit, code: FaultCode, detail: string): void {
  const { socket } = visit
  const status = faults[code].status
  visit.status = status
  const { type, body } = render(visit, code, detail)
  let head = `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\n`
  const headers = faultHeaders(visit, code, type, body)
  for (let i = 0; i < headers.length; i += 2) head += `${headers[i]}: ${headers[i + 1]}\r\n`
  socket.end(`${head}connection: close\r\n\r\n${body}`)
  // Reads on, so that the client's end is seen and no unread byte turns ours into a reset.
  socket.resume()
  const timer = setTimeout(() => socket.destroy(), lingerMs)
  socket.once('close', () => clearTimeout(timer))
}

function faultHeaders(visit: Visit, code: FaultCode, type: string, body: string): string[] {
  const headers = ['content-type', type, 'content-length', String(Buffer.byteLength(body)), 'x-content-type-options', 'nosniff', 'cache-control', 'no-store']
  if (visit.requestId !== '') headers.push('x-request-id', visit.requestId)
  // A 405 has to name some (RFC 9110 §15.5.6).
  if (code === 'EDGE_METHOD_NOT_ALLOWED') headers.push('allow', 'GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS')
  const wait = retryAfter[code]
  if (wait !== undefined) headers.push('retry-after', wait)
  return headers
}

function render(visit: Visit, code: FaultCode, detail: string): { type: string; body: string } {
  const form = bestForm(visit.request.headers.accept ?? '')
  const { text, next, status } = faults[code]
  const message = detail === '' ? text : detail
  if (form === 'page') return { type: 'text/html; charset=utf-8', body: page(status, code, message, next, visit.requestId) }
  if (form === 'json') return { type: 'application/json', body: `${JSON.stringify({ code, message, next, request_id: visit.requestId })}\n` }
  // A failed WebSocket dial is answered like this by the original.
  if (visit.response === null && status === 503 && code === 'EDGE_NOT_READY' && detail === '') return { type: 'text/plain; charset=utf-8', body: 'Service Unavailable\n' }
  return { type: 'text/plain; charset=utf-8', body: `OpenSandbox Ingress: ${message}\n` }
}

/** What the client would rather have of what we can say; text when it does not mind (RFC 9110 §12.5.1). */
function bestForm(accept: string): 'page' | 'json' | 'text' {
  let best: 'page' | 'json' | 'text' = 'text'
  let weight = 0
  for (const item of accept.toLowerCase().split(',')) {
    const [type = '', ...parameters] = item.split(';').map((part) => part.trim())
    const form = type === 'text/html' ? 'page' : type.endsWith('json') ? 'json' : type === 'text/plain' ? 'text' : null
    const asked = Number(parameters.find((part) => part.startsWith('q='))?.slice(2) ?? 1)
    if (form !== null && asked > weight) [best, weight] = [form, asked]
  }
  return best
}

/** Light and dark, narrow and wide. No picture, font or script: a page that must always work fetches nothing. */
const style = ':root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:18vh auto 2rem;padding:0 1.5rem;overflow-wrap:anywhere}header,footer{font-size:.875rem;opacity:.7}h1{font-size:1.6rem;line-height:1.25;margin:.25rem 0 .75rem}h1::first-letter,p::first-letter{text-transform:uppercase}footer{margin-top:2.5rem;padding-top:.75rem;border-top:1px solid #8886}code{font:.8125rem ui-monospace,monospace}'

function page(status: number, code: FaultCode, message: string, next: string, requestId: string): string {
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><title>${status} ${STATUS_CODES[status]}</title><style>${style}</style></head>
<body><header>${status} ${STATUS_CODES[status]}</header><main><h1>${escapeHtml(message)}</h1><p>${escapeHtml(next)}</p></main><footer><code>${code}</code> · request <code>${escapeHtml(requestId)}</code></footer></body></html>
`
}

function escapeHtml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;')
}
