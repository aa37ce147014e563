/**
 * Follows the WebSocket frames of one direction (RFC 6455 §5.2) without keeping them, to know when a frame of ours may be put
 * between two of theirs, and when a message is longer than it may be.
 */
export class FrameBoundary {
  readonly #maxMessage: number
  #first = 0
  #header = 0
  #needed = 2
  #length = 0
  #masked = false
  /** Payload bytes of the current frame that are still to come. */
  #payload = 0
  /** Payload bytes of the current message, over all its frames so far. */
  #message = 0
  #tooLarge = false

  /** @param maxMessage payload bytes of a message, as they are sent */
  constructor(maxMessage = Infinity) {
    this.#maxMessage = maxMessage
  }

  /** A message is longer than it may be: said as soon as the frame that makes it so has announced its length. Nothing after that counts. */
  get tooLarge(): boolean {
    return this.#tooLarge
  }

  /** Between two frames, where a frame may be inserted. */
  get clear(): boolean {
    return this.#header === 0 && this.#payload === 0
  }

  /**
   * @returns how many bytes of `chunk` belong to frames up to the first boundary in it, the whole length when there is none; when a message is
   * too large, how many of them stand before the frame that makes it so
   */
  feed(chunk: Uint8Array, stopAtBoundary = false): number {
    let at = 0
    let frame = 0
    while (at < chunk.length) {
      if (this.#payload > 0) {
        const taken = Math.min(this.#payload, chunk.length - at)
        this.#payload -= taken
        at += taken
      } else {
        if (this.#header === 0) frame = at
        this.#headerByte(chunk[at++] as number)
        if (this.#tooLarge) return frame
      }
      if (stopAtBoundary && this.clear) return at
    }
    return at
  }

  #headerByte(byte: number): void {
    const position = this.#header++
    if (position === 0) this.#first = byte
    else if (position === 1) {
      this.#masked = (byte & 0x80) !== 0
      const short = byte & 0x7f
      this.#length = short < 126 ? short : 0
      this.#needed = 2 + (short === 126 ? 2 : short === 127 ? 8 : 0)
      if (this.#masked) this.#needed += 4
    } else if (position < this.#needed - (this.#masked ? 4 : 0)) this.#length = this.#length * 256 + byte
    if (this.#header < this.#needed) return
    this.#count()
    this.#payload = this.#length
    this.#header = 0
    this.#needed = 2
    this.#length = 0
  }

  /** A message ends with the data frame that says so, whatever kind its frames claim to be; control frames (§5.5) may stand between them. */
  #count(): void {
    if ((this.#first & control) !== 0) return
    this.#message += this.#length
    if (this.#message > this.#maxMessage) this.#tooLarge = true
    else if ((this.#first & final) !== 0) this.#message = 0
  }
}

const final = 0x80
const control = 0x08

/** Unmasked Close frames with a status of RFC 6455 §7.4.1: 1001, Going Away. */
export const goingAway = Uint8Array.of(0x88, 0x02, 0x03, 0xe9)
/** 1009: a message that is too large. */
export const messageTooBig = Uint8Array.of(0x88, 0x02, 0x03, 0xf1)
