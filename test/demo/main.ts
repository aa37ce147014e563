/**
 * The demonstration: `node test/demo/main.ts [--once]`. Starts a server and one gateway (mode auto: it takes the header, the host
 * name and the path alike) as two processes, makes a sandbox with a network policy, goes in through all three doors and tries to
 * get out past the policy, on a small internet of its own. Stays up until Ctrl-C; with --once it ends by itself, 0 when every
 * check held, else 1 (69 when the machine lacks something).
 */
import { randomBytes } from 'node:crypto'
import { execa } from 'execa'
import { request } from 'undici'
import { packetsTo, questionsFor } from '#test/support/attack.ts'
import { closeSocket, doorModes, exchange, fetchThrough, openDoor, openSocket, type DoorMode } from '#test/support/doors.ts'
import { startInternet, type Internet } from '#test/support/internet.ts'
import { startStack, type Sandbox, type Stack } from '#test/support/stack.ts'
import { Report, Stopped } from './report.ts'

const allowed = { name: 'allowed.example', address: '198.51.100.10' }
const denied = { name: 'denied.example', address: '198.51.100.20' }
const metadata = '169.254.169.254'
const zones = { [allowed.name]: { a: [allowed.address] }, [denied.name]: { a: [denied.address] } }
const networkPolicy = { defaultAction: 'deny', egress: [{ action: 'allow', target: allowed.name }] }
const doorNames: Record<DoorMode, string> = { wildcard: 'by host name', uri: 'by path', header: 'by header' }
const port = 8080

const report = new Report()
const once = process.argv.includes('--once')
process.exitCode = await demonstrate()

async function demonstrate(): Promise<number> {
  const begin = performance.now()
  try {
    report.line('Sallyport: one sandbox, three doors in, one guarded door out')
    report.title('set-up')
    await using internet = await report.step('small internet', startSmallInternet, (up) => `${denied.address.replace(/\d+$/, '0/24')}, DNS at ${up.dns}`)
    await using stack = await report.step('server and gateway', () => startStack({ internet, gateways: ['auto'], ports: { server: 8080, gateway: 28888 } }), (up) => `${up.api.url} and ${up.gateways.get('auto')!.url}`)
    const sandbox = await report.step('sandbox', () => stack.create({ networkPolicy }), ({ id }) => `${id}: deny all but ${allowed.name}`)
    await comeIn(stack, sandbox)
    await goOut(internet, sandbox)
    if (once) await report.step('delete', () => leaveNothing(stack, sandbox), () => 'no container left')
    else await stayUp(stack, sandbox)
  } catch (error) {
    if (!(error instanceof Stopped)) throw error
    if (error.message === 'interrupted') {
      report.line('\n  interrupted: everything removed')
      return 130
    }
    report.line(`\n  ${report.passed} checks passed, 1 failed: ${error.message}`)
    return 1
  }
  report.line(`\n  ${report.passed} checks passed, 0 failed, everything removed, ${((performance.now() - begin) / 1000).toFixed(1)} s`)
  return 0
}

/** Where the machine itself lives on the metadata address (some clouds' resolver), the demonstration leaves it alone. */
async function startSmallInternet(): Promise<Internet> {
  return startInternet({ zones, claims: [metadata] }).catch((error: Error) => {
    if (!error.message.includes(metadata)) throw error
    return startInternet({ zones })
  })
}

async function comeIn(stack: Stack, sandbox: Sandbox): Promise<void> {
  const gateway = stack.gateways.get('auto')!.url.replace('http://', '')
  report.title('in, through the gateway')
  await report.step('endpoint', async () => {
    const { endpoint } = await stack.api.endpoint(sandbox.id, port)
    const wanted = `${sandbox.id}-${port}.sandbox.localhost:${gateway.split(':')[1]}`
    check(endpoint === wanted, `the server says ${endpoint}, not ${wanted}`)
    return endpoint
  }, (endpoint) => `GET /v1/sandboxes/…/endpoints/${port} says ${endpoint}`)
  for (const mode of doorModes) {
    const door = openDoor(mode, gateway, sandbox.id, port)
    await report.step(`HTTP ${doorNames[mode]}`, async () => {
      const length = 100_000
      const { status, body } = await fetchThrough(door, `/bytes/${length}`)
      check(status === 200, `answered ${status}: ${body.toString('utf8', 0, 300)}`)
      check(body.equals(Buffer.from(Array.from({ length }, (_, i) => i % 251))), 'the bytes are not what the sandbox sent')
    }, () => door.curl('/'))
    await report.step(`WebSocket ${doorNames[mode]}`, async () => {
      const socket = await openSocket(door)
      const message = randomBytes(70_000)
      const { data } = await exchange(socket, message)
      check(data.equals(message), 'the echo differs')
      await closeSocket(socket)
    }, () => 'echo of 70,000 bytes')
  }
  await report.step('curl by host name', async () => {
    const url = openDoor('wildcard', gateway, sandbox.id, port).curl('/').split(' ').at(-1)!
    const { stdout } = await execa({ timeout: 10_000 })`curl -sS ${url}`
    check(stdout.includes('sallyport sandbox'), `said: ${stdout}`)
    return stdout
  }, (said) => `says "${said.trim()}"`)
}

async function goOut(internet: Internet, sandbox: Sandbox): Promise<void> {
  const curl = (host: string): Promise<{ code: number; stdout: string; stderr: string }> => sandbox.run(['curl', '-sS', '-m', '2', `http://${host}/from-the-sandbox`])
  report.title('out, as root in the sandbox')
  await report.step('the places exist', async () => {
    for (const address of [allowed.address, denied.address]) {
      const answer = await request(`http://${address}/from-the-host`)
      check((await answer.body.text()).includes('/from-the-host'), `${address} does not answer this machine either`)
    }
    await internet.forget()
  }, () => `${allowed.address} and ${denied.address} answer this machine`)
  await report.step('allowed name', async () => {
    const { code, stdout, stderr } = await curl(allowed.name)
    check(code === 0 && stdout.includes('/from-the-sandbox'), `did not connect: ${stderr}`)
  }, () => `${allowed.name} connects`)
  await report.step('denied name', async () => {
    const { code } = await curl(denied.name)
    check(code === 6, `curl ended with ${code}, not with 6 (no such name)`)
    check(questionsFor(await internet.questions(), denied.name) === 0, 'the question reached a resolver outside')
  }, () => `${denied.name} does not resolve; no resolver outside was asked`)
  for (const [name, address] of [['denied address', denied.address], ['metadata address', metadata]] as const) {
    await report.step(name, async () => {
      const { code } = await curl(address)
      check(code !== 0, 'it connected')
      check(packetsTo(await internet.flows(), address) === 0, 'packets arrived there')
    }, () => `${address} does not connect; no packet arrived there`)
  }
  await report.step('nothing astray', async () => {
    const strays = await internet.strays()
    check(strays === 0, `${strays} packets were sent to places outside the demonstration`)
  })
}

async function leaveNothing(stack: Stack, sandbox: Sandbox): Promise<void> {
  await sandbox.remove()
  const left = await stack.containers()
  check(left.length === 0, `still there: ${left.map((container) => container.Names.join()).join(', ')}`)
}

async function stayUp(stack: Stack, sandbox: Sandbox): Promise<void> {
  report.title('yours to try')
  const gateway = stack.gateways.get('auto')!.url.replace('http://', '')
  for (const mode of doorModes) report.line(`    ${openDoor(mode, gateway, sandbox.id, port).curl('/echo')}`)
  report.line(`    curl -H 'OPEN-SANDBOX-API-KEY: ${stack.apiKey}' ${stack.api.url}/v1/sandboxes/${sandbox.id}`)
  report.line(`    docker exec ${sandbox.main.slice(0, 12)} curl -sS -m 3 http://${allowed.name}/    # or http://${denied.name}/, http://${denied.address}/`)
  report.line('\n  Running. Ctrl-C ends it and removes everything it made.')
  await report.interrupted()
  report.line('')
}

function check(holds: boolean, otherwise: string): void {
  if (!holds) throw new Error(otherwise)
}
