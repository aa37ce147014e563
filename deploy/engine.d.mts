/** Types of what the TypeScript side uses of engine.mjs, which Node 20 must be able to run. */
export type EngineAddress = { socketPath: string } | { host: string; port: number }
export function engineAddress(dockerHost: string | undefined): EngineAddress
export function answers(address: EngineAddress): Promise<boolean>
export function findProgram(name: string): string | undefined
