/** The answer to "may this sandbox reach that place?". A denial is an answer, never an exception. */
export type Verdict =
  | { readonly action: 'allow'; readonly reason: AllowReason; readonly rule?: number }
  | { readonly action: 'deny'; readonly reason: DenyReason; readonly rule?: number }

/** Closed lists: each reason is also a metric label and a line in the README. */
export const allowReasons = ['rule-allows', 'default-allows', 'name-was-allowed'] as const
export const denyReasons = ['rule-denies', 'default-denies', 'floor', 'special-use-address', 'resolver-address', 'malformed-name', 'malformed-address'] as const
export type AllowReason = (typeof allowReasons)[number]
export type DenyReason = (typeof denyReasons)[number]
