/** Tells whether a file is another one than before. Asking works on every file system and survives a rename; watching does neither. */
import { stat } from 'node:fs/promises'

/** Changes with the file; a file that cannot be had has a stamp of its own. */
export async function fileStamp(path: string): Promise<string> {
  try {
    const { mtimeMs, size, ino } = await stat(path)
    return `${mtimeMs} ${size} ${ino}`
  } catch (error) {
    return `missing: ${(error as NodeJS.ErrnoException).code}`
  }
}
