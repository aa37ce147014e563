/**
 * One program and everything it imports as one JavaScript module, for an image. Types are gone: a file that keeps its `.ts` name would be
 * stripped again at every start (23 MB and 115 ms measured). What nobody uses of a package is left out, unless it comes as one default export:
 * hence `import * as Type`, for half a megabyte less of every process.
 */
import { isBuiltin } from 'node:module'
import { build, type Plugin } from 'esbuild'

/** CommonJS packages inside the bundle ask for Node's own modules by `require`, and some for their folder. */
const banner = "const require = process.getBuiltinModule('node:module').createRequire(import.meta.url);const __filename = import.meta.filename;const __dirname = import.meta.dirname;"

/**
 * Node's own modules by a call instead of an `import`, and only the exports that somebody uses: an import reads all of them, and `node:http`
 * alone then loads undici and its WebSocket. A few megabytes in every process.
 */
const builtinsByCall: Plugin = {
  name: 'builtins-by-call',
  setup({ onResolve, onLoad }) {
    onResolve({ filter: /^(node:)?[a-z_0-9/]+$/ }, ({ path, kind }) => {
      if (!isBuiltin(path) || kind === 'require-call') return undefined
      return { path, namespace: kind === 'dynamic-import' ? 'whole-builtin' : 'builtin' }
    })
    onLoad({ filter: /.*/, namespace: 'builtin' }, ({ path }) => ({ contents: builtinModule(path) }))
    // What is imported later has to offer everything: behind getters, so that nothing is read before its time.
    onLoad({ filter: /.*/, namespace: 'whole-builtin' }, ({ path }) => ({ contents: `module.exports = process.getBuiltinModule(${JSON.stringify(path)})` }))
  },
}

/** A module that hands on what Node's own one exports; what nobody imports is left out of the bundle. */
function builtinModule(name: string): string {
  const exported = Object.keys(process.getBuiltinModule(name) as object).filter((key) => key !== 'default' && /^[A-Za-z_$][\w$]*$/.test(key))
  return [
    `const builtin = /* @__PURE__ */ process.getBuiltinModule(${JSON.stringify(name)})`,
    'const read = (key) => builtin[key]',
    'export default builtin',
    ...exported.map((key, index) => `const value${index} = /* @__PURE__ */ read(${JSON.stringify(key)})\nexport { value${index} as ${key} }`),
  ].join('\n')
}

/** The bundled text. The same source gives the same bytes. Names of functions stay, for stack traces. Throws with esbuild's messages when something does not resolve. */
export async function bundleProgram(entry: string, top: string): Promise<Buffer> {
  const result = await build({
    absWorkingDir: top,
    entryPoints: [entry],
    bundle: true,
    platform: 'node',
    target: 'node24',
    format: 'esm',
    banner: { js: banner },
    plugins: [builtinsByCall],
    external: ['*.node', 'cpu-features', 'bufferutil', 'utf-8-validate'],
    // V8 keeps the source as long as the program runs. Lines stay short enough for a stack trace to point into one.
    minifySyntax: true,
    minifyWhitespace: true,
    lineLimit: 120,
    legalComments: 'none',
    logLevel: 'silent',
    write: false,
  })
  return Buffer.from(result.outputFiles[0]!.contents)
}
