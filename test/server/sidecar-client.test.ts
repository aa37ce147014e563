/** What the server makes of a sidecar's answers, and of none. */
import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { SidecarClient } from '../../server/sidecar-client.ts'

const rules = [{ action: 'allow', target: 'a.example' }] as const

/** A stand-in: answers by `METHOD /path`; null hangs up after it has read the request. Other requests are 404, as in an older sidecar. */
async function startSidecar(t: Test, answers: Readonly<Record<string, readonly [status: number, body: unknown] | null>>): Promise<{ client: SidecarClient; asked: string[] }> {
  const asked: string[] = []
  const reply = (response: ServerResponse, [status, body]: readonly [number, unknown]): void => void response.writeHead(status).end(typeof body === 'string' ? body : JSON.stringify(body))
  const server = createServer((request, response) => {
    void request.toArray().then(() => {
      asked.push(`${request.method} ${request.url}`)
      const answer = answers[asked.at(-1) as string]
      if (answer === null) request.socket.destroy()
      else reply(response, answer ?? [404, '404 page not found'])
    })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const client = new SidecarClient(1000, (server.address() as AddressInfo).port)
  t.teardown(async () => {
    await client.close()
    server.closeAllConnections()
    server.close()
  })
  return { client, asked }
}

t.test('a change of whose outcome nobody is told', async (t) => {
  const unsure = /did not answer\. The change may or may not have been made, or may still be: read the policy\.$/
  const cases: [why: string, answers: Parameters<typeof startSidecar>[1], changed: boolean, code: string, message: RegExp][] = [
    ['no answer to a change', { 'PATCH /policy': null }, true, 'SANDBOX::EGRESS_UNAVAILABLE', unsure],
    ['no answer to what came after it', { 'PATCH /policy': [200, {}], 'GET /policy': null }, true, 'SANDBOX::EGRESS_UNAVAILABLE', /did not answer\. The change was made, but could not be read back\.$/],
    ['no answer where nothing was to change', { 'GET /policy': null }, false, 'SANDBOX::EGRESS_UNAVAILABLE', /did not answer\.$/],
    ['the sidecar could not', { 'PATCH /policy': [500, 'failed to apply nftables policy: no memory\n'] }, true, 'SANDBOX::EGRESS_UNAVAILABLE', /could not make the change \(status 500\): failed to apply nftables policy: no memory\. Read the policy/],
    ['the sidecar is not ready', { 'PATCH /policy': [503, 'not ready\n'] }, true, 'SANDBOX::EGRESS_UNAVAILABLE', /\(status 503\): not ready\./],
    ['the sidecar says more than anybody reads', { 'PATCH /policy': [500, 'x'.repeat(10_000)] }, true, 'SANDBOX::EGRESS_UNAVAILABLE', /^.{0,450}$/],
    ['the sidecar refuses', { 'PATCH /policy': [400, 'invalid patch rules: x\n'] }, true, 'SANDBOX::INVALID_PARAMETER', /refuses the rules: invalid patch rules: x$/],
    ['too many rules', { 'PATCH /policy': [413, 'egress rule total count 9 exceeds limit 8\n'] }, true, 'SANDBOX::INVALID_PARAMETER', /exceeds limit 8$/],
  ]
  for (const [why, answers, changed, code, message] of cases) {
    const { client } = await startSidecar(t, answers)
    await t.rejects(client.policy('127.0.0.1', 'token', changed ? rules : null), { code, message }, why)
  }
})

t.test('what is enforced, in the words of the sidecar', async (t) => {
  const policy = { status: 'ok', mode: 'enforcing', enforcementMode: 'dns', policy: { defaultAction: 'deny', egress: rules } }
  const { client, asked } = await startSidecar(t, { 'PATCH /policy': [200, {}], 'GET /policy': [200, policy], 'GET /policy/effective': [200, { floor: ['10.9.0.0/16'] }] })
  t.match(await client.policy('127.0.0.1', 'token', rules), { ...policy, floor: ['10.9.0.0/16'] })
  t.equal(asked[0], 'PATCH /policy', 'changed first, read afterwards')
  const older = await startSidecar(t, { 'GET /policy': [200, policy] })
  t.same((await older.client.policy('127.0.0.1', 'token', null)).floor, [], 'one that knows of no floor has none')
  const broken = await startSidecar(t, { 'GET /policy': [200, policy], 'GET /policy/effective': [503, 'not ready'] })
  await t.rejects(broken.client.policy('127.0.0.1', 'token', null), { code: 'SANDBOX::EGRESS_UNAVAILABLE' })
})
