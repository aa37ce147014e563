/** Judging must cost by the labels of a name and the prefix lengths of networks, not by the number of rules. */
import { compilePolicy } from '#policies/compile.ts'
import { decideAddress, decideLearned, decideName } from '#policies/decide.ts'
import type { Micro } from './micro.ts'

const few = rules(4)
const many = rules(4096)
const longName = `${'a.'.repeat(58)}elsewhere.example`

export const bench: Micro = {
  title: 'decide',
  cases: {
    'decideName, exact rule, 4 rules': () => decideName(few, 'host0.example'),
    'decideName, exact rule, 4,096 rules': () => decideName(many, 'host1023.example'),
    'decideName, wildcard rule, 4,096 rules': () => decideName(many, 'a.b.c.zone1023.example'),
    'decideName, no rule, 4,096 rules': () => decideName(many, 'a.b.c.elsewhere.example'),
    'decideName, no rule, 60 labels': () => decideName(many, longName),
    'decideAddress, 4,096 rules': () => decideAddress(many, '198.18.3.7'),
    'decideLearned, IPv4, 4,096 rules': () => decideLearned(many, '198.51.100.7'),
    'decideLearned, IPv6, 4,096 rules': () => decideLearned(many, '2001:db8:1:2::7'),
  },
}

/** A quarter each: names, wildcards, addresses, networks. */
function rules(count: number): ReturnType<typeof compilePolicy> {
  const targets = Array.from({ length: count / 4 }, (_, index) => [`host${index}.example`, `*.zone${index}.example`, `198.18.${index >> 8}.${index & 255}`, `10.${index >> 8}.${index & 255}.0/24`]).flat()
  return compilePolicy({ defaultAction: 'deny', egress: targets.map((target) => ({ action: 'allow', target })) })
}
