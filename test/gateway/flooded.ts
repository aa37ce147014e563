/**
 * A gateway in a process of its own, so that its memory is nobody else's. Says its port; asked anything, it says what it holds when all
 * that can be freed is freed.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { startGateway } from './support.ts'

export type Held = {
  /** Bytes in use, by JavaScript and its buffers. */
  readonly heap: number
  /** Bytes resident beside the JavaScript heap, whose free pages V8 keeps for a while. */
  readonly resident: number
  readonly connections: number
  readonly active: number
  readonly tunnels: number
}

const collect = globalThis.gc as () => void
const { routes, options } = JSON.parse(process.argv[2] as string) as { routes: { id: string }[]; options: object }
const { gateway, port, lines } = await startGateway(routes, options)
// Nobody reads them here.
lines.push = () => 0

process.on('message', () => void held().then((answer) => process.send?.(answer)))
process.send?.(port)

async function held(): Promise<Held> {
  for (let round = 0; round < 3; round++) {
    collect()
    await delay(20)
  }
  const { heapUsed, heapTotal, external, rss } = process.memoryUsage()
  const text = await gateway.metrics.registry.metrics()
  const gauge = (name: string): number => Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(text)?.[1])
  return { heap: heapUsed + external, resident: rss - heapTotal, connections: gauge('sallyport_gateway_client_connections'), active: gauge('sallyport_gateway_requests_in_flight'), tunnels: gauge('sallyport_gateway_upgraded_connections') }
}
