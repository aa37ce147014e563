/** The engine's lines, in the order Docker 20.10 sends them, and the sentence they make. */
import t from 'tap'
import { PullProgress, type PullLine } from '../../server/pull-progress.ts'

const mb = 1_000_000
const lines: [line: PullLine, said: string][] = [
  [{}, 'asking the registry'],
  [{ status: 'Pulling from library/debian', id: 'bookworm' }, 'asking the registry'],
  [{ status: 'Pulling fs layer', id: 'a' }, '0 of 1 layers are here'],
  [{ status: 'Pulling fs layer', id: 'b' }, '0 of 2 layers are here'],
  [{ status: 'Already exists', id: 'c' }, '1 of 3 layers are here'],
  [{ status: 'Waiting', id: 'b' }, '1 of 3 layers are here'],
  [{ status: 'Downloading', id: 'a', progressDetail: { current: 10 * mb, total: 30 * mb } }, '1 of 3 layers are here, 10 of 30 MB'],
  [{ status: 'Downloading', id: 'b', progressDetail: { current: 1, total: 5 * mb } }, '1 of 3 layers are here, 11 of 35 MB'],
  [{ status: 'Verifying Checksum', id: 'a' }, '1 of 3 layers are here, 31 of 35 MB'],
  [{ status: 'Download complete', id: 'a' }, '1 of 3 layers are here, 31 of 35 MB'],
  [{ status: 'Extracting', id: 'a', progressDetail: { current: 1, total: 30 * mb } }, '1 of 3 layers are here, 31 of 35 MB'],
  [{ status: 'Pull complete', id: 'a' }, '2 of 3 layers are here, 31 of 35 MB'],
  [{ status: 'Download complete', id: 'b' }, '2 of 3 layers are here, 35 of 35 MB'],
  [{ status: 'Pull complete', id: 'b' }, '3 of 3 layers are here, 35 of 35 MB'],
  [{ status: 'Digest: sha256:0123' }, '3 of 3 layers are here, 35 of 35 MB'],
  [{ status: 'Retrying in 5 seconds at registry.internal', id: 'b' }, '3 of 3 layers are here, 35 of 35 MB'],
]
const progress = new PullProgress()
for (const [line, said] of lines) t.equal(progress.take(line), said, `${line.status} ${line.id}`)
