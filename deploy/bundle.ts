/**
 * One program and everything it imports as one JavaScript module, for an image. Types are gone: a file that keeps its `.ts` name would be
 * stripped again at every start (23 MB and 115 ms measured).
 */
import { build } from 'esbuild'

/** CommonJS packages inside the bundle ask for Node's own modules by `require`, and some for their folder. */
const requireBanner = "import { createRequire as sallyportCreateRequire } from 'node:module';const require = sallyportCreateRequire(import.meta.url);const __filename = import.meta.filename;const __dirname = import.meta.dirname;"

/** The bundled text. The same source gives the same bytes. Throws with esbuild's messages when something does not resolve. */
export async function bundleProgram(entry: string, top: string): Promise<Buffer> {
  const result = await build({
    absWorkingDir: top,
    entryPoints: [entry],
    bundle: true,
    platform: 'node',
    target: 'node24',
    format: 'esm',
    banner: { js: requireBanner },
    external: ['*.node', 'cpu-features', 'bufferutil', 'utf-8-validate'],
    legalComments: 'none',
    logLevel: 'silent',
    write: false,
  })
  return Buffer.from(result.outputFiles[0]!.contents)
}
