/**
 * Follows the WebSocket frames of one direction (RFC 6455 §5.2) without keeping them, to know when a frame of ours may be put
 * between two of theirs.
 */
export class FrameBoundary {
  #header = 0
  #needed = 2
  #length = 0
  #masked = false
  /** Payload bytes of the current frame that are still to come. */
  #payload = 0

  /** Between two frames, where a frame may be inserted. */
  get clear(): boolean {
    return this.#header === 0 && this.#payload === 0
  }

  /** @returns how many bytes of `chunk` belong to frames up to the first boundary in it; the whole length when there is none */
  feed(chunk: Uint8Array, stopAtBoundary = false): number {
    let at = 0
    while (at < chunk.length) {
      if (this.#payload > 0) {
        const taken = Math.min(this.#payload, chunk.length - at)
        this.#payload -= taken
        at += taken
      } else this.#headerByte(chunk[at++] as number)
      if (stopAtBoundary && this.clear) return at
    }
    return at
  }

  #headerByte(byte: number): void {
    const position = this.#header++
    if (position === 1) {
      this.#masked = (byte & 0x80) !== 0
      const short = byte & 0x7f
      this.#length = short < 126 ? short : 0
      this.#needed = 2 + (short === 126 ? 2 : short === 127 ? 8 : 0)
      if (this.#masked) this.#needed += 4
    } else if (position > 1 && position < this.#needed - (this.#masked ? 4 : 0)) this.#length = this.#length * 256 + byte
    if (this.#header < this.#needed) return
    this.#payload = this.#length
    this.#header = 0
    this.#needed = 2
    this.#length = 0
  }
}

/** An unmasked Close frame with status 1001, Going Away (RFC 6455 §7.4.1). */
export const goingAway = Uint8Array.of(0x88, 0x02, 0x03, 0xe9)
