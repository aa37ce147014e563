import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { DatabaseSync } from 'node:sqlite'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { request } from 'undici'
import type { SandboxRecord } from '../../server/group.ts'
import { defaultInstance } from '../../server/ids.ts'
import { Store } from '../../server/store.ts'
import { eventually, freePort, startProgram } from '#test/support/program.ts'

const record: SandboxRecord = {
  id: 'a', phase: 'creating', announced: false, reason: null, message: null, createdAt: 1, changedAt: 1, expiresAt: 2, keepUntil: null, image: 'i', entrypoint: ['x'],
  metadata: { k: 'v' }, platform: null, egress: { token: 't', policy: { defaultAction: 'deny', egress: [] } }, secureAccessToken: null, hostPorts: {}, renewExtendSeconds: null,
}

t.test('what is written is there for the next', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-store-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const path = join(folder, 'deep', 'sallyport.db')
  const first = new Store(path)
  t.same(first.all(), [])
  first.put(record)
  first.put({ ...record, phase: 'ready' })
  first.put({ ...record, id: 'b' })
  first.delete('b')
  const instance = first.instance(undefined, () => 'made-once')
  // Not closed: a killed server does not close either.
  const second = new Store(path)
  t.same(second.all(), [{ ...record, phase: 'ready' }])
  t.equal(second.instance(undefined, () => 'made again'), instance)
  t.equal(second.instance('configured', () => 'no'), 'configured')
  t.equal(statSync(join(folder, 'deep')).mode & 0o777, 0o700, 'tokens are for nobody else')
  t.equal(statSync(path).mode & 0o777, 0o600)
  second.close()
  first.close()
})

t.test('a store of a newer version is not touched', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-store-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const path = join(folder, 'a.db')
  const db = new DatabaseSync(path)
  db.exec('PRAGMA user_version = 99')
  db.close()
  t.throws(() => new Store(path), { message: /newer version/ })
})

t.test('a write that fails says so and changes nothing', async (t) => {
  const store = new Store(':memory:')
  store.put(record)
  store.close()
  t.throws(() => store.put(record), { code: 'SERVER::STORE_FAILED', status: 500 })
})

t.test('a name for a server that was given none', async (t) => {
  const name = defaultInstance('/a/store.db', 'machine', 'host')
  t.match(name, /^[0-9a-f]{16}$/)
  t.equal(defaultInstance('/a/b/../store.db', 'machine', 'host'), name)
  t.equal(defaultInstance('a.db', 'machine', 'host'), defaultInstance(join(process.cwd(), 'a.db'), 'machine', 'host'), 'the path is made absolute')
  const others = [defaultInstance('/b/store.db', 'machine', 'host'), defaultInstance('/a/store.db', 'other', 'host'), defaultInstance('/a/store.db', 'machine', 'other')]
  t.equal(new Set([name, ...others]).size, 4, 'another store, machine or host is another server')
  for (const [path, machine] of [['/a/store.db', ''], [':memory:', 'machine']] as const) t.not(defaultInstance(path, machine, 'host'), defaultInstance(path, machine, 'host'), 'what does not tell servers apart makes none the same')
})

t.test('the store is lost: the next server is the same, and one that knew another name keeps it', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sallyport-store-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const [file, path, port] = [join(folder, 'config.toml'), join(folder, 'stores', 'a.db'), await freePort()]
  // Without an engine: only the name counts here.
  writeFileSync(file, `[server]\nhost = "127.0.0.1"\nport = ${port}\napi_key = "k"\n[docker]\nhost_guard = "off"\n[store]\npath = "${path}"\n`)
  const nameOf = async (): Promise<string> => {
    await using server = await startProgram({ args: ['server/main.ts', '--config', file], env: { DOCKER_HOST: `unix://${join(folder, 'none.sock')}` }, seconds: 60, ready: () => request(`http://127.0.0.1:${port}/health`).then(({ body }) => body.dump()).then(() => true) })
    return eventually('it says its name', async () => /"instance":"([^"]+)"/.exec(server.log())?.[1])
  }
  const name = await nameOf()
  t.match(name, /^[0-9a-f]{16}$/)
  rmSync(join(folder, 'stores'), { recursive: true })
  t.equal(await nameOf(), name)
  const store = new Store(path)
  store.setNote('instance', 'made-by-an-older-version')
  store.close()
  t.equal(await nameOf(), 'made-by-an-older-version')
})
