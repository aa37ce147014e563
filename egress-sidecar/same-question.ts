/**
 * One question goes upstream once at a time, however often it is asked meanwhile: whoever guesses answers must not choose how many of them would be
 * right (RFC 5452 5). Questions that differ in more than the case of their letters (EDNS options, flags) are not answered by one reply; of those
 * about one name and type only so many are on their way.
 */
import type { Done, Resolver } from './answer.ts'

const mostForms = 8
/** Askers that wait for somebody else's question. */
const mostWaiting = 8192

type Asker = { readonly query: Buffer; readonly done: Done }

export function askEachOnce(resolver: Resolver): Resolver {
  const onTheWay = new Map<string, Map<string, Asker[]>>()
  let waiting = 0

  return {
    ask(query, questionEnd, transport, done) {
      const typeAt = questionEnd - 4
      const question = query.toString('latin1', 12, typeAt).replace(/[A-Z]/g, (letter) => letter.toLowerCase()) + query.toString('latin1', typeAt, questionEnd)
      const form = transport + query.toString('latin1', 2, 12) + query.toString('latin1', questionEnd)
      const forms = onTheWay.get(question) ?? new Map<string, Asker[]>()
      const others = forms.get(form)
      if (others !== undefined ? waiting >= mostWaiting : forms.size >= mostForms) return done(null)
      if (others !== undefined) {
        waiting++
        return void others.push({ query, done })
      }
      const mine: Asker[] = []
      forms.set(form, mine)
      onTheWay.set(question, forms)
      resolver.ask(query, questionEnd, transport, (reply) => {
        forms.delete(form)
        if (forms.size === 0) onTheWay.delete(question)
        waiting -= mine.length
        // Each works on a reply of its own, in the case of its letters.
        for (const other of mine) {
          const copy = reply === null ? null : Buffer.from(reply)
          if (copy !== null) other.query.copy(copy, 12, 12, questionEnd)
          other.done(copy)
        }
        done(reply)
      })
    },
  }
}
