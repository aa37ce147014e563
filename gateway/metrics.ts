/** Every number the gateway counts, in one place. No label ever holds a sandbox id. Names follow OSEP-0010 where it has one. */
import { AggregatorRegistry, Counter, Gauge, Registry, type Metric } from 'prom-client'
import type { FaultCode } from '#policies/fault.ts'
import type { Visit } from './visit.ts'

export type Gauges = { readonly routes: () => number; readonly tunnels: () => number; readonly connections: () => number; readonly active: () => number }

/** What is known of one method of one type: answers by status, and how long they took. */
type Row = { readonly statuses: Float64Array; readonly seconds: Histogram }
type ProxyType = 'http' | 'websocket'

export class Metrics {
  readonly registry = new Registry()
  /** Counted in plain numbers: a labelled counter costs a microsecond a request. */
  readonly #rows = { http: new Map<string, Row>(), websocket: new Map<string, Row>() }
  readonly #resolutions = { success: 0, not_found: 0, not_ready: 0, error: 0 }
  readonly #resolving = new Histogram(resolutionBuckets)
  readonly #refused = new Map<string, number>()
  readonly #relayed = { http: 0, websocket: 0 }

  constructor(gauges: Gauges) {
    const registers = [this.registry]
    const counter = (name: string, help: string, labelNames: string[], fill: (counter: Counter) => void): Counter => new Counter({ name, help, labelNames, registers, collect() { this.reset(); fill(this) } })
    const gauge = (name: string, help: string, read: () => number, aggregator: 'sum' | 'max' = 'sum'): Gauge => new Gauge({ name, help, registers, aggregator, collect() { this.set(read()) } })
    counter('ingress_http_request_count', 'Requests answered', ['method', 'status_code', 'proxy_type'], (requests) => this.#fillRequests(requests))
    counter('sallyport_gateway_refused_count', 'Requests the gateway refused, by fault code', ['code'], (refused) => {
      for (const [code, count] of this.#refused) refused.inc({ code }, count)
    })
    counter('ingress_routing_resolutions_count', 'Route lookups by result', ['result'], (resolutions) => {
      for (const [result, count] of Object.entries(this.#resolutions)) resolutions.inc({ result }, count)
    })
    counter('ingress_proxy_http_requests_total', 'HTTP requests that went to a sandbox', [], (relayed) => relayed.inc(this.#relayed.http))
    counter('ingress_proxy_websocket_connections_total', 'Upgraded connections that stood and ended', [], (relayed) => relayed.inc(this.#relayed.websocket))
    // Every worker has all of them.
    gauge('sallyport_gateway_routes', 'Sandboxes in the route table', gauges.routes, 'max')
    gauge('sallyport_gateway_upgraded_connections', 'Upgraded connections open now', gauges.tunnels)
    gauge('sallyport_gateway_client_connections', 'Client connections open now', gauges.connections)
    gauge('sallyport_gateway_requests_in_flight', 'Requests being relayed now', gauges.active)
    gauge('ingress_system_memory_usage_bytes', 'Resident memory', () => process.memoryUsage.rss())
    gauge('ingress_system_cpu_usage', 'CPU seconds used, user and system', () => {
      const { user, system } = process.cpuUsage()
      return (user + system) / 1e6
    })
    this.registry.registerMetric(histogramMetric('ingress_http_request_duration_seconds', 'Seconds from the request to the end of its response', () => this.#durations()))
    this.registry.registerMetric(histogramMetric('ingress_routing_resolution_duration_seconds', 'Seconds until it was known where a request goes', () => [[{}, this.#resolving]]))
  }

  located(result: 'success' | 'not_found' | 'not_ready' | 'error'): void {
    this.#resolutions[result]++
  }

  /** What never became a request. */
  malformed(code: FaultCode): void {
    this.#refused.set(code, (this.#refused.get(code) ?? 0) + 1)
  }

  /** Called once per request at its end. */
  done(visit: Visit, now: number): void {
    const type = visit.upgraded ? 'websocket' : 'http'
    const { statuses, seconds } = this.#rowOf(type, visit.request.method as string)
    statuses[visit.status] = (statuses[visit.status] as number) + 1
    seconds.add((now - visit.startedAt) / 1000)
    if (visit.locatedAt !== 0) this.#resolving.add((visit.locatedAt - visit.startedAt) / 1000)
    if (visit.upgraded || (visit.response !== null && visit.dialledAt !== 0)) this.#relayed[type]++
    if (visit.code !== '') this.#refused.set(visit.code, (this.#refused.get(visit.code) ?? 0) + 1)
  }

  #rowOf(type: ProxyType, method: string): Row {
    let row = this.#rows[type].get(method)
    if (row === undefined) this.#rows[type].set(method, (row = { statuses: new Float64Array(statusLimit), seconds: new Histogram(requestBuckets) }))
    return row
  }

  #fillRequests(counter: Counter): void {
    for (const [type, methods] of Object.entries(this.#rows)) {
      for (const [method, { statuses }] of methods) {
        for (const [status, count] of statuses.entries()) if (count > 0) counter.inc({ method, status_code: String(status), proxy_type: type }, count)
      }
    }
  }

  #durations(): [Labels, Histogram][] {
    return Object.entries(this.#rows).flatMap(([type, methods]) => [...methods].map(([method, { seconds }]): [Labels, Histogram] => [{ method, proxy_type: type }, seconds]))
  }
}

type Labels = Readonly<Record<string, string>>

/** Counts below each bound, kept as plain numbers. */
class Histogram {
  /** Upper bounds, seconds. */
  readonly bounds: readonly number[]
  /** One for each bound, and one for what is above all. */
  readonly counts: Float64Array
  sum = 0

  constructor(bounds: readonly number[]) {
    this.bounds = bounds
    this.counts = new Float64Array(bounds.length + 1)
  }

  add(seconds: number): void {
    const { bounds, counts } = this
    let bucket = 0
    while (bucket < bounds.length && seconds > (bounds[bucket] as number)) bucket++
    counts[bucket] = (counts[bucket] as number) + 1
    this.sum += seconds
  }
}

/** Histograms as prom-client wants them, written out only when somebody asks. */
function histogramMetric(name: string, help: string, read: () => [Labels, Histogram][]): Metric {
  const get = async (): Promise<unknown> => {
    const values: { value: number; labels: Record<string, string | number>; metricName: string }[] = []
    for (const [labels, { bounds, counts, sum }] of read()) {
      let below = 0
      for (const [index, count] of counts.entries()) {
        below += count
        values.push({ value: below, labels: { le: bounds[index] ?? '+Inf', ...labels }, metricName: `${name}_bucket` })
      }
      values.push({ value: sum, labels, metricName: `${name}_sum` }, { value: below, labels, metricName: `${name}_count` })
    }
    return { name, help, type: 'histogram', values, aggregator: 'sum' }
  }
  return { name, get, reset: () => undefined } as unknown as Metric
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
const requestBuckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
const resolutionBuckets = [0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1]
