/**
 * Makes a machine ready for one of our commands: `node deploy/setup.mjs demo|start|test|bench|check`. Plain JavaScript that Node 20 runs,
 * because Node 24 comes with the npm packages that this file installs; so it is called from pre… scripts only. Each step looks first and
 * does nothing when there is nothing to do. Exit 69 (unavailable) with one message when a step needs a hand.
 */
import { spawnSync } from 'node:child_process'
import { accessSync, closeSync, constants, existsSync, mkdirSync, openSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { ensureEngine, findProgram, lacksEngine, Unavailable } from './engine.mjs'

const top = path.dirname(path.dirname(fileURLToPath(import.meta.url)))
const cache = path.join(top, '.cache')

/**
 * What each command needs. `programs` maps a program to its Debian package. A test run goes on without what it cannot get: the tests
 * that need it say so themselves.
 */
const network = { nft: 'nftables', iptables: 'iptables', ip: 'iproute2' }
const needs = {
  check: { programs: {}, engine: false, images: [], soft: false },
  start: { programs: network, engine: true, images: ['sandbox', 'egress'], soft: false },
  demo: { programs: { ...network, curl: 'curl' }, engine: true, images: ['sandbox', 'egress'], soft: false },
  test: { programs: { ...network, curl: 'curl', python3: 'python3', sysctl: 'procps' }, engine: true, images: ['sandbox', 'egress'], soft: true },
  bench: { programs: { ...network, curl: 'curl' }, engine: true, images: ['sandbox', 'egress'], soft: false },
}

await main(process.argv[2])

async function main(command) {
  const need = Object.hasOwn(needs, command ?? '') ? needs[command] : undefined
  if (need === undefined) return stop(64, `usage: node deploy/setup.mjs ${Object.keys(needs).join('|')}`)
  try {
    ensureCache()
    const unlock = await lock()
    try {
      ensureNpmPackages()
      if (need.engine) await ensureMachine(need)
    } finally {
      unlock()
    }
  } catch (error) {
    if (!(error instanceof Unavailable)) throw error
    stop(69, error.message)
  }
}

function ensureCache() {
  try {
    mkdirSync(cache, { recursive: true })
    accessSync(cache, constants.W_OK)
  } catch (error) {
    if (!['EACCES', 'EPERM', 'EROFS'].includes(error.code)) throw error
    throw new Unavailable(`no right to write in ${cache}. Run: sudo chown -R $USER ${top}; or run as its owner`)
  }
}

async function ensureMachine(need) {
  try {
    const engine = (await lacksEngine(process.env.DOCKER_HOST)) ? { dockerd: 'docker.io' } : {}
    ensureDebianPackages({ ...need.programs, ...engine })
    await ensureEngine({ dockerHost: process.env.DOCKER_HOST, logFile: path.join(cache, 'dockerd.log'), say })
    ensureImages(need.images)
  } catch (error) {
    if (!need.soft || !(error instanceof Unavailable)) throw error
    say(`${error.message}\nset-up: going on without: tests that need it are skipped by name, or fail under CI=true`)
  }
}

/** One set-up at a time in a checkout. The file holds the pid; one whose process is gone is not in the way. */
async function lock() {
  const file = path.join(cache, 'setup.lock')
  const deadline = Date.now() + 600_000
  for (let told = false; ; told = true) {
    try {
      writeFileSync(file, String(process.pid), { flag: 'wx' })
      return () => rmSync(file, { force: true })
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    const holder = lockHolder(file)
    if (holder === undefined) rmSync(file, { force: true })
    else if (Date.now() > deadline) throw new Unavailable(`another set-up (process ${holder}) holds ${file} for 10 minutes`)
    else {
      if (!told) say(`waiting for another set-up (process ${holder})`)
      await new Promise((resolve) => setTimeout(resolve, 200))
    }
  }
}

/** The pid in the lock file, or undefined when that set-up is gone. A file without a pid is one that is being written, for a second. */
function lockHolder(file) {
  try {
    const pid = readFileSync(file, 'utf8')
    if (pid === '') return Date.now() - statSync(file).mtimeMs < 1000 ? 'unknown' : undefined
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('setup.mjs') ? pid : undefined
  } catch {
    return undefined
  }
}

// ---- npm packages

function ensureNpmPackages() {
  if (npmPackagesMatch()) return say('npm packages ok, already there')
  say('npm packages: npm ci')
  const npm = process.env.npm_execpath
  const [program, args] = npm?.endsWith('.js') ? [process.execPath, [npm]] : ['npm', []]
  run(program, [...args, 'ci', '--ignore-scripts', '--no-audit', '--no-fund'], { log: 'npm-ci.log', timeout: 600_000, what: 'npm ci --ignore-scripts' })
  if (!existsSync(nodeProgram())) throw new Unavailable(`npm ci left no ${path.relative(top, nodeProgram())}: was it told to leave optional packages out?`)
}

/** Whether node_modules holds exactly what the lockfile asks for. Optional packages for other machines may be absent. */
function npmPackagesMatch() {
  const installedFile = path.join(top, 'node_modules', '.package-lock.json')
  if (!existsSync(installedFile) || !existsSync(nodeProgram())) return false
  const wanted = JSON.parse(readFileSync(path.join(top, 'package-lock.json'), 'utf8')).packages
  const installed = JSON.parse(readFileSync(installedFile, 'utf8')).packages
  const missing = Object.entries(wanted).some(([name, { version, optional }]) => name !== '' && (installed[name] === undefined ? !optional : installed[name].version !== version))
  return !missing && Object.keys(installed).every((name) => wanted[name] !== undefined)
}

function nodeProgram() {
  return path.join(top, 'node_modules', '.bin', 'node')
}

// ---- Debian packages

function ensureDebianPackages(programs) {
  const missing = Object.entries(programs).filter(([program]) => findProgram(program) === undefined)
  if (missing.length === 0) return say('Debian packages ok, already there')
  installPackages(missing.map(([, name]) => name))
}

/** Installs packages when root on Debian or Ubuntu. Otherwise says which command to run. */
function installPackages(names) {
  const command = `apt-get install -y --no-install-recommends ${names.join(' ')}`
  if (findProgram('apt-get') === undefined) throw new Unavailable(`missing: ${names.join(', ')} (Debian's names). Install them with your system's package manager.`)
  if (process.getuid() !== 0) throw new Unavailable(`missing: ${names.join(', ')}. Run: sudo ${command}`)
  say(`Debian packages: ${command}`)
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive', LC_ALL: 'C' }
  const install = { log: 'apt.log', timeout: 600_000, what: command, env }
  // The lists of a fresh machine are missing or too old to find what they name.
  if (run('apt-get', command.split(' ').slice(1), { ...install, mayFail: true })) return
  run('apt-get', ['update'], { ...install, what: 'apt-get update', mayFail: true })
  run('apt-get', command.split(' ').slice(1), install)
}

// ---- images

function ensureImages(names) {
  const result = spawnSync(nodeProgram(), [path.join(top, 'deploy', 'images.ts'), ...names], { cwd: top, stdio: ['ignore', 'inherit', 'inherit'], timeout: 900_000 })
  if (result.status !== 0) throw new Unavailable('the images could not be built, see above')
}

/**
 * Runs a program with its output in a file: what it starts in the background must not hold the caller's pipe. Returns whether it succeeded;
 * failure throws with the end of the output, unless it may fail.
 */
function run(program, args, { log, timeout, what, env = process.env, mayFail = false }) {
  const file = path.join(cache, log)
  const output = openSync(file, 'w')
  const result = spawnSync(program, args, { cwd: top, env, timeout, stdio: ['ignore', output, output] })
  closeSync(output)
  if (result.status === 0) return true
  if (mayFail) return false
  const why = result.error?.message ?? (result.signal === null ? `exit ${result.status}` : `ended by ${result.signal}`)
  throw new Unavailable(`${what}: ${why}\n${readFileSync(file, 'utf8').trimEnd().split('\n').slice(-15).join('\n')}`)
}

function say(text) {
  console.log(`set-up: ${text}`)
}

function stop(code, message) {
  console.error(`set-up: ${message}`)
  process.exitCode = code
}
