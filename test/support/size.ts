/** How much a test does: `npm test` the size that fits in its 15 minutes, `npm run test:long` all of it. */
const long = process.env['SALLYPORT_TEST_LONG'] === '1'

/** One of two counts, by the run that this is. */
export function sized(usual: number, full: number): number {
  return long ? full : usual
}
