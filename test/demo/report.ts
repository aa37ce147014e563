/** The demonstration's output: one line a step, as it happens. */

/** Ends the demonstration: what failed was already printed, or nobody wants to see more. */
export class Stopped extends Error {}

export class Report {
  passed = 0
  readonly #tty = process.stdout.isTTY === true
  #interrupted = false
  #wake: () => void = () => undefined

  constructor() {
    process.on('SIGINT', () => this.#interrupt())
    process.on('SIGTERM', () => this.#interrupt())
    // `| head` is no reason to leave containers behind.
    process.stdout.on('error', () => this.#enough())
  }

  title(text: string): void {
    this.line(`\n  ${this.#paint('1', text)}`)
  }

  line(text: string): void {
    process.stdout.write(`${text}\n`)
  }

  /**
   * Runs one step and prints a line with what it returns. A step is never cut short, so that whatever it makes is known to the
   * clean-up; an interrupt counts before the next one.
   * @throws Stopped when the step failed or the user pressed Ctrl-C
   */
  async step<T>(name: string, work: () => Promise<T>, show: (value: T) => string = () => ''): Promise<T> {
    if (this.#interrupted) throw new Stopped('interrupted')
    const begin = performance.now()
    try {
      const value = await work()
      this.passed++
      this.line(`    ${this.#paint('32', 'ok  ')} ${name.padEnd(22)} ${this.#paint('2', this.#since(begin))}  ${show(value)}`)
      return value
    } catch (error) {
      this.line(`    ${this.#paint('31', 'FAIL')} ${name.padEnd(22)} ${this.#since(begin)}\n\n${indent(error instanceof Error ? error.message : String(error))}`)
      throw new Stopped(name)
    }
  }

  /** Settles when the user has seen enough. */
  async interrupted(): Promise<void> {
    while (!this.#interrupted) await new Promise<void>((resolve) => (this.#wake = resolve))
  }

  #interrupt(): void {
    if (this.#interrupted) process.exit(130)
    this.#enough()
  }

  #enough(): void {
    this.#interrupted = true
    this.#wake()
  }

  #since(begin: number): string {
    return `${((performance.now() - begin) / 1000).toFixed(2)} s`
  }

  #paint(code: string, text: string): string {
    return this.#tty ? `\x1b[${code}m${text}\x1b[0m` : text
  }
}

function indent(text: string): string {
  return text.split('\n').map((line) => `      ${line}`).join('\n')
}
