/**
 * Fills the sidecar's table of learned addresses in the network namespace it runs in, beside a UDP flow: `node egress-full-table.ts <address
 * of an echo> <port>`. Prints what became of the flow and of an address that nobody used. No sidecar: only its firewall, on the real nft.
 */
import { spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { compilePolicy } from '#policies/compile.ts'
import { createFirewall } from '../../egress-sidecar/firewall.ts'
import { createAddressJudge } from '../../egress-sidecar/judge.ts'
import { createNft } from '../../egress-sidecar/nft.ts'
import { bootStatements } from '../../egress-sidecar/ruleset.ts'

const [address = '', port = ''] = process.argv.slice(2)
const unused = '198.18.0.2'
/** Sent to without a pause, though the table cannot see it: its lease is the longest from the start. */
const busy = Array.from({ length: 64 }, (_, i) => `198.20.0.${i}`)
const rules = compilePolicy({ defaultAction: 'deny', egress: [{ action: 'allow', target: '*.example' }] })
const setting = { filter: true, ipv6: false, exemption: { match: 'meta mark 0x1ee7', protocols: ['udp'] as const }, upstreams: [], held: { 4: [], 6: [] }, openResolvers: [], doh: { everywhere: false, addresses: [] }, control: false, apiPort: 0 }

const nft = createNft()
await nft.apply(bootStatements(0))
const firewall = await createFirewall(rules, { nft, setting, mayOpen: createAddressJudge([]), now: () => performance.now(), firstGeneration: 1, lost: (reason) => { throw new Error(reason) } })
await firewall.open('flow.example', [], [address], 60, rules)
await firewall.open('unused.example', [], [unused], 60, rules)

await firewall.open('busy.example', [], busy, 360, rules)
const program = `const s=require('dgram').createSocket('udp4'),to=${JSON.stringify(busy)};s.on('error',()=>0);setTimeout(()=>process.stdout.write('.'),300);const go=()=>{for(const a of to)s.send('x',9,a,()=>0);setImmediate(go)};go()`
const sender = spawn(process.execPath, ['-e', program], { stdio: ['ignore', 'pipe', 'ignore'] })

await new Promise((resolve) => sender.stdout.once('data', resolve))
const flow = createSocket('udp4')
const send = (to: string): Promise<string> => new Promise((resolve) => {
  const timer = setTimeout(() => resolve('timeout'), 3000)
  flow.once('message', () => (clearTimeout(timer), resolve('echo')))
  flow.send('x', Number(port), to, (error) => (error === null ? undefined : (clearTimeout(timer), flow.removeAllListeners('message'), resolve((error as NodeJS.ErrnoException).code ?? 'error'))))
})

const echoes: string[] = []
let most = 0
for (let i = 0; i < 40 * 1024; i += 1024) {
  // What the kernel has and the table says may differ by the time of one command: the flow is used all the time, as flows are.
  echoes.push(await send(address))
  await firewall.open('crowd.example', [], Array.from({ length: 1024 }, (_, k) => `198.19.${(i + k) >> 8}.${(i + k) & 255}`), 60, rules)
  most = Math.max(most, firewall.learned)
}
for (const deadline = Date.now() + 20_000; firewall.learned >= 32_768 && Date.now() < deadline;) await new Promise((resolve) => setTimeout(resolve, 20))
await firewall.open('last.example', [], ['198.51.100.9'], 60, rules)
echoes.push(await send(address))
const learned = firewall.learned
const left = await send(unused)
await firewall.replace(compilePolicy({ defaultAction: 'deny', egress: [] }))
const stillOpen: string[] = []
for (const address of busy) if (!(await send(address)).startsWith('E')) stillOpen.push(address)
process.stdout.write(JSON.stringify({ learned, most, echoes, unused: left, stillOpen }))
sender.kill('SIGKILL')
flow.close()
nft.close()
