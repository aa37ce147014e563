/**
 * The wall clock, and when somebody sets it. Deadlines are moments of the wall clock, because clients are told them; what a sandbox
 * was promised is a length of time. So when the wall clock is stepped, deadlines move with it: nobody ends early, nobody lives on.
 *
 *     wall    ──────12:00:05┐
 *                           └13:00:05──────     stepped by an hour: every deadline is an hour later
 *     steady  ───────────────────────────       what time has really passed
 *
 * The steady clock is the kernel's, from boot on and the same for every process. With the distance between the two in the store, a
 * step while the server was away is noticed too. Only after a new boot the wall clock is believed. Time in which the whole machine
 * slept passes on the wall alone, so it reads as a step: nobody's sandbox ran then.
 */
import { readFileSync } from 'node:fs'

/** Both in ms; `boot` names what `steady` counts from. */
export type Clocks = { readonly wall: () => number; readonly steady: () => number; readonly boot: string }
/** Takes a step: everything that is due then moves by `milliseconds`. `note` is for `known` of the next server. @throws when it could not: asked again */
export type Step = (milliseconds: number, note: string) => void

/** NTP turns both clocks together when it slews; what differs by more was set. */
const tolerance = 1000

export class Clock {
  readonly #clocks: Clocks
  readonly #step: Step
  /** Wall minus steady, as everything that is due was last reckoned. */
  #distance: number

  /** @param known the note of the server before, null when there was none */
  constructor(clocks: Clocks, known: string | null, step: Step) {
    this.#clocks = clocks
    this.#step = step
    const [boot, distance] = (known ?? '').split(' ')
    this.#distance = boot === clocks.boot && Number.isFinite(Number(distance)) ? Number(distance) : clocks.wall() - clocks.steady()
  }

  /** For the store: see `known`. */
  get note(): string {
    return noteOf(this.#clocks.boot, this.#distance)
  }

  /** ms since 1970. A step is taken before anybody hears the new time; as long as that fails, time goes on as before it. */
  readonly now = (): number => {
    const { wall, steady, boot } = this.#clocks
    const moment = wall()
    const distance = moment - steady()
    const stepped = distance - this.#distance
    if (Math.abs(stepped) < tolerance) return moment
    const before = this.#distance
    // First, so that what the step sets off may ask for the time.
    this.#distance = distance
    try {
      this.#step(stepped, noteOf(boot, distance))
      return moment
    } catch {
      this.#distance = before
      return moment - stepped
    }
  }
}

function noteOf(boot: string, distance: number): string {
  return `${boot} ${Math.round(distance)}`
}

/** Of this machine. */
export const machineClocks: Clocks = {
  wall: Date.now,
  steady: () => Number(process.hrtime.bigint() / 1_000_000n),
  boot: bootId(),
}

export function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()
}
