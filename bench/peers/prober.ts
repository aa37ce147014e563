/**
 * Asks some URLs again and again at a fixed pace and times every answer, in a thread of its own: what the bench does meanwhile does not delay it.
 * Started by `startProber`; ends with a message.
 */
import { Agent, request } from 'node:http'
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'

/** ms between two questions to each URL. */
const pace = 8

type Asked = { readonly urls: readonly string[]; readonly headers: Readonly<Record<string, string>> }
export type Prober = { /** Sorted ms by URL. */ stop(): Promise<readonly Float64Array[]> }

/** @param urls every answer must be 200 */
export async function startProber(urls: readonly string[], headers: Readonly<Record<string, string>>): Promise<Prober> {
  const worker = new Worker(new URL(import.meta.url), { workerData: { urls, headers } satisfies Asked })
  await new Promise<void>((resolve, reject) => worker.once('error', reject).once('message', () => resolve()))
  return {
    stop: () => new Promise((resolve, reject) => {
      worker.once('error', reject).once('message', (found: readonly number[][] | string) => {
        if (typeof found === 'string') reject(new Error(found))
        else resolve(found.map((times) => Float64Array.from(times).sort()))
      })
      worker.postMessage('stop')
    }),
  }
}

if (!isMainThread) probe(workerData as Asked)

function probe({ urls, headers }: Asked): void {
  const agent = new Agent({ keepAlive: true })
  const times = urls.map((): number[] => [])
  let fault = ''
  let open = 0
  const ask = (index: number): void => {
    const begin = performance.now()
    open++
    request(urls[index]!, { agent, headers }, (answer) => {
      if (answer.statusCode !== 200) fault = `${urls[index]} answered ${answer.statusCode}`
      answer.resume().on('end', () => { open--; times[index]!.push(performance.now() - begin) })
    }).on('error', (error) => { open--; fault = `${urls[index]}: ${error.message}` }).end()
  }
  const timer = setInterval(() => { for (const index of urls.keys()) ask(index) }, pace)
  parentPort!.once('message', () => {
    clearInterval(timer)
    const drained = setInterval(() => {
      if (open > 0) return
      clearInterval(drained)
      agent.destroy()
      parentPort!.postMessage(fault === '' ? times : fault)
    }, 5)
  })
  // Connections and code are warm from here on.
  for (const index of urls.keys()) ask(index)
  const warm = setInterval(() => {
    if (open > 0) return
    clearInterval(warm)
    for (const list of times) list.length = 0
    parentPort!.postMessage('ready')
  }, 5)
}
