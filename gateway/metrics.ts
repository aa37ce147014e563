/** Every number the gateway counts, in one place. No label ever holds a sandbox id. Names follow OSEP-0010 where it has one. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client'
import type { Visit } from './visit.ts'

export type Gauges = { readonly routes: () => number; readonly tunnels: () => number; readonly connections: () => number; readonly active: () => number }

export class Metrics {
  readonly registry = new Registry()
  /** Requests by method, status and type, counted in a plain map: a labelled counter costs a microsecond a request. */
  readonly #requests = new Map<string, number>()
  readonly #resolutions = { success: 0, not_found: 0, not_ready: 0, error: 0 }
  readonly #refused = new Map<string, number>()
  readonly #buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
  readonly #durations = { http: new Float64Array(18), websocket: new Float64Array(18) }

  constructor(gauges: Gauges) {
    const registers = [this.registry]
    const requests: Counter = new Counter({ name: 'ingress_http_request_count', help: 'Requests answered', labelNames: ['method', 'status_code', 'proxy_type'], registers, collect: () => this.#fill(requests, this.#requests) })
    const refused: Counter = new Counter({ name: 'sallyport_gateway_refused_count', help: 'Requests the gateway refused, by fault code', labelNames: ['code'], registers, collect: () => this.#fill(refused, this.#refused) })
    const resolutions: Counter = new Counter({
      name: 'ingress_routing_resolutions_count',
      help: 'Route lookups by result',
      labelNames: ['result'],
      registers,
      collect: () => {
        resolutions.reset()
        for (const [result, count] of Object.entries(this.#resolutions)) resolutions.inc({ result }, count)
      },
    })
    const gauge = (name: string, help: string, read: () => number): Gauge => new Gauge({ name, help, registers, collect() { this.set(read()) } })
    gauge('sallyport_gateway_routes', 'Sandboxes in the route table', gauges.routes)
    gauge('ingress_proxy_websocket_connections', 'Upgraded connections open now', gauges.tunnels)
    gauge('sallyport_gateway_client_connections', 'Client connections open now', gauges.connections)
    gauge('sallyport_gateway_requests_in_flight', 'Requests being relayed now', gauges.active)
    gauge('ingress_system_memory_usage_bytes', 'Resident memory', () => process.memoryUsage.rss())
    gauge('ingress_system_cpu_usage', 'CPU seconds used, user and system', () => {
      const { user, system } = process.cpuUsage()
      return (user + system) / 1e6
    })
    this.#histogram(registers)
  }

  located(result: 'success' | 'not_found' | 'not_ready' | 'error'): void {
    this.#resolutions[result]++
  }

  /** Called once per request at its end. */
  done(visit: Visit, now: number): void {
    const type = visit.upgraded ? 'websocket' : 'http'
    const key = `${visit.request.method} ${visit.status} ${type}`
    this.#requests.set(key, (this.#requests.get(key) ?? 0) + 1)
    if (visit.code !== '') this.#refused.set(visit.code, (this.#refused.get(visit.code) ?? 0) + 1)
    const seconds = (now - visit.startedAt) / 1000
    const row = this.#durations[type]
    let bucket = 0
    while (bucket < this.#buckets.length && seconds > (this.#buckets[bucket] as number)) bucket++
    row[bucket] = (row[bucket] as number) + 1
    row[16] = (row[16] as number) + seconds
    row[17] = (row[17] as number) + 1
  }

  #fill(counter: Counter, counts: ReadonlyMap<string, number>): void {
    counter.reset()
    for (const [key, count] of counts) {
      const [first, status, type] = key.split(' ') as [string, string | undefined, string | undefined]
      counter.inc(status === undefined ? { code: first } : { method: first, status_code: status, proxy_type: type as string }, count)
    }
  }

  /** The duration histogram is kept as plain numbers and only written out when somebody asks. */
  #histogram(registers: Registry[]): void {
    const name = 'ingress_http_request_duration_seconds'
    const histogram = new Histogram({ name, help: 'Seconds from the request to the end of its response', labelNames: ['proxy_type'], buckets: this.#buckets, registers })
    const rows = this.#durations
    const buckets = this.#buckets
    histogram.get = async () => {
      const values: { value: number; labels: Record<string, string | number>; metricName: string }[] = []
      for (const [type, row] of Object.entries(rows)) {
        let sum = 0
        buckets.forEach((le, index) => {
          sum += row[index] as number
          values.push({ value: sum, labels: { le, proxy_type: type }, metricName: `${name}_bucket` })
        })
        values.push({ value: row[17] as number, labels: { le: '+Inf', proxy_type: type }, metricName: `${name}_bucket` })
        values.push({ value: row[16] as number, labels: { proxy_type: type }, metricName: `${name}_sum` })
        values.push({ value: row[17] as number, labels: { proxy_type: type }, metricName: `${name}_count` })
      }
      return { name, help: 'Seconds from the request to the end of its response', type: 'histogram', values, aggregator: 'sum' } as never
    }
  }
}
