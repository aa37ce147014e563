/** Who imports what: every import of every source file below some folders, for the tests that hold the arrows. */
import { globSync, readFileSync } from 'node:fs'
import path from 'node:path'

/** `target` is a path from the top of the repository for our own files, else the name of the package or `node:` module. */
export type Import = { file: string; target: string; own: boolean }

export const sourceFiles = (top: string, folders: readonly string[]): string[] =>
  folders.flatMap((folder) => globSync(`${folder}/**/*.{ts,mts,mjs,js}`, { cwd: top })).filter((file) => !file.endsWith('.d.mts')).sort()

export function readImports(top: string, file: string): Import[] {
  return importedNames(readFileSync(path.join(top, file), 'utf8')).map((name) => ({ file, ...resolve(file, name) }))
}

/** Names in `import … from 'x'`, `export … from 'x'`, `import 'x'`, `import('x')` and `require('x')`. Text in comments does not count. */
export function importedNames(source: string): string[] {
  const code = source.replaceAll(/\/\*[\s\S]*?\*\/|^\s*\/\/.*$/gm, '')
  const forms = /(?:^|[;\n])\s*(?:import|export)\s[^'"`;]*?from\s*['"]([^'"]+)['"]|(?:^|[;\n])\s*import\s*['"]([^'"]+)['"]|\b(?:import|require)\(\s*['"`]([^'"`]+)['"`]/g
  return [...code.matchAll(forms)].map(([, from, bare, call]) => (from ?? bare ?? call)!)
}

function resolve(file: string, name: string): { target: string; own: boolean } {
  if (name.startsWith('.')) return { target: path.normalize(path.join(path.dirname(file), name)), own: true }
  if (name.startsWith('#')) return { target: name.slice(1), own: true }
  if (name.startsWith('node:')) return { target: name, own: false }
  return { target: name.split('/').slice(0, name.startsWith('@') ? 2 : 1).join('/'), own: false }
}
