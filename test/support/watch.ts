/** Counts packets that reach a container, in its own network namespace and before any rule of ours or Docker's. */
import { execa } from 'execa'
import { docker } from './containers.ts'

export interface Watch {
  /** Packets from these addresses since the last call. */
  count(from: readonly string[]): Promise<number>
}

/** The table goes with the container's namespace. */
export async function watchArrivals(container: string): Promise<Watch> {
  const { State } = await docker.getContainer(container).inspect()
  const nft = (args: readonly string[], input = ''): Promise<{ stdout: string }> => execa({ input })`nsenter -t ${State.Pid} -n nft ${args}`
  await nft(['-f', '-'], 'table ip watch {\n set from { type ipv4_addr; size 65535; flags dynamic; }\n chain in {\n type filter hook prerouting priority -310; policy accept;\n iif "lo" accept\n update @from { ip saddr counter }\n }\n}\n')
  return {
    async count(from) {
      const { stdout } = await nft(['-j', 'list', 'set', 'ip', 'watch', 'from'])
      await nft(['flush', 'set', 'ip', 'watch', 'from'])
      const sets = (JSON.parse(stdout) as { nftables: { set?: { elem?: { elem: { val: string; counter: { packets: number } } }[] } }[] }).nftables
      const seen = sets.flatMap(({ set }) => set?.elem ?? []).filter(({ elem }) => from.includes(elem.val))
      return seen.reduce((sum, { elem }) => sum + elem.counter.packets, 0)
    },
  }
}
