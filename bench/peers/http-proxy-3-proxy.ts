/** Reference row: http-proxy-3 with a keep-alive agent and nothing else. `node http-proxy-3-proxy.ts <port> <backend port>`. */
import { Agent, createServer } from 'node:http'
import { createProxyServer } from 'http-proxy-3'

const [port, backendPort] = process.argv.slice(2).map(Number)
const proxy = createProxyServer({ target: `http://127.0.0.1:${backendPort}`, agent: new Agent({ keepAlive: true, maxSockets: 64 }) })
proxy.on('error', (_error, _request, response) => { response.end() })
createServer((request, response) => { proxy.web(request, response) }).listen(port, '127.0.0.1')
