/** One thing that is wrong in a document a person wrote: where (`networkPolicy.egress[2].target`) and why. */
export type Problem = { readonly path: string; readonly reason: string }

/** `path: reason`, several joined by `; `. For error messages. */
export function formatProblems(problems: readonly Problem[]): string {
  return problems.map((p) => (p.path === '' ? p.reason : `${p.path}: ${p.reason}`)).join('; ')
}
