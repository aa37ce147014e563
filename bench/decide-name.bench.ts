/** Judging a name must cost by its labels, not by the rules. */
import { compilePolicy } from '#policies/compile.ts'
import { decideName } from '#policies/decide.ts'
import type { Micro } from './micro.ts'

const few = rules(4)
const many = rules(4096)

export const bench: Micro = {
  title: 'decideName',
  cases: {
    'exact rule, 4 rules': () => decideName(few, 'host1.example'),
    'exact rule, 4,096 rules': () => decideName(many, 'host2047.example'),
    'wildcard rule, 4,096 rules': () => decideName(many, 'a.b.c.zone2047.example'),
    'no rule, 4,096 rules': () => decideName(many, 'a.b.c.elsewhere.example'),
    'no rule, 60 labels': () => decideName(many, 'a.'.repeat(58) + 'elsewhere.example'),
  },
}

function rules(count: number): ReturnType<typeof compilePolicy> {
  const targets = Array.from({ length: count / 2 }, (_, index) => [`host${index}.example`, `*.zone${index}.example`]).flat()
  return compilePolicy({ defaultAction: 'deny', egress: targets.map((target) => ({ action: 'allow', target })) })
}
