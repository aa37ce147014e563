/** Preloaded into a program under `--expose-gc`: SIGUSR2 collects garbage and gives back what is free, so that memory in use can be told from memory kept for later. */
type Collect = (options: { type: 'major'; execution: 'sync'; flavor: 'last-resort' }) => void

process.on('SIGUSR2', () => (globalThis as unknown as { gc: Collect }).gc({ type: 'major', execution: 'sync', flavor: 'last-resort' }))
