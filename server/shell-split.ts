/** Splits a command line into words as a POSIX shell does, without expanding anything. Pure. */

/** null when a quote is not closed or the text ends in a lone backslash. */
export function splitShell(text: string): string[] | null {
  const words: string[] = []
  let word: string | null = null
  let quote = ''
  for (let i = 0; i < text.length; i++) {
    const char = text[i] as string
    if (quote === "'") {
      if (char === "'") quote = ''
      else word += char
    } else if (char === '\\' && (quote === '' || /["\\$`]/.test(text[i + 1] ?? ''))) {
      const next = text[++i]
      if (next === undefined) return null
      word = (word ?? '') + next
    } else if (quote === '"') {
      if (char === '"') quote = ''
      else word += char
    } else if (char === "'" || char === '"') {
      quote = char
      word ??= ''
    } else if (/\s/.test(char)) {
      if (word !== null) words.push(word)
      word = null
    } else {
      word = (word ?? '') + char
    }
  }
  if (quote !== '') return null
  return word === null ? words : [...words, word]
}
