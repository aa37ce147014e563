/** Types of what the TypeScript side uses of engine.mjs, which Node 20 must be able to run. */
export type EngineAddress = { socketPath: string } | { host: string; port: number }
export function engineAddress(dockerHost: string | undefined): EngineAddress
export function answers(address: EngineAddress): Promise<boolean>
export function findProgram(name: string): string | undefined
/** @throws Unavailable (an Error) saying what the machine lacks and what to do */
export function ensureEngine(options: { dockerHost: string | undefined; logFile: string; say: (text: string) => void }): Promise<void>
