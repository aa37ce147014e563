/** Options that look right at first: refused by name before anything starts, or taken for what they mean. */
import t from 'tap'
import { ConfigError } from '#policies/config.ts'
import { readGatewayConfig } from '../../gateway/config.ts'
import { start } from './program.ts'
import { ask, bodyOf, get, startGateway, startHttp } from './support.ts'

const problemsOf = (...argv: string[]): string[] => {
  try {
    readGatewayConfig(['--provider', 'server', '--server-token', 't', ...argv], {})
    return []
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    return error.problems.map(({ path }) => path)
  }
}

t.test('a URL of the server that is none', async (t) => {
  for (const [url, problems] of [
    ['http://h:99999', ['--server-url']],
    ['http://h:x', ['--server-url']],
    ['http://a b', ['--server-url']],
    ['http://[::1', ['--server-url']],
    ['http://?x', ['--server-url']],
    ['http://h:8080', []],
    ['https://[::1]:8080/base/', []],
  ] as const) t.same(problemsOf('--server-url', url), problems, url)
  await using program = start('--provider=server', '--server-url=http://user:hidden@h:99999', '--server-token=t', '--port=0')
  t.equal(await program.code, 64)
  t.match(program.output(), /^gateway: --server-url: [^\n]*\n$/, 'one line')
  t.notMatch(program.output(), /hidden/, 'without the password of the URL')
})

t.test('a base domain with a dot at its end', async (t) => {
  for (const [domain, problems] of [['gw.test.', []], ['GW.test', []], ['', []], ['.', ['--base-domain']], ['gw.test..', ['--base-domain']]] as const) {
    t.same(problemsOf('--server-url', 'http://s', '--base-domain', domain), problems, domain)
  }
  await using upstream = await startHttp((_request, response) => response.end('found'))
  await using gateway = await startGateway([{ id: 'a' }], { mode: 'wildcard', baseDomain: 'GW.test.' })
  for (const host of ['gw.test', 'gw.test.', 'gw.test.:80']) t.equal(bodyOf(await ask(gateway.port, get('/').replace('Host: gateway', `Host: a-${upstream.port}.${host}`))), 'found', host)
})
