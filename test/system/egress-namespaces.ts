/** Two network namespaces and a veth between them: a guarded one, and the internet. Everything is removed at the end. */
import { execa } from 'execa'
import { existsSync, mkdirSync, readFileSync, rmdirSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import { eventually, root } from '../support/program.ts'
import type { Order, Told } from './egress-inside.ts'

export const outside = { v4: '198.51.100.53', v6: '2001:db8:53::53', other: '198.51.100.77' } as const
export const openPorts = [80, 443, 853, 8443] as const
let made = 0

/** Everything denied but these. */
export const policy = (...allowed: string[]): string => JSON.stringify({ egress: allowed.map((target) => ({ action: 'allow', target })) })
/** Asks the policy API from inside; gives the answer and, right behind it, the status. */
export const api = (space: Namespaces, method: string, body: string, ...headers: string[]): Promise<string> =>
  space.run('curl', '-s', '-m', '5', '-w', '%{http_code}', '-X', method, '-d', body, ...headers.flatMap((header) => ['-H', header]), 'http://127.0.0.1:18080/policy')

export type Seen = { saw: string; name?: string; type?: number; to?: string; port?: number; length?: number; text?: string; secure?: boolean }

export interface Namespaces extends AsyncDisposable {
  /** Name of the guarded namespace. */
  readonly inside: string
  /** Everything that reached the internet so far. */
  readonly seen: readonly Seen[]
  /** All at the same time, answers in order. */
  ask(...orders: Order[]): Promise<Told[]>
  /** Starts the sidecar; resolves when it is ready, or rejects with what it said and its exit code. */
  startSidecar(env: Readonly<Record<string, string>>, cgroup?: string): Promise<RunningSidecar>
  /** The same with a /var of its own, that holds a folder for always files with these in it; outside it is below /proc/<pid>/root. */
  startSidecarWithVar(env: Readonly<Record<string, string>>, files?: Readonly<Record<string, string>>): Promise<RunningSidecar>
  run(program: string, ...args: string[]): Promise<string>
  /** Starts what runs on until the end. Resolves with its first line, to the list of all its lines that grows on. */
  runOn(where: 'inside' | 'internet', program: string, ...args: string[]): Promise<readonly string[]>
}

export type RunningSidecar = {
  readonly pid: number
  log(): string
  /** Resolves with the log once it has this; a line comes through a pipe, in its own time. */
  said(line: RegExp): Promise<string>
  /** Its exit code, or the signal that ended it. */
  readonly over: Promise<number | string>
  end(signal: NodeJS.Signals): Promise<number | string>
}

/** @param tls folder with key.pem and cert.pem: the TCP servers outside then also speak TLS */
export async function createNamespaces({ ipv6 = true, tls = '' }: { ipv6?: boolean; tls?: string } = {}): Promise<Namespaces> {
  const prefix = `egress-${process.pid}-${++made}`
  const inside = `${prefix}-in`
  const internet = `${prefix}-out`
  const ip = (...args: string[]) => execa('ip', args)
  const children: { kill(signal: NodeJS.Signals): boolean }[] = []
  const seen: Seen[] = []

  const removeAll = async (): Promise<void> => {
    for (const child of children) child.kill('SIGKILL')
    for (const name of [inside, internet]) await execa('ip', ['netns', 'del', name], { reject: false })
  }
  try {
    for (const name of [inside, internet]) {
      await ip('netns', 'add', name)
      await ip('-n', name, 'link', 'set', 'lo', 'up')
    }
    await ip('-n', inside, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', 'up0', 'netns', internet)
    await ip('-n', inside, 'addr', 'add', '198.51.100.2/24', 'dev', 'eth0')
    await ip('-n', internet, 'addr', 'add', '198.51.100.1/24', 'dev', 'up0')
    for (const address of [outside.v4, outside.other]) await ip('-n', internet, 'addr', 'add', `${address}/32`, 'dev', 'up0')
    await ip('-n', internet, 'link', 'set', 'up0', 'up')
    await ip('-n', inside, 'link', 'set', 'eth0', 'up')
    await ip('-n', inside, 'route', 'add', 'default', 'via', '198.51.100.1')
    // Whatever leaves the sandbox ends here and is seen: the internet owns every address.
    await ip('-n', internet, 'route', 'add', 'local', '0.0.0.0/0', 'dev', 'lo')
    if (ipv6) {
      await ip('-n', internet, 'addr', 'add', '2001:db8:53::1/64', 'dev', 'up0', 'nodad')
      await ip('-n', internet, 'addr', 'add', `${outside.v6}/128`, 'dev', 'up0', 'nodad')
      await ip('-n', inside, 'addr', 'add', '2001:db8:53::2/64', 'dev', 'eth0', 'nodad')
      await ip('-n', inside, '-6', 'route', 'add', 'default', 'via', '2001:db8:53::1')
    } else for (const name of ['all', 'default', 'lo']) await execa('ip', ['netns', 'exec', inside, 'sysctl', '-qw', `net.ipv6.conf.${name}.disable_ipv6=1`])

    const start = (name: string, script: string, ...args: string[]) => {
      const child = execa('ip', ['netns', 'exec', name, process.execPath, `test/system/${script}`, ...args], { cwd: root, reject: false, buffer: false, stdin: 'pipe' })
      child.stderr.setEncoding('utf8').on('data', (text: string) => process.stderr.write(text))
      children.push(child)
      return child
    }
    const server = start(internet, 'egress-outside.ts', outside.v4, outside.v6, outside.other, openPorts.join(','), tls)
    await new Promise<void>((resolve, reject) => {
      createInterface({ input: server.stdout }).on('line', (line) => {
        seen.push(JSON.parse(line) as Seen)
        resolve()
      }).on('close', () => reject(new Error('the internet did not start')))
    })
    const client = start(inside, 'egress-inside.ts')
    const waiting = new Map<number, (told: Told[]) => void>()
    createInterface({ input: client.stdout }).on('line', (line) => {
      const { id, told } = JSON.parse(line) as { id: number; told: Told[] }
      waiting.get(id)?.(told)
      waiting.delete(id)
    })
    let orders = 0

    const startSidecar = async (env: Readonly<Record<string, string>>, cgroup: string, program: readonly string[]): Promise<RunningSidecar> => {
      const enter = ['ip', 'netns', 'exec', inside]
      // The shells enter the cgroup, mount the tree where nft looks for it (`ip` gives its child a /sys of its own), and become the sidecar.
      const inCgroup = ['sh', '-c', `echo $$ > ${cgroup}/cgroup.procs && exec "$@"`, 'sh', ...enter, 'sh', '-c', 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"', 'sh', ...program]
      const args = cgroup === '' ? [...enter, ...program] : inCgroup
      const child = execa(args[0] as string, args.slice(1), { cwd: root, reject: false, all: true, buffer: false, env: { OPENSANDBOX_EGRESS_DNS_UPSTREAM: outside.v4, OPENSANDBOX_EGRESS_EXEMPTION: 'ports', ...env } })
      children.push(child)
      let log = ''
      let ended: number | string | null = null
      child.all.setEncoding('utf8').on('data', (text: string) => (log += text))
      const over = child.then((result) => (ended = result.signal ?? result.exitCode ?? -1))
      for (const deadline = Date.now() + 20_000; !log.includes('egress.loaded'); await delay(20)) {
        if (ended !== null) throw new Error(`exit ${ended}: ${log}`)
        if (Date.now() > deadline) throw new Error(`not ready: ${log}`)
      }
      return {
        pid: child.pid ?? 0,
        log: () => log,
        said: (line) => eventually(`the log has ${line.source}`, async () => (line.test(log) ? log : undefined)),
        over,
        async end(signal) {
          child.kill(signal)
          return over
        },
      }
    }

    return {
      inside,
      seen,
      async ask(...list) {
        const id = ++orders
        const told = new Promise<Told[]>((resolve) => waiting.set(id, resolve))
        client.stdin.write(`${JSON.stringify({ id, orders: list })}\n`)
        return told
      },
      startSidecar: (env, cgroup = '') => startSidecar(env, cgroup, [process.execPath, 'egress-sidecar/main.ts']),
      startSidecarWithVar: (env, files = {}) => {
        const written = Object.entries(files).map(([name, text]) => `echo '${text}' > /var/egress/rules/${name} && `).join('')
        return startSidecar(env, '', ['unshare', '--mount', 'sh', '-c', `mount -t tmpfs tmpfs /var && mkdir -p /var/egress/rules && ${written}exec "$@"`, 'sh', process.execPath, 'egress-sidecar/main.ts'])
      },
      run: async (program, ...args) => (await execa('ip', ['netns', 'exec', inside, program, ...args])).stdout,
      async runOn(where, program, ...args) {
        const child = execa('ip', ['netns', 'exec', where === 'inside' ? inside : internet, program, ...args], { reject: false, buffer: false })
        child.stderr.setEncoding('utf8').on('data', (text: string) => process.stderr.write(text))
        children.push(child)
        const lines: string[] = []
        await new Promise<void>((resolve, reject) => {
          createInterface({ input: child.stdout }).on('line', (line) => {
            lines.push(line)
            resolve()
          }).on('close', () => reject(new Error(`${program} ended without a word`)))
        })
        return lines
      },
      [Symbol.asyncDispose]: removeAll,
    }
  } catch (error) {
    await removeAll()
    throw error
  }
}

/** A cgroup below the root of the machine's cgroup2 tree; removed when nobody is in it any more. */
export async function ownCgroup(): Promise<AsyncDisposable & { readonly path: string }> {
  const path = `${cgroupTree()}/egress-test-${process.pid}`
  mkdirSync(path)
  return {
    path,
    async [Symbol.asyncDispose]() {
      await eventually('the cgroup is empty', async () => (readFileSync(`${path}/cgroup.procs`, 'utf8') === '' ? true : undefined))
      rmdirSync(path)
    },
  }
}

export function cgroupTree(): string {
  const tree = ['/sys/fs/cgroup/unified', '/sys/fs/cgroup'].find((path) => existsSync(`${path}/cgroup.procs`))
  if (tree === undefined) throw new Error('this machine has no cgroup2 tree')
  return tree
}
