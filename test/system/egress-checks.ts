/**
 * Runs the sidecar's start-up checks in the namespace it is started in, and prints the problems that they found, as JSON. With the
 * word `loop` its own questions come back to it.
 */
import { compilePolicy } from '#policies/compile.ts'
import { failedChecks } from '../../egress-sidecar/checks.ts'
import { createNft } from '../../egress-sidecar/nft.ts'
import { readQuestion } from '../../egress-sidecar/packet.ts'

const seen = new Set<string>()
const kernel = createNft()
const loops = process.argv[2] === 'loop'
const problems = await failedChecks({
  nft: kernel, filter: true, rules: compilePolicy({ defaultAction: 'deny', egress: [] }), probe: { seen },
  askUpstream: async (query) => {
    const question = readQuestion(Buffer.from(query))
    if (loops && question !== null && typeof question !== 'number') seen.add(question.name ?? '')
  },
})
kernel.close()
process.stdout.write(JSON.stringify(problems))
