/** What a test file must cover: tests of policies/ all of what they load (tap's default, 100 %), others nothing. */
export default (testFile) => (testFile.includes('test/policies/') ? [] : null)
