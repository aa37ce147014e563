/**
 * The image that sandboxes get their execd from. SALLYPORT_EXECD_IMAGE names a real one; without it a stand-in is built here, of
 * nothing but the two files the server takes out: `/execd` (a Node program, so the sandbox must have Node) and `/bootstrap.sh`.
 */
import { createHash } from 'node:crypto'
import { pack, type Pack } from 'tar-stream'
import { bundleProgram } from '../../deploy/bundle.ts'
import { callEngine, checkStream, findImage } from '../../deploy/engine-api.ts'
import { root } from './program.ts'

/** What the stand-in writes down, inside the sandbox; see execd-stand-in.ts. */
export const spyRecord = '/tmp/execd-seen.jsonl'
const tag = 'sallyport/execd-stand-in:local'
const hashLabel = 'sallyport.io/recipe'

/** Starts execd beside the command, hands SIGTERM on and ends as the command ends. */
const bootstrap = `#!/bin/sh
"\${EXECD:-/opt/opensandbox/execd}" &
"$@" &
child=$!
trap 'kill -TERM $child' TERM
wait $child
code=$?
trap - TERM
wait $child 2>/dev/null || true
exit $code
`

/** For tests that any execd passes. */
export async function execdImage(): Promise<{ readonly reference: string; readonly spies: boolean }> {
  const configured = process.env['SALLYPORT_EXECD_IMAGE'] ?? ''
  return configured === '' ? { reference: await spyImage(), spies: true } : { reference: configured, spies: false }
}

/** The stand-in, which writes down what it is sent. Built when its source has changed. */
export async function spyImage(): Promise<string> {
  const program = Buffer.concat([Buffer.from('#!/usr/bin/node\n'), await bundleProgram('test/support/execd-stand-in.ts', root)])
  const files = { Dockerfile: 'FROM scratch\nCOPY execd bootstrap.sh /\n', execd: program, 'bootstrap.sh': bootstrap }
  const hash = createHash('sha256').update(JSON.stringify(files)).digest('hex')
  const current = await findImage(tag)
  if (current?.labels[hashLabel] === hash) return tag
  const query = new URLSearchParams({ t: tag, rm: 'true', forcerm: 'true', labels: JSON.stringify({ [hashLabel]: hash }) })
  checkStream(`build of ${tag}`, await callEngine({ method: 'POST', path: `/build?${query}`, body: context(files), contentType: 'application/x-tar' }))
  // A sandbox of another run may still be made from the old one: then the engine refuses, which is fine.
  if (current !== undefined) await callEngine({ method: 'DELETE', path: `/images/${current.id}` })
  return tag
}

function context(files: Readonly<Record<string, string | Buffer>>): Pack {
  const tar = pack()
  for (const [name, content] of Object.entries(files)) tar.entry({ name, mode: 0o755, mtime: new Date(0) }, content)
  tar.finalize()
  return tar
}
