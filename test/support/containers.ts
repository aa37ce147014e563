/** Plain containers and networks for the tests' own use, outside any Sallyport server: baselines for attacks, and looking inside. */
import Docker from 'dockerode'
import { randomBytes } from 'node:crypto'
import { finished } from 'node:stream/promises'
import { PassThrough } from 'node:stream'
import { ignoreGone, namePrefix, ownerLabel, sweepLeftovers } from './leftovers.ts'

export const docker = new Docker()
export const sandboxImage = 'sallyport/sandbox:local'

export type Output = { readonly code: number; readonly stdout: string; readonly stderr: string }

/** Runs a program in a container and waits for it. A program that does not end by itself within `seconds` is killed and reads as code 124. */
export async function exec(container: string, command: readonly string[], seconds = 15): Promise<Output> {
  const bounded = ['timeout', '-s', 'KILL', String(seconds), ...command]
  const run = await docker.getContainer(container).exec({ Cmd: bounded, AttachStdout: true, AttachStderr: true })
  const stream = await run.start({ hijack: true, stdin: false })
  const [out, err] = [new PassThrough(), new PassThrough()]
  const texts = { stdout: '', stderr: '' }
  out.setEncoding('utf8').on('data', (text: string) => (texts.stdout += text))
  err.setEncoding('utf8').on('data', (text: string) => (texts.stderr += text))
  docker.modem.demuxStream(stream, out, err)
  await finished(stream, { writable: false }).catch(() => undefined)
  const { ExitCode } = await run.inspect()
  return { code: ExitCode === 137 ? 124 : (ExitCode ?? -1), ...texts }
}

export interface TestNetwork extends AsyncDisposable {
  readonly name: string
  readonly bridge: string
  /** Starts a container that sleeps until it is removed with the network. */
  run(options?: Docker.ContainerCreateOptions): Promise<{ id: string; address: string }>
}

/** A bridge network of the test with Docker's own defaults (neighbours may talk); its containers are removed with it. */
export async function createNetwork(purpose: string): Promise<TestNetwork> {
  await sweepLeftovers(docker)
  const suffix = randomBytes(3).toString('hex')
  const name = `${namePrefix}${process.pid}-${purpose}-${suffix}`
  const bridge = `spt-${suffix}`
  const network = await docker.createNetwork({ Name: name, Driver: 'bridge', Options: { 'com.docker.network.bridge.name': bridge }, Labels: { [ownerLabel]: String(process.pid) } })
  const started: Docker.Container[] = []
  return {
    name,
    bridge,
    async run(options = {}) {
      const container = await docker.createContainer({
        name: `${name}-${started.length}`,
        Image: sandboxImage,
        Entrypoint: ['sleep', '3600'],
        ...options,
        Labels: { [ownerLabel]: String(process.pid) },
        HostConfig: { NetworkMode: name, ...options.HostConfig },
      })
      started.push(container)
      await container.start()
      const { NetworkSettings } = await container.inspect()
      return { id: container.id, address: NetworkSettings.Networks[name]?.IPAddress ?? '' }
    },
    async [Symbol.asyncDispose]() {
      await Promise.all(started.map((container) => container.remove({ force: true, v: true }).catch(ignoreGone)))
      await network.remove().catch(ignoreGone)
    },
  }
}
