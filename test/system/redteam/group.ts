/** What the red team does to a sandbox from outside: read its sidecar's secrets, change its policy, make one like it with a weakness. */
import { request } from 'undici'
import { headerNames } from '#policies/wire.ts'
import { docker, type TestNetwork } from '#test/support/containers.ts'
import { ignoreGone } from '#test/support/leftovers.ts'
import { eventually } from '#test/support/program.ts'
import type { Sandbox, Stack } from '#test/support/stack.ts'

const tokenVariable = 'OPENSANDBOX_EGRESS_TOKEN'

/** The secret that the server gave the sidecar; nobody inside has it. */
export async function policyToken(sandbox: Sandbox): Promise<string> {
  const { Config } = await docker.getContainer(sandbox.sidecar ?? '').inspect()
  const found = Config.Env.find((entry) => entry.startsWith(`${tokenVariable}=`))
  if (found === undefined) throw new Error('the sidecar has no token')
  return found.slice(tokenVariable.length + 1)
}

/** Changes the policy as its owner. @throws when it is refused */
export async function changePolicy(sandbox: Sandbox, method: 'POST' | 'PATCH' | 'DELETE', body: unknown): Promise<void> {
  const answer = await request(`http://${sandbox.address}:18080/policy`, { method, headers: { [headerNames.egressAuth]: await policyToken(sandbox) }, body: JSON.stringify(body) })
  const said = await answer.body.text()
  if (answer.statusCode !== 200) throw new Error(`the policy was not changed: ${answer.statusCode} ${said}`)
}

export type Group = AsyncDisposable & { readonly main: string; readonly sidecar: string }

/**
 * A sidecar and a sandbox made with exactly what the server gave its own, except some of the sidecar's environment and without
 * published ports.
 * @param where the network of Docker's that the sidecar is in
 */
export async function cloneGroup(network: TestNetwork, stack: Stack, model: Sandbox, environment: Readonly<Record<string, string>>, where = stack.network): Promise<Group> {
  const like = async (id: string, mode: string, over: Readonly<Record<string, string>>): Promise<string> => {
    const { Config, HostConfig } = await docker.getContainer(id).inspect()
    const kept = Config.Env.filter((entry) => !Object.keys(over).some((name) => entry.startsWith(`${name}=`)))
    const Env = [...kept, ...Object.entries(over).map(([name, value]) => `${name}=${value}`)]
    const { Image, Entrypoint, Cmd } = Config
    return (await network.run({ Image, Env, Entrypoint: Entrypoint as string[], Cmd, HostConfig: { ...HostConfig, NetworkMode: mode, PortBindings: {} } })).id
  }
  const sidecar = await like(model.sidecar ?? '', where, environment)
  const { NetworkSettings } = await docker.getContainer(sidecar).inspect()
  const address = NetworkSettings.Networks[where]?.IPAddress ?? ''
  await eventually('the cloned sidecar is ready', async () => (await request(`http://${address}:18080/healthz`).catch(() => undefined))?.statusCode === 200 || undefined)
  const main = await like(model.main, `container:${sidecar}`, {})
  return {
    main,
    sidecar,
    async [Symbol.asyncDispose]() {
      for (const id of [main, sidecar]) await docker.getContainer(id).remove({ force: true, v: true }).catch(ignoreGone)
    },
  }
}
