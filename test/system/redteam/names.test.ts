/**
 * Names that lie: allowed names that lead to places nobody meant (rebinding, aliases), names that read differently to
 * the policy and to a resolver, and answers made to keep an address open or to open more than was asked for.
 */
import t from 'tap'
import { needs } from '#test/support/abilities.ts'
import { startInternet } from '#test/support/internet.ts'
import { startStack } from '#test/support/stack.ts'
import { createNetwork } from '#test/support/containers.ts'
import { asks, attack, fire, reaches, resolver, type Row } from './range.ts'

await needs('root', 'docker', 'nft', 'iptables', 'netns')
t.setTimeout(200_000)

type Place = 'a sandbox without a policy' | 'a plain container'
const open = 'a sandbox without a policy'
const plain = 'a plain container'

/** What an allowed name answers, and where that would lead. */
const places: readonly [why: string, first: Place, address: string][] = [
  ['10/8', open, '10.66.7.8'],
  ['172.16/12', open, '172.16.66.7'],
  ['192.168/16', open, '192.168.66.7'],
  ['shared address space', open, '100.66.7.8'],
  ['link-local', plain, '169.254.66.7'],
  ['cloud metadata', plain, '169.254.169.254'],
  ["another cloud's metadata", plain, '100.100.100.200'],
  ["a cloud's metadata at a public address, which the server's floor holds", plain, '168.63.129.16'],
]
const zones = {
  'allowed.example': { a: ['198.51.100.10'] },
  'denied.wild.example': { a: ['198.51.100.30'] },
  'denied2.wild.example': { a: ['198.51.100.31'] },
  'alias.wild.example': { cname: 'denied.wild.example' },
  'alias2.wild.example': { cname: 'hop.elsewhere.example' },
  'hop.elsewhere.example': { cname: 'denied2.wild.example' },
  'blocked.wild.example': { a: ['198.18.77.7'] },
  'mixed.wild.example': { a: ['198.51.100.40', '10.66.9.9', '198.18.77.8'] },
  'this-host.wild.example': { a: ['0.0.0.0', '127.0.0.1', '127.0.0.53'] },
  'short.wild.example': { a: ['198.51.100.41'], ttl: 0 },
  'long.wild.example': { a: ['198.51.100.42'], ttl: 2 ** 31 },
  'longest.wild.example': { a: ['198.51.100.43'], ttl: 2 ** 32 - 1 },
  ...Object.fromEntries(places.map(([, , address], i) => [`to${i}.wild.example`, { a: [address] }])),
  '*.leak.example': { a: ['198.51.100.66'] },
}
const networkPolicy = {
  defaultAction: 'deny',
  egress: [
    { action: 'allow', target: 'allowed.example' },
    { action: 'deny', target: 'denied.wild.example' },
    { action: 'deny', target: 'denied2.wild.example' },
    { action: 'allow', target: '*.wild.example' },
    { action: 'deny', target: '198.18.77.0/24' },
  ],
}

const hex = (...labels: (string | Buffer)[]): string => Buffer.concat([...labels.flatMap((label) => [Buffer.from([label.length]), Buffer.from(label as string, 'latin1')]), Buffer.from([0])]).toString('hex')
const below = (name: string): string[] => name.split('.')

/** Questions in wire format whose labels a careless reader would take for an allowed name. `name`: what the resolver would see. */
const spellings: readonly [why: string, wire: (name: string) => string][] = [
  ['upper case', (name) => hex(...below(name.toUpperCase()))],
  ['a dot inside a label', (name) => hex('x', 'wild.example', ...below(name))],
  ['an allowed name as one label', (name) => hex('allowed.example', ...below(name))],
  ['a NUL behind an allowed name', (name) => hex('allowed.example\0', ...below(name))],
  ['a NUL inside a label', (name) => hex('allowed\0', ...below(name))],
  ['a percent sign', (name) => hex('allowed%2eexample%00', ...below(name))],
  ['raw UTF-8', (name) => hex(Buffer.from('allоwed', 'utf8'), ...below(name))],
  ['an A-label', (name) => hex('xn--allwed-7bh', ...below(name))],
  ['spaces', (name) => hex(' allowed', 'example ', ...below(name))],
  ['a backslash', (name) => hex('allowed\\', 'example\\', ...below(name))],
  ['an allowed name as a prefix', (name) => hex('allowed', 'example', ...below(name))],
  ['a slash and a port', (name) => hex('allowed.example:53/', ...below(name))],
]

/** Questions whose last labels, read carelessly, are those of an allowed name. `seen`: how the tests' resolver prints them. */
const endings: readonly [why: string, labels: (id: string) => string[], seen: (id: string) => string][] = [
  ['the dot of an allowed ending inside a label', (id) => [id, 'wild.example'], (id) => `${id}.wild.example`],
  ['an allowed name as its only label', (id) => [`${id}.wild.example`], (id) => `${id}.wild.example`],
  ['a NUL behind an allowed ending', (id) => [id, 'wild', 'example\0'], (id) => `${id}.wild.example\0`],
  ['a NUL and more behind an allowed ending', (id) => [id, 'wild', 'example\0.leak'], (id) => `${id}.wild.example\0.leak`],
  ['a percent sign for the dot of an allowed ending', (id) => [id, 'wild%2eexample'], (id) => `${id}.wild%2eexample`],
  ['a backslash before the dot of an allowed ending', (id) => [id, 'wild\\.example'], (id) => `${id}.wild\\.example`],
  ['a space behind an allowed ending', (id) => [id, 'wild', 'example '], (id) => `${id}.wild.example `],
]

const rows: Row<Place>[] = [
  ...places.map(([why, first, address], i) => reaches(`an allowed name that leads to ${why}`, first, () => ['steps', 'ask', `to${i}.wild.example`, '127.0.0.11', ';', 'sleep', '0.1', ';', 'udp', address, '80'], address)),
  reaches('an allowed name that leads to a denied network', open, (to) => ['steps', 'ask', 'blocked.wild.example', '127.0.0.11', ';', 'udp', to, '80'], '198.18.77.7'),
  reaches('a private address among good ones', open, (to) => ['steps', 'ask', 'mixed.wild.example', '127.0.0.11', ';', 'udp', to, '80'], '10.66.9.9'),
  reaches('a denied address among good ones', open, (to) => ['steps', 'ask', 'mixed.wild.example', '127.0.0.11', ';', 'udp', to, '80'], '198.18.77.8'),
  reaches('an alias of a denied name', open, (to) => ['steps', 'ask', 'alias.wild.example', '127.0.0.11', ';', 'udp', to, '80'], '198.51.100.30'),
  reaches('an alias of an alias of a denied name', open, (to) => ['steps', 'ask', 'alias2.wild.example', '127.0.0.11', ';', 'udp', to, '80'], '198.51.100.31'),
  ...spellings.map(([why, wire]) => asks(`${why}`, open, (name) => ['ask_wire', wire(name), '127.0.0.11'])),
  ...endings.map(([why, labels, seen], i) => asks(why, open, () => ['ask_wire', hex(...labels(`ending${i}`)), '127.0.0.11'], seen(`ending${i}`))),
  asks('search domains: fifty names', open, (name) => ['steps', ...Array.from({ length: 50 }, (_, i) => ['ask', `allowed.example.s${i}.${name}`, '127.0.0.11', ';']).flat()]),
]

t.test('names that lie', async (t) => {
  // Docker takes its networks from 172.17.0.0/16 on: this corner of 172.16/12 is never one of them.
  await using internet = await startInternet({ zones, claims: ['10.66.0.0/16', '172.16.66.0/24', '192.168.66.0/24', '100.66.0.0/16', '169.254.66.0/24', '169.254.169.254', '100.100.100.200', '168.63.129.16'] })
  await using network = await createNetwork('names')
  await internet.fence(network.bridge)
  await using stack = await startStack({ internet })
  const free = await stack.create()
  const guarded = await stack.create({ networkPolicy })
  const where = { [open]: free.main, [plain]: (await network.run({ HostConfig: { Dns: [resolver] } })).id }
  await attack(t, { internet, places: where, guarded: new Map([['a sandbox with a policy', guarded.main]]) }, rows)

  await t.test('what is said of such names', async (t) => {
    const look = async (name: string): Promise<string> => (await guarded.run(['python3', '-c', `import socket\ntry: print(sorted({a[4][0] for a in socket.getaddrinfo("${name}",80,socket.AF_INET)}))\nexcept OSError: print("nothing")`])).stdout.trim()
    for (const [i, [why]] of places.entries()) t.equal(await look(`to${i}.wild.example`), 'nothing', `the address is not told: ${why}`)
    t.equal(await look('this-host.wild.example'), 'nothing', 'no name leads to the loopback')
    // What listens there is the sandbox's own or the sidecar's, and both can be had by number: the name must add nothing.
    const rebound = ['curl', 'http://this-host.wild.example:8080/']
    t.same(await fire(free.main, [rebound]), ['200'], 'where nothing holds it such a name reaches a server on the loopback')
    t.same(await fire(guarded.main, [rebound, ['curl', 'http://127.0.0.1:8080/']]), ['000', '200'], 'under a policy only its number does')
    t.same(await fire(guarded.main, [['curl', 'http://this-host.wild.example:18080/policy'], ['curl', 'http://127.0.0.1:18080/policy']]), ['000', '401'], 'nor is the policy API there by name, and by number it wants its token')
    t.equal(await look('mixed.wild.example'), "['198.51.100.40']", 'of several addresses only the good one is told')
    t.equal(await look('alias.wild.example'), 'nothing', 'no alias leads to a denied name')
    t.equal(await look('alias2.wild.example'), 'nothing', 'nor does an alias of an alias')
    t.equal(await look('DENIED.Wild.Example.'), 'nothing', 'nor does its name in other letters with a dot behind')
    t.equal(await look('ALLOWED.Example.'), "['198.51.100.10']", 'an allowed name is allowed however it is written')
  })

  await t.test('how long an answer counts', async (t) => {
    for (const [name, address] of [['short', '198.51.100.41'], ['long', '198.51.100.42'], ['longest', '198.51.100.43']] as const) {
      const [ttl] = (await fire(guarded.main, [['ttl', `${name}.wild.example`, '127.0.0.11']])) as [string]
      t.ok(Number(ttl) <= 300, `${name}: the client may keep it no longer than the kernel does`, { ttl })
      await internet.forget()
      await fire(guarded.main, [['udp', address, '80']])
      t.ok((await internet.flows()).some(({ to }) => to === address), `${name}: and for that long it is open`)
    }
  })
  t.match((await guarded.run(['curl', '-sS', '-m', '5', 'http://allowed.example/still'])).stdout, 'GET /still', 'and the allowed name still connects')
  t.equal(await internet.strays(), 0, 'nothing was sent to a place outside the tests')
})
