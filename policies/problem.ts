/** One thing that is wrong in a document a person wrote: where (`networkPolicy.egress[2].target`) and why. */
export type Problem = { readonly path: string; readonly reason: string }

/** A value, or everything that is wrong with the text it should have come from. */
export type Read<T> = { readonly ok: true; readonly value: T } | { readonly ok: false; readonly problems: readonly Problem[] }

/** `path: reason`, several joined by `; `. For error messages. */
export function formatProblems(problems: readonly Problem[]): string {
  return problems.map((p) => (p.path === '' ? p.reason : `${p.path}: ${p.reason}`)).join('; ')
}
