/** Set-up where it cannot help itself: exit 69 and one message that says what to do. In a mount namespace where programs are hidden. */
import { execa } from 'execa'
import { chmodSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import path from 'node:path'
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { namePrefix } from '#test/support/leftovers.ts'
import { root } from '#test/support/program.ts'

await needs('root', 'docker', 'nft')
t.setTimeout(60_000)

/**
 * Arguments: a folder for mounts, the checkout, the programs to hide, `own` or `foreign` for who may write in .cache, the command. The checkout
 * is mounted where every user can read it; set-up also looks where only root's PATH would, so PATH alone hides nothing.
 */
const machine = `set -e
work="$1" checkout="$2" hidden="$3" cache="$4"; shift 4
mkdir "$work/checkout" "$work/bin" "$work/sbin"
mount --bind "$checkout" "$work/checkout"
[ "$cache" = foreign ] || mount -t tmpfs -o mode=1777 tmpfs "$work/checkout/.cache"
for folder in bin sbin; do mount --bind "/usr/$folder" "$work/$folder"; done
for folder in bin sbin; do
  "$work/bin/mount" -t tmpfs -o mode=755 tmpfs "/usr/$folder"
  "$work/bin/ln" -s "$work/$folder"/* "/usr/$folder/"
done
for program in $hidden; do rm -f "/usr/bin/$program" "/usr/sbin/$program"; done
cd "$work/checkout"
exec "$@"`

const nobody = ['setpriv', '--reuid', '65534', '--regid', '65534', '--clear-groups']

type Case = { why: string; as: readonly string[]; hidden: string; cache?: 'own' | 'foreign'; command?: string; exitCode?: number; wanted: RegExp; stream?: 'stdout' | 'stderr' }
const cases: Case[] = [
  { why: 'a program is missing, and we are not root', as: nobody, hidden: 'nft', wanted: /^set-up: missing: nftables\. Run: sudo apt-get install -y --no-install-recommends nftables$/ },
  { why: 'several are', as: nobody, hidden: 'nft iptables', wanted: /^set-up: missing: nftables, iptables\. Run: sudo apt-get install -y --no-install-recommends nftables iptables$/ },
  { why: 'no apt, as root', as: [], hidden: 'nft apt-get', wanted: /^set-up: missing: nftables \(Debian's names\)\. Install them with your system's package manager\.$/ },
  { why: 'no apt, not as root', as: nobody, hidden: 'nft apt-get', wanted: /^set-up: missing: nftables \(Debian's names\)\. Install them with your system's package manager\.$/ },
  { why: 'an engine that we may not use', as: nobody, hidden: '', wanted: /^set-up: no right to use \/var\/run\/docker\.sock\. Run: sudo usermod -aG docker \$USER, and log in again; or run as root$/ },
  { why: 'a checkout of somebody else', as: nobody, hidden: '', cache: 'foreign', wanted: /^set-up: no right to write in \S+\/\.cache\. Run: sudo chown -R \$USER \S+\/checkout; or run as its owner$/ },
  { why: 'before tests it is said and goes on', as: nobody, hidden: 'nft', command: 'test', exitCode: 0, stream: 'stdout', wanted: /^set-up: missing: nftables\. Run: sudo .*\nset-up: going on without: tests that need it are skipped by name, or fail under CI=true$/m },
]

mkdirSync(path.join(root, '.cache'), { recursive: true })
for (const { why, as, hidden, cache = 'own', command = 'demo', exitCode = 69, wanted, stream = 'stderr' } of cases) {
  t.test(why, async (t) => {
    const work = mkdtempSync(path.join(tmpdir(), `${namePrefix}${process.pid}-setup`))
    t.teardown(() => rmSync(work, { recursive: true }))
    chmodSync(work, 0o755)
    const setUp = [...as, path.join(work, 'checkout/node_modules/.bin/node'), 'deploy/setup.mjs', command]
    const env = { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', HOME: '/nonexistent' }
    const result = await execa('unshare', ['-m', 'sh', '-c', machine, 'sh', work, root, hidden, cache, ...setUp], { env, extendEnv: false, reject: false, timeout: 30_000 })
    t.equal(result.exitCode, exitCode, 'its code', { stdout: result.stdout, stderr: result.stderr })
    t.match(result[stream], wanted)
  })
}
