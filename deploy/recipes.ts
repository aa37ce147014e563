/**
 * What is in each image: the Debian packages of its base, the program bundled into it, and the Dockerfile that puts them together
 * (`deploy/docker/<name>/Dockerfile`). Packages bring their dependencies; maintainer scripts do not run.
 */

export const imageNames = ['sandbox', 'egress', 'gateway', 'server'] as const
export type ImageName = (typeof imageNames)[number]

export type Recipe = {
  /** Debian packages whose files make the base, beside Node. */
  packages: readonly string[]
  /** Symbolic links that maintainer scripts would have made: path (no leading slash) to target. */
  links: Readonly<Record<string, string>>
  /** Program to bundle, from the top of the repository, and its name in the image under /opt/sallyport. */
  entry: string
  bundle: string
}

/** What Node and TLS need. */
const minimal = ['base-files', 'base-passwd', 'netbase', 'libc6', 'libstdc++6', 'ca-certificates'] as const

/** iptables is an update-alternatives link in Debian; the nft variant is the one that sees our tables. */
const iptablesLinks = {
  'usr/sbin/iptables': 'xtables-nft-multi',
  'usr/sbin/iptables-save': 'xtables-nft-multi',
  'usr/sbin/iptables-restore': 'xtables-nft-multi',
  'usr/sbin/ip6tables': 'xtables-nft-multi',
  'usr/sbin/ip6tables-save': 'xtables-nft-multi',
  'usr/sbin/ip6tables-restore': 'xtables-nft-multi',
}

const shellTools =
  'sh ash awk base64 basename cat chmod chown cp cut date dd df dirname du echo env expr false find free grep gunzip gzip head hostname id ifconfig kill killall less ln ls md5sum mkdir mkfifo mknod mktemp more mount mv nc netstat nslookup od ping ping6 pidof ps pwd readlink realpath rm rmdir route sed seq setsid sha256sum sleep sort stat stty su sync tail tar tee telnet test time timeout top touch tr traceroute true truncate tty umount uname uniq unshare vi watch wc wget which who whoami xargs yes zcat'

/**
 * The sandbox carries nft, iptables and ip on purpose: untrusted code brings its own tools anyway, and the tests attack with real ones.
 */
export const recipes: Readonly<Record<ImageName, Recipe>> = {
  sandbox: {
    packages: [...minimal, 'busybox', 'python3', 'curl', 'iproute2', 'nftables', 'iptables'],
    links: { ...iptablesLinks, ...Object.fromEntries(shellTools.split(' ').map((tool) => [`usr/bin/${tool}`, 'busybox'])) },
    entry: 'deploy/docker/sandbox/app.ts',
    bundle: 'app.mjs',
  },
  egress: {
    // ncurses-base: without a terminal description `nft -i` complains on stderr, where its errors are read.
    packages: [...minimal, 'ncurses-base', 'nftables', 'iptables'],
    links: iptablesLinks,
    entry: 'egress-sidecar/main.ts',
    bundle: 'egress.mjs',
  },
  gateway: { packages: minimal, links: {}, entry: 'gateway/main.ts', bundle: 'gateway.mjs' },
  server: { packages: [...minimal, 'nftables'], links: {}, entry: 'server/main.ts', bundle: 'server.mjs' },
}

/** Pulled in by dependencies, of no use in an image without maintainer scripts. */
export const omittedPackages: ReadonlySet<string> = new Set(['dpkg', 'tar', 'mawk', 'debconf', 'libdebconfclient0', 'openssl', 'libcap2-bin', 'readline-common'])
