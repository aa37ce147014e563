import { mkdtempSync, rmSync, statSync } from 'node:fs'
import { DatabaseSync } from 'node:sqlite'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import type { SandboxRecord } from '../../server/group.ts'
import { Store } from '../../server/store.ts'

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
