/** Preloaded into a program under `--expose-gc`: SIGUSR2 collects garbage, so that memory in use can be told from memory not given back yet. */
process.on('SIGUSR2', () => void (globalThis as { gc?: () => void }).gc?.())
