/**
 * What must survive kill -9: one row per sandbox in SQLite, one transaction per change, written before the call returns. The row exists
 * before the first Docker object of the group does, so whatever is found half-made at the next start can be told from what is complete.
 *
 * What a client was promised of a sandbox that runs (its time, its metadata, a revocation) is synced to disk as well, and with it everything
 * before. How far the making of one has come is not: a power cut ends the sandbox too, and what the engine still has tells the rest. An fsync
 * waits for all that containers write at that moment, and everybody's request with it.
 */
import { closeSync, mkdirSync, openSync } from 'node:fs'
import { dirname } from 'node:path'
import { DatabaseSync, type StatementSync } from 'node:sqlite'
import { ApiError } from './api-error.ts'
import type { SandboxRecord } from './group.ts'

const schemaVersion = 1

/** Facts about the server itself: whose objects are its own, what was proved about sidecars, how far apart its clocks were. */
type Note = 'instance' | 'egress-proof' | 'clock'

export class Store {
  readonly #db: DatabaseSync
  readonly #put: StatementSync
  readonly #delete: StatementSync
  readonly #setNote: StatementSync
  #failed = false
  #synced = true
  /** Rows to delete. */
  readonly #gone = new Set<string>()

  /** Opens or makes the file; `:memory:` for tests. @throws when it is another program's, or a newer version's */
  constructor(path: string) {
    if (path !== ':memory:') {
      mkdirSync(dirname(path), { recursive: true, mode: 0o700 })
      // It holds tokens: made for nobody else before SQLite writes to it (its side files take over the mode).
      closeSync(openSync(path, 'a', 0o600))
    }
    this.#db = new DatabaseSync(path)
    this.#db.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000; PRAGMA wal_autocheckpoint = 200')
    this.#migrate()
    this.#put = this.#db.prepare('INSERT INTO sandboxes (id, record) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record')
    this.#delete = this.#db.prepare('DELETE FROM sandboxes WHERE id = ?')
    this.#setNote = this.#db.prepare('INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value')
  }

  /** Whose objects these are: the configured name, else the one this store knows, else one that is made and kept. */
  instance(configured: string | undefined, make: () => string): string {
    const known = configured ?? this.note('instance')
    if (known !== null) return known
    const made = make()
    this.setNote('instance', made)
    return made
  }

  /** A fact about this server that must survive, null while unknown. */
  note(key: Note): string | null {
    return (this.#db.prepare('SELECT value FROM meta WHERE key = ?').get(key)?.value as string | undefined) ?? null
  }

  setNote(key: Note, value: string): void {
    this.#write(() => this.#setNote.run(key, value))
  }

  all(): SandboxRecord[] {
    return this.#db.prepare('SELECT record FROM sandboxes').all().map((row) => JSON.parse(row.record as string) as SandboxRecord)
  }

  /** @param promised a power cut must not take it @throws ApiError SERVER::STORE_FAILED when the disk does not take it (then nothing has changed) */
  put(record: SandboxRecord, promised = false): void {
    this.#write(() => this.#put.run(record.id, JSON.stringify(record)), promised)
  }

  /** Many records and a note that goes with them: all of it, or nothing. @throws ApiError SERVER::STORE_FAILED */
  putAll(records: readonly SandboxRecord[], key: Note, value: string): void {
    this.#write(() => {
      this.#db.exec('BEGIN IMMEDIATE')
      try {
        for (const record of records) this.#put.run(record.id, JSON.stringify(record))
        this.#setNote.run(key, value)
        this.#db.exec('COMMIT')
      } catch (error) {
        // A full disk may have ended it already.
        if (this.#db.isTransaction) this.#db.exec('ROLLBACK')
        throw error
      }
    })
  }

  /** @throws ApiError SERVER::STORE_FAILED; then it goes with the next write that succeeds here or in `check` */
  delete(id: string): void {
    this.#gone.add(id)
    this.#write(() => this.#deleteGone(), false)
  }

  /** @throws when the file cannot be read any more, or written: that is tried when the last write failed */
  check(): void {
    this.#db.prepare('SELECT count(*) FROM meta').get()
    if (!this.#failed) return
    this.#write(() => {
      this.#db.exec(`PRAGMA user_version = ${schemaVersion}`)
      this.#deleteGone()
    })
  }

  close(): void {
    this.#db.close()
  }

  #migrate(): void {
    const version = Number(this.#db.prepare('PRAGMA user_version').get()?.user_version)
    if (version > schemaVersion) throw new Error(`the store was written by a newer version (schema ${version}, known ${schemaVersion})`)
    if (version === schemaVersion) return
    this.#db.exec(`BEGIN IMMEDIATE;
      CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
      CREATE TABLE IF NOT EXISTS sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
      PRAGMA user_version = ${schemaVersion};
      COMMIT`)
  }

  #deleteGone(): void {
    for (const id of this.#gone) {
      this.#delete.run(id)
      this.#gone.delete(id)
    }
  }

  /** A single statement outside BEGIN is its own transaction. */
  #write(statement: () => unknown, synced = true): void {
    try {
      if (synced !== this.#synced) this.#db.exec(`PRAGMA synchronous = ${synced ? 'FULL' : 'NORMAL'}`)
      this.#synced = synced
      statement()
      this.#failed = false
    } catch (error) {
      this.#failed = true
      throw new ApiError('SERVER::STORE_FAILED', 'The server could not write its store; nothing was changed.', { cause: error })
    }
  }
}
