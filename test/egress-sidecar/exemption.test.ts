/** The ladder of exemptions: which rung is taken where, what it installs, and that no rung ever exempts somebody else. */
import t from 'tap'
import { chooseExemption, type ExemptionDeps, type ExemptionWish, type Self } from '../../egress-sidecar/exemption.ts'
import { NftError } from '../../egress-sidecar/nft.ts'

const first = 'cgroup:[4026531835]'
const other = 'cgroup:[4026532200]'
const docker: Self = { cgroups: '0::/docker/abc\n', cgroupNamespace: first, release: '6.18.44' }
const own: Self = { ...docker, cgroups: '0::/\n', cgroupNamespace: other }
const both = { iptables: true, nft: true }
const neither = { iptables: false, nft: false }
const onlyNft = { iptables: false, nft: true }

type Kind = 'cgroup-iptables' | 'cgroup-nft' | 'ports'
const rows: [why: string, wish: ExemptionWish, self: Self, can: typeof both, inContainer: boolean, kind: Kind | RegExp][] = [
  ['asked for', 'ports', docker, both, true, 'ports'],
  ['a container, its path seen from outside', 'auto', docker, both, true, 'cgroup-iptables'],
  ['a container with a cgroup namespace of its own', 'auto', own, both, true, 'cgroup-iptables'],
  ['the same on 6.1, the first kernel that looks inside', 'auto', { ...own, release: '6.1.0-18-amd64' }, both, true, 'cgroup-iptables'],
  ['the same on 6.0: / would be everybody', 'auto', { ...own, release: '6.0.19' }, both, true, 'ports'],
  ['the same on 5.15', 'auto', { ...own, release: '5.15.0' }, both, true, 'ports'],
  ['/ in the first cgroup namespace: everybody', 'auto', { ...own, cgroupNamespace: first }, both, true, 'ports'],
  ['no container: the sandbox may share our cgroup', 'auto', docker, both, false, 'ports'],
  ['no container, but it was demanded', 'cgroup', docker, both, false, 'cgroup-iptables'],
  ['iptables without the match', 'auto', docker, onlyNft, true, 'cgroup-nft'],
  ['iptables without the match, and no path below / that nft could name', 'auto', own, onlyNft, true, 'ports'],
  ['neither knows cgroups', 'auto', docker, neither, true, 'ports'],
  ['cgroup v1 only', 'auto', { ...docker, cgroups: '12:cpu:/docker/abc\n1:name=systemd:/docker/abc\n' }, both, true, 'ports'],
  ['a hybrid tree: only the line of v2 counts', 'auto', { ...docker, cgroups: '12:cpu:/elsewhere\n0::/docker/abc\n' }, both, true, 'cgroup-iptables'],
  ['a path that leads out of our tree', 'auto', { ...docker, cgroups: '0::/../other\n' }, both, true, 'ports'],
  ['a path that would end the rule', 'auto', { ...docker, cgroups: '0::/a" -j ACCEPT\n' }, both, true, 'ports'],
  ['demanded, and neither knows cgroups', 'cgroup', docker, neither, true, /no exemption by cgroup: .*iptables.*nft/],
  ['demanded where / is everybody', 'cgroup', { ...own, release: '5.15.0' }, both, true, /would exempt everybody/],
]

t.test('which rung, and what it installs', async (t) => {
  for (const [why, wish, self, can, inContainer, kind] of rows) {
    const { deps, iptables, nft } = surroundings(self, can, inContainer)
    if (kind instanceof RegExp) {
      await t.rejects(chooseExemption(wish, deps), kind, why)
      continue
    }
    const chosen = await chooseExemption(wish, deps)
    t.equal(chosen.kind, kind, why)
    t.ok(chosen.why.length > 0, `${why}: says why`)
    if (kind === 'ports') {
      t.equal(chosen.match, null, `${why}: the ports that we hold`)
      t.same(chosen.protocols, ['udp'], `${why}: nobody holds a TCP port before it connects`)
      t.same(iptables.filter(({ added }) => added), [], `${why}: no mark for anybody`)
    } else if (kind === 'cgroup-nft') t.equal(chosen.match, 'socket cgroupv2 level 2 "docker/abc"', why)
    else {
      t.equal(chosen.match, 'meta mark 0x1ee7', why)
      const path = self === docker || self.cgroups.includes('/docker/abc') ? '/docker/abc' : '/'
      t.same(iptables.map(({ program, table, rules }) => ({ program, table, rules })), [{ program: 'iptables', table: 'raw', rules: [
        '-A OUTPUT -p udp --dport 53 -j MARK --set-mark 0', `-A OUTPUT -p udp --dport 53 -m cgroup --path "${path}" -j MARK --set-mark 0x1ee7`,
        '-A OUTPUT -p tcp --dport 53 -j MARK --set-mark 0', `-A OUTPUT -p tcp --dport 53 -m cgroup --path "${path}" -j MARK --set-mark 0x1ee7`,
      ] }], `${why}: everybody's mark is wiped, then ours is set`)
      t.same(nft, [], why)
    }
  }
})

t.test('over IPv6 both families are marked', async (t) => {
  const { deps, iptables } = surroundings(docker, both, true, true)
  t.equal((await chooseExemption('auto', deps)).kind, 'cgroup-iptables')
  t.same(iptables.map(({ program }) => program), ['iptables', 'ip6tables'])
})

function surroundings(self: Self, can: typeof both, inContainer: boolean, ipv6 = false): { deps: ExemptionDeps; iptables: { program: string; table: string; rules: readonly string[]; added: boolean }[]; nft: string[] } {
  const iptables: { program: string; table: string; rules: readonly string[]; added: boolean }[] = []
  const nft: string[] = []
  const deps: ExemptionDeps = {
    self: async () => self,
    appendIptables: async (program, table, rules) => {
      iptables.push({ program, table, rules, added: can.iptables })
      if (!can.iptables) throw new NftError('iptables: no chain/target/match by that name')
    },
    nft: {
      apply: async (statements) => {
        nft.push(...statements)
        if (!can.nft) throw new NftError('nft: cgroupv2 path fails')
        return ''
      },
      list: async () => '',
      close: () => undefined,
    },
    inContainer, ipv6,
    towards: [{ protocol: 'udp', port: 53 }, { protocol: 'tcp', port: 53 }],
  }
  return { deps, iptables, nft }
}
