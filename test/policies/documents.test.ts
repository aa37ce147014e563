/** Faults, configuration, static routes and wire names: the tables other programs rely on. */
import t from 'tap'
import Type, { type TSchema } from 'typebox'
import { checkConfig, ConfigError, schemaProblems } from '#policies/config.ts'
import { Fault, faults, toFault } from '#policies/fault.ts'
import { formatProblems } from '#policies/problem.ts'
import { StaticRoutesReader } from '#policies/static-routes.ts'
import { headerNames, labels, sandboxStates } from '#policies/wire.ts'

t.test('faults', async (t) => {
  for (const [code, row] of Object.entries(faults)) {
    t.match(`${row.text} ${row.next}`, /\w+ \w+/, `${code} says what is wrong and what to do next`)
  }
  const rows: [thrown: unknown, code: string][] = [
    [{ code: 'ECONNREFUSED' }, 'EDGE_UPSTREAM_REFUSED'], [{ code: 'UND_ERR_HEADERS_TIMEOUT' }, 'EDGE_UPSTREAM_TIMEOUT'], [{ code: 'HPE_INVALID_CONSTANT' }, 'EDGE_UPSTREAM_BROKEN'], [{ code: 'EMFILE' }, 'EDGE_OVERLOADED'],
    [{ code: 'constructor' }, 'EDGE_BUG'], [{ code: 7 }, 'EDGE_BUG'], [new Error('x'), 'EDGE_BUG'], [null, 'EDGE_BUG'], [undefined, 'EDGE_BUG'], ['x', 'EDGE_BUG'],
  ]
  for (const [thrown, code] of rows) t.equal(toFault(thrown).code, code, String(thrown))
  const fault = new Fault('EDGE_NO_ROUTE', 'sandbox not found: x')
  t.equal(toFault(fault), fault)
  t.match(fault, { status: 404, message: 'sandbox not found: x' })
  t.equal(new Fault('EDGE_BUG').message, 'internal error')
})

t.test('configuration', async (t) => {
  const schema = Type.Object({
    port: Type.Integer({ minimum: 1, default: 8 }), mode: Type.Union([Type.Literal('a'), Type.Literal('b')], { default: 'a' }), only: Type.Optional(Type.Literal('x')),
    host: Type.String({ minLength: 1 }), list: Type.Array(Type.Object({ 'x/y~z': Type.Number() }, { additionalProperties: false }), { default: [] }), flag: Type.Boolean({ default: false }),
  })
  const given = { port: '12', host: 'h', list: [{ 'x/y~z': '3' }], flag: 'true' }
  const config = checkConfig(schema, given)
  t.same(config, { port: 12, mode: 'a', host: 'h', list: [{ 'x/y~z': 3 }], flag: true })
  t.throws(() => { Object.assign(config.list[0] as object, { a: 1 }) }, 'frozen all the way down')
  t.equal(given.port, '12', 'the caller’s value stays')
  try {
    checkConfig(schema, { port: '-3', mode: 'c', only: 'y', list: [{ 'x/y~z': 'q' }, {}, { 'x/y~z': 1, other: 1 }] })
    t.fail('must throw')
  } catch (error) {
    t.ok(error instanceof ConfigError)
    t.same(Object.fromEntries((error as ConfigError).problems.map((p) => [p.path, p.reason])), {
      port: 'must be >= 1', mode: 'must be one of "a", "b"', only: 'must be "x"', host: 'is required', 'list[0].x/y~z': 'must be number', 'list[1].x/y~z': 'is required', 'list[2].other': 'is not a known key',
    })
    t.match((error as ConfigError).message, 'host: is required; ')
  }
  t.throws(() => checkConfig(schema, 7), ConfigError)
  const required: [property: TSchema, reason: string][] = [
    [Type.Union([Type.Literal('a'), Type.Literal('b')]), 'is required: one of "a", "b"'], [Type.Union([Type.Literal('a'), Type.Number()]), 'is required'], [Type.String(), 'is required'],
  ]
  for (const [property, reason] of required) t.same(schemaProblems(Type.Object({ one: property }), {}), [{ path: 'one', reason }])
  t.equal(formatProblems([{ path: '', reason: 'no such file' }]), 'no such file')
})

t.test('static routes', async (t) => {
  const read = (sandboxes: readonly unknown[], document: unknown = { sandboxes: [] }): StaticRoutesReader => {
    const reader = new StaticRoutesReader()
    for (const sandbox of sandboxes) reader.readSandboxes([sandbox])
    reader.readDocument(document)
    return reader
  }
  const good = read([{ id: 'sbx1', host: '127.0.0.1' }, { id: 'p', host: '::1', state: 'Paused', secureAccessToken: 's' }])
  t.same(good.problems, [])
  t.same([...good.routes.values()], [
    { id: 'sbx1', host: '127.0.0.1', state: 'Running', lifecycle: 'static:127.0.0.1' },
    { id: 'p', host: '::1', state: 'Paused', secureAccessToken: 's', lifecycle: 'static:::1' },
  ])
  for (const [document, path] of [[null, ''], [{}, 'sandboxes'], [{ sandboxes: 5 }, 'sandboxes'], [{ sandboxes: [{ id: 'a', host: 'h' }] }, 'sandboxes']] as const) t.equal(read([], document).problems[0]?.path, path, JSON.stringify(document))
  const rows: [sandboxes: unknown[], path: string | undefined][] = [
    [[{ id: 'a' }], 'sandboxes[0].host'], [[{ id: '', host: 'h' }], 'sandboxes[0].id'], [[{ id: 'a', host: 'h' }, 7], 'sandboxes[1]'],
    [[{ id: 'a', host: 'h', state: 'Up' }], 'sandboxes[0].state'], [[{ id: 'a', host: 'h' }, { id: 'a', host: 'i' }], 'sandboxes[1].id'],
    ...['127.0.0.1:80', 'web:80', '[::1]', '[::1]:80', '::1%eth0', 'http://web', 'a b', '10.0.0.0/8', '999.1.1.1', '127.1', '0x7f000001', '.', 'a..b', 'a/b'].map((host): [unknown[], string] => [[{ id: 'a', host }], 'sandboxes[0].host']),
    ...['10.0.0.1', 'fd00::1', '::ffff:10.0.0.1', 'web', 'Web_1.Example.com.', '1st.example'].map((host): [unknown[], undefined] => [[{ id: 'a', host }], undefined]),
  ]
  for (const [sandboxes, path] of rows) t.equal(read(sandboxes).problems[0]?.path, path, JSON.stringify(sandboxes))
  t.equal(read(Array.from({ length: 500 }, () => 0)).problems.length, 100, 'a file of nothing but mistakes is not told in full')
})

t.test('wire names', async (t) => {
  for (const name of Object.values(headerNames)) t.equal(name, name.toLowerCase(), 'header names are lower case, as node:http hands them out')
  t.equal(new Set(Object.values(labels)).size, Object.values(labels).length)
  t.ok(sandboxStates.includes('Running'))
})
