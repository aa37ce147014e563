/**
 * Finds a Docker engine, or starts one and leaves it running. Plain JavaScript for Node 20, used by setup.mjs before anything is installed.
 */
import { spawn, spawnSync } from 'node:child_process'
import { accessSync, closeSync, constants, existsSync, openSync, readFileSync, rmSync, statSync } from 'node:fs'
import { request } from 'node:http'
import path from 'node:path'

/** Something the machine lacks; the message says what and what to do. */
export class Unavailable extends Error {}

const defaultSocket = '/var/run/docker.sock'
const startTimeout = 90_000
/** Where Debian keeps programs that are not in an ordinary user's PATH. */
const systemDirectories = ['/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin', '/sbin', '/bin']
/** dockerd refuses to start while a live process has the number in its pid file, whatever that process is by now. */
const pidFiles = { '/var/run/docker.pid': 'dockerd', '/var/run/docker/containerd/containerd.pid': 'containerd' }

/** Whether an engine would have to be started on this machine and its program is missing. Where we may not ask, one is there. */
export async function lacksEngine(dockerHost) {
  const address = engineAddress(dockerHost)
  if (address.socketPath === undefined || findProgram('dockerd') !== undefined) return false
  return (process.getuid() === 0 || !existsSync(address.socketPath)) && !(await answers(address))
}

/**
 * Ready when the engine answers on `DOCKER_HOST` or the default socket. Survives what a killed engine leaves behind: pid files of
 * processes that are gone (or that are somebody else by now), a socket nobody listens on.
 */
export async function ensureEngine({ dockerHost, logFile, say }) {
  const address = engineAddress(dockerHost)
  if (await answers(address)) return say('Docker engine ok, already there')
  if (address.socketPath === undefined) throw new Unavailable(`no Docker engine answers at DOCKER_HOST=${dockerHost}, and a remote one cannot be started from here`)
  refuseWithoutRights(address.socketPath)

  // A system with systemd starts it in its own way.
  const bySystemd = existsSync('/run/systemd/system') && address.socketPath === defaultSocket
  if (bySystemd) spawnSync('systemctl', ['start', 'docker'], { stdio: 'ignore', timeout: startTimeout })
  if (bySystemd && (await waitForAnswer(address, () => undefined, 15_000))) return say('Docker engine started by systemd')
  const running = runningEngine()
  if (running !== undefined && address.socketPath === defaultSocket) {
    say(`Docker engine: process ${running} is starting, waiting for it`)
    if (await waitForAnswer(address, () => (runningEngine() === running ? undefined : 'ended'))) return
    if (runningEngine() === running) throw new Unavailable(`dockerd (process ${running}) runs but does not answer on ${address.socketPath}. End it (kill ${running}) and try again.`)
  }
  await start(address, { logFile, say })
}

async function start(address, { logFile, say }) {
  say('Docker engine: starting dockerd')
  for (const [file, name] of Object.entries(pidFiles)) if (existsSync(file) && processName(readPid(file)) !== name) rmSync(file)
  const output = openSync(logFile, 'a')
  const hosts = address.socketPath === defaultSocket ? [] : ['--host', `unix://${address.socketPath}`]
  const child = spawn(findProgram('dockerd') ?? 'dockerd', hosts, { cwd: '/', detached: true, stdio: ['ignore', output, output], env: engineEnvironment() })
  closeSync(output)
  let ended
  child.once('error', (error) => (ended = error.message))
  child.once('exit', (code, signal) => (ended = `ended with ${signal ?? code}`))
  child.unref()
  if (await waitForAnswer(address, () => ended)) return say(`Docker engine started (process ${child.pid}, log in ${path.relative(process.cwd(), logFile)}); it is left running`)
  throw new Unavailable(`dockerd ${ended ?? `does not answer after ${startTimeout / 1000} s`} (log in ${path.relative(process.cwd(), logFile)}):\n${lastWords(readFileSync(logFile, 'utf8'))}`)
}

/** What dockerd says when it gives up is its last line without a time stamp; failing that, the end of the log. */
function lastWords(log) {
  const lines = log.trimEnd().split('\n')
  return lines.findLast((line) => line.startsWith('failed to start')) ?? lines.slice(-8).join('\n')
}

/** Nothing of npm's environment, and every directory where its own helpers (containerd, iptables, runc) may be. */
function engineEnvironment() {
  const kept = Object.entries(process.env).filter(([name]) => !name.toLowerCase().startsWith('npm_') && name !== 'DOCKER_HOST')
  return { ...Object.fromEntries(kept), PATH: [...systemDirectories, ...(process.env.PATH ?? '').split(':').filter((folder) => !systemDirectories.includes(folder) && !folder.includes('node_modules'))].join(':') }
}

function refuseWithoutRights(socketPath) {
  if (existsSync(socketPath) && statSync(socketPath).isDirectory()) throw new Unavailable(`${socketPath} is a directory (a container was given it while no engine ran). Remove it: rmdir ${socketPath}`)
  if (process.getuid() === 0) return
  try {
    accessSync(socketPath, constants.W_OK)
  } catch (error) {
    if (error.code === 'EACCES') throw new Unavailable(`no right to use ${socketPath}. Run: sudo usermod -aG docker $USER, and log in again; or run as root`)
  }
  throw new Unavailable('no Docker engine is running, and only root can start one. Run: sudo systemctl start docker (Debian: sudo apt-get install -y docker.io)')
}

async function waitForAnswer(address, ended, timeout = startTimeout) {
  for (const deadline = Date.now() + timeout; Date.now() < deadline && ended() === undefined; ) {
    if (await answers(address)) return true
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
  return false
}

/** Whether an engine answers there: one GET /_ping, at most 3 s. */
export function answers(address) {
  return new Promise((resolve) => {
    const ping = request({ ...address, path: '/_ping', timeout: 3000 }, (response) => {
      response.resume()
      resolve(response.statusCode === 200)
    })
    ping.once('timeout', () => ping.destroy())
    ping.once('error', () => resolve(false))
    ping.once('close', () => resolve(false))
    ping.end()
  })
}

/** Where the engine listens, from `DOCKER_HOST` or the default socket, as options of node:http's request. */
export function engineAddress(dockerHost) {
  if (dockerHost === undefined || dockerHost === '') return { socketPath: defaultSocket }
  if (dockerHost.startsWith('unix://')) return { socketPath: dockerHost.slice('unix://'.length) }
  if (!/^(tcp|http):\/\//.test(dockerHost)) throw new Unavailable(`DOCKER_HOST=${dockerHost}: only unix:// and tcp:// are supported`)
  const url = new URL(dockerHost.replace(/^tcp:/, 'http:'))
  return { host: url.hostname, port: url.port === '' ? 2375 : Number(url.port) }
}

function runningEngine() {
  const [file] = Object.keys(pidFiles)
  const pid = readPid(file)
  return processName(pid) === 'dockerd' ? pid : undefined
}

function readPid(file) {
  try {
    return Number.parseInt(readFileSync(file, 'utf8'), 10)
  } catch {
    return undefined
  }
}

/** What process has that number, or undefined. One that has ended counts as gone, also where nobody collects it. */
function processName(pid) {
  try {
    const [, name, state] = /^\d+ \((.*)\) (\S)/s.exec(readFileSync(`/proc/${pid}/stat`, 'utf8'))
    return state === 'Z' || state === 'X' ? undefined : name
  } catch {
    return undefined
  }
}

/** Full path of a program, also where only root's PATH would look. */
export function findProgram(name) {
  const folders = [...(process.env.PATH ?? '').split(':').filter((folder) => folder !== ''), ...systemDirectories]
  return folders.map((folder) => path.join(folder, name)).find((file) => existsSync(file))
}
