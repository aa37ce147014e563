/** Every number the gateway counts, in one place. No label ever holds a sandbox id. Names follow OSEP-0010 where it has one. */
import { AggregatorRegistry, Counter, Gauge, Registry, type Metric } from 'prom-client'
import type { FaultCode } from '#policies/fault.ts'
import type { Visit } from './visit.ts'

export type Gauges = { readonly routes: () => number; readonly tunnels: () => number; readonly connections: () => number; readonly active: () => number }

export class Metrics {
  readonly registry = new Registry()
  /** Requests by type, method and status, counted in plain numbers: a labelled counter costs a microsecond a request. */
  readonly #requests = { http: new Map<string, Float64Array>(), websocket: new Map<string, Float64Array>() }
  readonly #resolutions = { success: 0, not_found: 0, not_ready: 0, error: 0 }
  readonly #refused = new Map<string, number>()
  readonly #durations = { http: new Float64Array(countAt + 1), websocket: new Float64Array(countAt + 1) }

  constructor(gauges: Gauges) {
    const registers = [this.registry]
    const requests: Counter = new Counter({ name: 'ingress_http_request_count', help: 'Requests answered', labelNames: ['method', 'status_code', 'proxy_type'], registers, collect: () => this.#fillRequests(requests) })
    const refused: Counter = new Counter({
      name: 'sallyport_gateway_refused_count',
      help: 'Requests the gateway refused, by fault code',
      labelNames: ['code'],
      registers,
      collect: () => {
        refused.reset()
        for (const [code, count] of this.#refused) refused.inc({ code }, count)
      },
    })
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
    const gauge = (name: string, help: string, read: () => number, aggregator: 'sum' | 'max' = 'sum'): Gauge => new Gauge({ name, help, registers, aggregator, collect() { this.set(read()) } })
    // Every worker has all of them.
    gauge('sallyport_gateway_routes', 'Sandboxes in the route table', gauges.routes, 'max')
    gauge('ingress_proxy_websocket_connections', 'Upgraded connections open now', gauges.tunnels)
    gauge('sallyport_gateway_client_connections', 'Client connections open now', gauges.connections)
    gauge('sallyport_gateway_requests_in_flight', 'Requests being relayed now', gauges.active)
    gauge('ingress_system_memory_usage_bytes', 'Resident memory', () => process.memoryUsage.rss())
    gauge('ingress_system_cpu_usage', 'CPU seconds used, user and system', () => {
      const { user, system } = process.cpuUsage()
      return (user + system) / 1e6
    })
    this.registry.registerMetric(this.#durationMetric())
  }

  located(result: 'success' | 'not_found' | 'not_ready' | 'error'): void {
    this.#resolutions[result]++
  }

  /** Bytes that never became a request. */
  malformed(code: FaultCode): void {
    this.#refused.set(code, (this.#refused.get(code) ?? 0) + 1)
  }

  /** Called once per request at its end. */
  done(visit: Visit, now: number): void {
    const type = visit.upgraded ? 'websocket' : 'http'
    const method = visit.request.method as string
    let statuses = this.#requests[type].get(method)
    if (statuses === undefined) this.#requests[type].set(method, (statuses = new Float64Array(statusLimit)))
    statuses[visit.status] = (statuses[visit.status] as number) + 1
    if (visit.code !== '') this.#refused.set(visit.code, (this.#refused.get(visit.code) ?? 0) + 1)
    const seconds = (now - visit.startedAt) / 1000
    const row = this.#durations[type]
    let bucket = 0
    while (bucket < buckets.length && seconds > (buckets[bucket] as number)) bucket++
    row[bucket] = (row[bucket] as number) + 1
    row[sumAt] = (row[sumAt] as number) + seconds
    row[countAt] = (row[countAt] as number) + 1
  }

  #fillRequests(counter: Counter): void {
    counter.reset()
    for (const [type, methods] of Object.entries(this.#requests)) {
      for (const [method, statuses] of methods) {
        for (const [status, count] of statuses.entries()) if (count > 0) counter.inc({ method, status_code: String(status), proxy_type: type }, count)
      }
    }
  }

  /** The duration histogram: kept as plain numbers, written out only when somebody asks. */
  #durationMetric(): Metric {
    const name = 'ingress_http_request_duration_seconds'
    const help = 'Seconds from the request to the end of its response'
    const get = async (): Promise<unknown> => {
      const values: { value: number; labels: Record<string, string | number>; metricName: string }[] = []
      for (const [type, row] of Object.entries(this.#durations)) {
        let sum = 0
        for (const [index, le] of buckets.entries()) {
          sum += row[index] as number
          values.push({ value: sum, labels: { le, proxy_type: type }, metricName: `${name}_bucket` })
        }
        values.push({ value: row[countAt] as number, labels: { le: '+Inf', proxy_type: type }, metricName: `${name}_bucket` })
        values.push({ value: row[sumAt] as number, labels: { proxy_type: type }, metricName: `${name}_sum` })
        values.push({ value: row[countAt] as number, labels: { proxy_type: type }, metricName: `${name}_count` })
      }
      return { name, help, type: 'histogram', values, aggregator: 'sum' }
    }
    return { name, get, reset: () => undefined } as unknown as Metric
  }
}

/** What one process counted, as data that can be sent to another. */
export type Counted = Awaited<ReturnType<Registry['getMetricsAsJSON']>>
export const metricsType = Registry.PROMETHEUS_CONTENT_TYPE

export function addCounts(counts: Counted[]): Promise<Counted> {
  return AggregatorRegistry.aggregate(counts).getMetricsAsJSON()
}

/** The sum as Prometheus text. */
export function textOfCounts(counts: Counted[]): Promise<string> {
  return AggregatorRegistry.aggregate(counts).metrics()
}

/** Statuses are below this; 0 stands for requests that ended without one. */
const statusLimit = 1000
/** Upper bounds, seconds. */
const buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
/** Behind the buckets and their overflow stand the sum and the count. */
const sumAt = buckets.length + 1
const countAt = buckets.length + 2
