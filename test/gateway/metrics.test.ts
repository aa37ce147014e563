/** Every kind of request ends in the counters that OSEP-0010 names for it, under the label it names. */
import t from 'tap'
import { freePort } from '#test/support/program.ts'
import { ask, eventually, get, RawClient, startGateway, startHttp } from './support.ts'

t.test('each outcome is counted where an operator looks for it', async (t) => {
  await using upstream = await startHttp((_request, response) => response.end('ok'), (server) => {
    server.on('upgrade', (_request, socket) => socket.end('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n'))
  })
  const closed = await freePort()
  await using gateway = await startGateway([{ id: 'up' }, { id: 'paused', state: 'Paused' }], { mode: 'uri' })
  const requests = [
    get(`/up/${upstream.port}/`), get(`/up/${upstream.port}/`).replace('GET', 'HEAD'), //        success, relayed
    get(`/up/${closed}/`), //                                                                    success, and nothing listens
    get('/paused/80/'), get('/nobody/80/'), get('/up/http/'), get('/status.ok'), //               not_ready, not_found, error, none
  ]
  for (const request of requests) await ask(gateway.port, request)
  const client = new RawClient(gateway.port).send(`GET /up/${upstream.port}/ HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n`)
  await client.untilClosed()
  client.close()
  await eventually(() => gateway.lines.length === requests.length + 1, 'all ended')

  const seconds = (): number => (process.cpuUsage().user + process.cpuUsage().system) / 1e6
  const before = seconds()
  const lines = (await gateway.gateway.metrics.registry.metrics()).split('\n')
  const after = seconds()
  const expected = [
    'ingress_http_request_count{method="GET",status_code="200",proxy_type="http"} 2',
    'ingress_http_request_count{method="HEAD",status_code="200",proxy_type="http"} 1',
    'ingress_http_request_count{method="GET",status_code="502",proxy_type="http"} 1',
    'ingress_http_request_count{method="GET",status_code="503",proxy_type="http"} 1',
    'ingress_http_request_count{method="GET",status_code="404",proxy_type="http"} 1',
    'ingress_http_request_count{method="GET",status_code="400",proxy_type="http"} 1',
    'ingress_http_request_count{method="GET",status_code="101",proxy_type="websocket"} 1',
    'ingress_http_request_duration_seconds_count{method="GET",proxy_type="http"} 6',
    'ingress_http_request_duration_seconds_bucket{le="+Inf",method="GET",proxy_type="http"} 6',
    'ingress_http_request_duration_seconds_count{method="GET",proxy_type="websocket"} 1',
    'ingress_routing_resolutions_count{result="success"} 4',
    'ingress_routing_resolutions_count{result="not_ready"} 1',
    'ingress_routing_resolutions_count{result="not_found"} 1',
    'ingress_routing_resolutions_count{result="error"} 1',
    'ingress_routing_resolution_duration_seconds_count 7',
    'ingress_proxy_http_requests_total 2',
    'ingress_proxy_websocket_connections_total 1',
    'sallyport_gateway_upgraded_connections 0',
  ]
  for (const line of expected) t.ok(lines.includes(line), line)
  const sum = Number(lines.find((line) => line.startsWith('ingress_routing_resolution_duration_seconds_sum '))?.split(' ')[1])
  t.ok(sum > 0 && sum < 1, `seven lookups took ${sum} s`)
  const valueOf = (name: string): number => Number(lines.find((line) => line.startsWith(`${name} `))?.split(' ')[1])
  const [memory, cpu] = [valueOf('ingress_system_memory_usage_bytes'), valueOf('ingress_system_cpu_usage')]
  const resident = process.memoryUsage.rss()
  t.ok(memory > resident / 2 && memory < resident * 2, `${memory} bytes, of ${resident} resident ones`)
  t.ok(cpu >= before && cpu <= after, `${cpu} CPU seconds, between ${before} and ${after}`)
  t.notMatch(lines.join('\n'), /paused|nobody/, 'and no sandbox is named')
})
