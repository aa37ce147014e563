/**
 * Workers share a port by SO_REUSEPORT, and so would a second gateway, without a word: half of the requests would end up with a program
 * that knows nothing of them. Whoever starts workers therefore asks for the port alone first, and keeps a name that only one may have.
 */
import { once } from 'node:events'
import { createServer, type ListenOptions, type Server } from 'node:net'

/**
 * Gone with the process, whatever ends it.
 * @returns gives the claim up; workers that still listen keep the port from others
 * @throws with syscall `listen` when somebody listens there, or is about to
 */
export async function claimPort(port: number, host: string): Promise<() => void> {
  // A socket in the abstract namespace (unix(7)): as wide as the port, which is one network namespace, and no file to leave behind.
  const claim = await listenOn({ path: `\0sallyport-gateway ${host} ${port}` }).catch((error: unknown) => {
    if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error
    throw Object.assign(new Error(`port ${port} belongs to another gateway`), { syscall: 'listen' })
  })
  claim.unref()
  // Other addresses that overlap with ours, and other programs.
  try {
    const probe = await listenOn({ port, ...(host === '' ? {} : { host }), exclusive: true })
    probe.close()
    await once(probe, 'close')
  } catch (error) {
    claim.close()
    throw error
  }
  return () => void claim.close()
}

async function listenOn(options: ListenOptions): Promise<Server> {
  const server = createServer((socket) => socket.destroy()).listen(options)
  await once(server, 'listening')
  return server
}
