/** Brings reports of used sandboxes to the lifecycle server. */
import { request as httpRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest } from 'node:https'
import { renewalsPath, type Renewals } from '#policies/wire.ts'

const timeout = 5_000

/** Rejects when the server did not answer with 204. @param base URL of the lifecycle server */
export function postRenewals(base: string, token: string, report: Renewals): Promise<void> {
  const root = new URL(base)
  const url = new URL(root.pathname.replace(/\/$/, '') + renewalsPath, root)
  const send = url.protocol === 'https:' ? httpsRequest : httpRequest
  const body = JSON.stringify(report)
  const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }
  return new Promise((resolve, reject) => {
    const request = send(url, { method: 'POST', headers, agent: false, signal: AbortSignal.timeout(timeout) }, (response: IncomingMessage) => {
      response.resume()
      if (response.statusCode === 204) resolve()
      else reject(new Error(`refused with status ${response.statusCode}`))
    })
    request.on('error', reject)
    request.end(body)
  })
}
