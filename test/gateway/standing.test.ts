/** Which connections make room for others. */
import { Socket } from 'node:net'
import t from 'tap'
import { Standing } from '../../gateway/standing.ts'

t.test('idle ones only, one for each that comes, and none as long as there is room', async (t) => {
  let most = 3
  const standing = new Standing(() => most)
  const open = (free: boolean): Socket => {
    const socket = new Socket()
    t.teardown(() => socket.destroy())
    standing.add(socket, { free })
    return socket
  }
  const gone = (sockets: readonly Socket[]): string => sockets.map(({ destroyed }) => (destroyed ? 'x' : '-')).join('')
  const sockets = [open(false), open(true), open(true)]
  t.equal(gone(sockets), '---')
  sockets.push(open(false))
  t.equal(gone(sockets).split('x').length, 2, 'the fourth ends one of those that wait')
  await new Promise(setImmediate)
  most = 1
  standing.makeRoom()
  standing.makeRoom()
  standing.makeRoom()
  t.equal(gone(sockets), '-xx-', 'never one in use')
})
