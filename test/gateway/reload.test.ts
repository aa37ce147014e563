/** 100,000 routes from a file change while requests go on: nobody waits for it, and nobody sees half of it. */
import { mkdtempSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { inspect } from 'node:util'
import t from 'tap'
import { readInSlices } from '../../gateway/providers/json-slices.ts'
import { StaticProvider } from '../../gateway/providers/static.ts'
import { RouteTable } from '../../gateway/routes.ts'
import { ask, eventually, get, startGateway, startHttp, statusOf } from './support.ts'

const count = 100_000

/** Every sandbox has a new address in every generation, but for the first and the last one. */
function fileOf(generation: number): string {
  const sandboxes = Array.from({ length: count }, (_none, index) => {
    const ends = index === 0 || index === count - 1
    return { id: `550e8400-e29b-41d4-a716-${String(index).padStart(12, '0')}`, host: ends ? '127.0.0.1' : `10.${generation}.${index >> 8 & 255}.${index & 255}`, secureAccessToken: `token-${index}`, epoch: generation }
  })
  return JSON.stringify({ sandboxes })
}

t.test('a reload of 100,000 routes under a steady client', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'reload-'))
  const path = join(folder, 'routes.json')
  const write = (text: string): void => {
    writeFileSync(`${path}.new`, text)
    renameSync(`${path}.new`, path)
  }
  const problems: string[] = []
  write(fileOf(1))
  await using upstream = await startHttp((_request, response) => response.end('ok'))
  await using gateway = await startGateway([], { mode: 'uri' })
  const { table } = gateway.gateway
  const provider = new StaticProvider({ path, every: 20, onProblem: (problem) => void problems.push(problem) }, table)
  t.teardown(async () => {
    await provider.close()
    rmSync(folder, { recursive: true })
  })
  await provider.start()
  t.equal(table.size, count)
  const first = `550e8400-e29b-41d4-a716-${'0'.padStart(12, '0')}`
  const last = `550e8400-e29b-41d4-a716-${String(count - 1).padStart(12, '0')}`
  const middle = `550e8400-e29b-41d4-a716-${String(count / 2).padStart(12, '0')}`
  const request = get(`/${last}/${upstream.port}/`, `OpenSandbox-Secure-Access: token-${count - 1}`)
  for (let i = 0; i < 50; i++) t.equal(statusOf(await ask(gateway.port, request)), 200)

  const [second, broken] = [fileOf(2), fileOf(3).replace('"10.3.0.9"', '"10.3.0.9:80"')]
  let watching = true
  let asked = 0
  const wrong = new Set<string>()
  /** CPU time of this thread between two turns of its loop, ms: what a request waits for, and not what else this machine does. */
  let longest = 0
  const watch = async (): Promise<void> => {
    for (let before = process.threadCpuUsage(); watching; before = process.threadCpuUsage()) {
      await setImmediate()
      const { user, system } = process.threadCpuUsage(before)
      longest = Math.max(longest, (user + system) / 1000)
      const seen = [first, middle, last].map((id) => table.get(id)?.entry.epoch)
      if (new Set(seen).size !== 1 || table.size !== count) wrong.add(`generations ${seen.join(' ')}, ${table.size} routes`)
    }
  }
  const use = async (): Promise<void> => {
    for (; watching; asked++) {
      const status = statusOf(await ask(gateway.port, request, 20_000))
      if (status !== 200) wrong.add(`status ${status}`)
    }
  }
  write(second)
  const watched = Promise.all([watch(), use()])
  const kept = table.get(last)
  await eventually(() => table.get(first)?.entry.epoch === 2, 'the new file', 60_000)
  t.equal(table.get(last), kept, 'who stays keeps its connections')
  t.equal(table.get(middle)?.entry.host, `10.2.${count / 2 >> 8 & 255}.${count / 2 & 255}`)
  write(broken)
  await eventually(() => problems.length > 0, 'a file with one mistake is told', 60_000)
  write('{"sandboxes":[{"id"')
  await eventually(() => problems.length > 1, 'so is half a file', 60_000)
  watching = false
  await watched
  t.comment(`longest turn ${longest.toFixed(1)} ms, ${asked} requests`)
  t.ok(longest < 250, `no turn of the loop took ${longest} ms`)
  t.ok(asked > 10, `${asked} requests went on`)
  t.same([...wrong], [], 'nobody saw half a table')
  t.match(problems[0], `${path}: sandboxes[9].host: is neither an IP address nor a host name`)
  t.match(problems[1], `${path}: cannot be read: `)
  t.same([problems.length, table.size, table.get(first)?.entry.epoch], [2, count, 2], 'a file with a mistake changes nothing')
})

t.test('a replacement that was overtaken says so, and changes nothing', async (t) => {
  const table = new RouteTable(() => false)
  const listOf = (life: string): Map<string, { id: string; host: string; state: 'Running'; lifecycle: string }> => new Map(Array.from({ length: 5_000 }, (_none, n) => [`s${n}`, { id: `s${n}`, host: '10.0.0.1', state: 'Running', lifecycle: life }]))
  const [older, newer] = [table.replace(listOf('1')), table.replace(listOf('2'))]
  t.equal(table.size, 0, 'nothing before all')
  t.same([await older, await newer, table.size, table.get('s0')?.entry.lifecycle, table.get('s4999')?.entry.lifecycle], [false, true, 5_000, '2', '2'])
})

t.test('a list in slices is the list JSON.parse would have given, or no JSON at all', async (t) => {
  const read = (text: string): { slices: number; value: unknown } => {
    const list: unknown[] = []
    let slices = 0
    const steps = readInSlices(Buffer.from(text), 'list')
    for (;;) {
      const step = steps.next()
      if (step.done === true) return { slices, value: slices === 0 ? step.value : Object.assign(step.value as object, { list }) }
      slices++
      list.push(...step.value)
    }
  }
  const filler = (bytes: number): string => JSON.stringify({ s: 'x'.repeat(bytes) })
  const long = `${filler(40_000)},${filler(20_000)},${filler(20_000)},${filler(5)}`
  for (const [text, slices] of [
    ['{"list":[]}', 1], ['{"list":[1,"a",null,{"b":[2,[3]]}]}', 1], ['  { "a" : [ {"list":[1]} ], "list"\n:\t[ 1 , 2 ] , "z" : {} }  ', 1],
    [String.raw`{"a\"list":[7],"b":"\"list\":[","list":["]","}",",","\\",{"\\":"\""}]}`, 1], ['{"ä":"€","list":["ü","😀"]}', 1],
    [`{"list":[${long}]}`, 3], [`{"list":[${long} ${' '.repeat(40_000)}],"n":1}`, 3], ['{"list":5}', 0], ['{"other":[1]}', 0], ['null', 0], ['[{"list":[1]}]', 0], ['{"list":[[],{},[[[]]]]}', 1],
  ] as const) {
    const got = read(text)
    t.same([got.slices, got.value], [slices, JSON.parse(text)], text.slice(0, 60))
  }
  for (const text of [
    '', '{', '{"list":[', '{"list":[1', '{"list":[1}', '{"list":[1]', '{"list":[1]]}', '{"list":[1}}', '{"list":[,]}', '{"list":[1,]}', '{"list":[,1]}', '{"list":[1,,2]}', '{"list":["a]}', '{"list":["a\\"]}', '{"list" [1]}', '{"list"::[1]}', '["list":[1]]', '{"a" 1,"list":[1]}', '{"list":[1] 2}', '{"list":[01]}',
    `{"list":[${long},]}`, `{"list":[${long},,1]}`, `{"list":[${' '.repeat(40_000)},1]}`, `{"list":[${long}`, `{"list":[${long},{]}`, '\ufeff{"list":[1]}',
  ]) {
    t.throws(() => JSON.parse(text), SyntaxError, `no JSON: ${text.slice(0, 60)}`)
    t.throws(() => read(text), SyntaxError, text.slice(0, 60))
  }
  t.throws(() => read(`{"list":[${long},1 2]}`), { message: "after the first 3 of list: Expected ',' or ']' after array element in JSON" }, 'it says where, and what is missing')
})

t.test('what is wrong with a file is told without a word of it: a token may stand there', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'secret-'))
  const path = join(folder, 'routes.json')
  const table = new RouteTable(() => false)
  const provider = new StaticProvider({ path, every: 1_000, onProblem: () => undefined }, table)
  t.teardown(async () => {
    await provider.close()
    rmSync(folder, { recursive: true })
  })
  const [token, list] = ['s3cr3t-t0k3n', '{"id":"a","host":"10.0.0.1","secureAccessToken":']
  const rows: [text: string, wanted: string][] = [
    [`{"sandboxes":[${list}${token}}]}`, 'after the first 0 of sandboxes: is not JSON'],
    [`{"sandboxes":[${list}"${token}",}]}`, 'after the first 0 of sandboxes: Expected double-quoted property name in JSON'],
    [`{"sandboxes":[${list}"" "${token}"}]}`, "after the first 0 of sandboxes: Expected ',' or '}' after property value in JSON"],
    [`{"sandboxes":[${list}x" ${token} at position 1"}]}`, 'after the first 0 of sandboxes: is not JSON'],
    [`{"sandboxes":[],"more":${token}}`, 'around the list of sandboxes: is not JSON'],
    [`{"sandboxes" [${list}${token}}]}`, "Expected ':' after property name in JSON"],
    [token, 'is not JSON'],
    [`"${token}`, 'Unterminated string in JSON'],
    ['', 'Unexpected end of JSON input'],
    [`{"sandboxes":[${list}["${token}"]}]}`, 'sandboxes[0].secureAccessToken'],
    [`{"sandboxes":[${list}"${token}","state":"${token}"}]}`, 'sandboxes[0].state'],
  ]
  for (const [text, wanted] of rows) {
    writeFileSync(path, text)
    const error = (await provider.start().then(() => null, (problem: unknown) => problem)) as Error
    t.ok(error.message.includes(wanted), `${text}: ${error.message}`)
    t.notOk(inspect(error, { depth: Infinity, showHidden: true }).includes(token.slice(0, 3)), `${text}: nothing of it, at any depth of the error`)
  }
})
