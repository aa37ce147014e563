/**
 * Runs in namespaces of its own (see engine.test.ts), where the default socket, pid files and data folder of Docker are private: starts an engine
 * by our set-up, kills it in several ways, starts it again, and prints what it saw as one line of JSON.
 */
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { callEngine } from '../../deploy/engine-api.ts'
import { answers, engineAddress, ensureEngine } from '../../deploy/engine.mjs'

const [logFile = ''] = process.argv.slice(2)
const pidFile = '/var/run/docker.pid'
const containerdPidFile = '/var/run/docker/containerd/containerd.pid'
const address = engineAddress(undefined)

const readPid = (file: string): number => Number.parseInt(readFileSync(file, 'utf8'), 10)

async function ensure(): Promise<string[]> {
  const said: string[] = []
  await ensureEngine({ dockerHost: undefined, logFile, say: (text) => said.push(text) })
  return said
}

async function kill(...files: string[]): Promise<void> {
  const pids = files.map(readPid)
  for (const pid of pids) process.kill(pid, 'SIGKILL')
  for (const pid of pids) while (isAlive(pid)) await delay(20)
}

function isAlive(pid: number): boolean {
  try {
    return !/^State:\s*Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false
  }
}

async function networkNames(): Promise<string[]> {
  const { text } = await callEngine({ path: '/networks' })
  return (JSON.parse(text) as { Name: string }[]).map(({ Name }) => Name)
}

const seen: Record<string, unknown> = {}
seen['before'] = await answers(address)
seen['first'] = await ensure()
seen['session'] = readFileSync(`/proc/${readPid(pidFile)}/stat`, 'utf8').replace(/^.*\) /, '').split(' ')[3] === String(readPid(pidFile))
seen['again'] = await ensure()
await callEngine({ method: 'POST', path: '/networks/create', body: Buffer.from(JSON.stringify({ Name: 'left-behind' })) })

await kill(pidFile)
seen['killed'] = await answers(address)
seen['afterKill'] = await ensure()
seen['network'] = (await networkNames()).includes('left-behind')

await kill(pidFile, containerdPidFile)
// By now the numbers belong to somebody else.
writeFileSync(pidFile, String(process.pid))
writeFileSync(containerdPidFile, String(process.pid))
seen['afterForeignPid'] = await ensure()
seen['alive'] = await answers(address)

await kill(pidFile, containerdPidFile)
rmSync('/var/run/docker.sock')
writeFileSync(pidFile, '')
seen['afterNoSocket'] = await ensure()
await kill(pidFile, containerdPidFile)
console.log(JSON.stringify(seen))
