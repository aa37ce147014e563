/**
 * The keeper: a process of its own that holds the lock on the tests' internet, clears what an earlier run left, says `ready`,
 * and removes everything once its standard input ends. The kernel ends it with the test, also after kill -9, so a host route
 * to a metadata address never outlives the test that wanted it.
 */
import { connect, createServer, type Server } from 'node:net'
import { once } from 'node:events'
import { lockName, removeInternet } from './internet-layout.ts'

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => undefined)
const gone = once(process.stdin.resume(), 'end')
const lock = await Promise.race([takeLock(), gone])
if (!Array.isArray(lock)) {
  await removeInternet()
  process.stdout.write('ready\n')
  await gone
  await removeInternet()
  lock.close()
}
process.exit(0)

/** Waits for whoever holds the lock to end; connections to a lock socket are held open until then. */
async function takeLock(): Promise<Server> {
  for (;;) {
    const server = createServer((socket) => socket.on('error', () => undefined).resume())
    const taken = new Promise<boolean>((resolve) => {
      server.once('listening', () => resolve(true))
      server.once('error', () => resolve(false))
    })
    server.listen({ path: lockName })
    if (await taken) return server
    process.stdout.write('waiting\n')
    await new Promise((resolve) => connect(lockName).on('error', () => undefined).on('close', resolve).resume())
  }
}
