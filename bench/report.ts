/** Results as text: one table for the terminal and for RESULTS.md. */
import { goalMet, type Result } from './rounds.ts'

/** One load as a Markdown table, then its goals. A cell is `ratio× (median)`; the baseline's ratio is 1. */
export function formatResult({ load, rounds, figures }: Result): string {
  const header = ['', ...load.measures.map(({ label, unit }) => (unit === '' ? label : `${label} (${unit})`))]
  const rows = [...figures].map(([name, measures]) => [name, ...load.measures.map(({ key }) => {
    const figure = measures.get(key)
    return figure === undefined || Number.isNaN(figure.median) ? '' : `${figure.ratio.toFixed(2)}× (${formatNumber(figure.median)})`
  })])
  const goals = load.goals.map((goal) => {
    const figure = figures.get(goal.contender)?.get(goal.measure)
    const label = load.measures.find(({ key }) => key === goal.measure)?.label ?? goal.measure
    const span = figure === undefined ? '' : `, rounds ${figure.lowest.toFixed(2)}–${figure.highest.toFixed(2)}`
    return `- ${goalMet(goal, { load, rounds, figures }) ? 'met' : 'MISSED'}: ${goal.contender}, ${label} ${goal.sense} ${goal.limit}× ${load.baseline}: ${figure?.ratio.toFixed(2) ?? 'no figure'}×${span}`
  })
  return [`### ${load.title}`, '', `Median of ${rounds} rounds, ratio to ${load.baseline} within each round.`, '', formatTable([header, ...rows]), ...(goals.length > 0 ? ['', ...goals] : []), ''].join('\n')
}

/** Rows of equal length, the first is the header; columns padded so that the text reads as a table, too. */
export function formatTable(rows: readonly (readonly string[])[]): string {
  const widths = (rows[0] ?? []).map((_, column) => Math.max(3, ...rows.map((row) => (row[column] ?? '').length)))
  const line = (row: readonly string[]): string => `| ${row.map((cell, column) => (column === 0 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!))).join(' | ')} |`
  const rule = `|${widths.map((width, column) => (column === 0 ? '-'.repeat(width + 2) : `${'-'.repeat(width + 1)}:`)).join('|')}|`
  return [line(rows[0] ?? []), rule, ...rows.slice(1).map(line)].join('\n')
}

/** Three significant digits, whole from 100 on. */
export function formatNumber(value: number): string {
  return Math.abs(value) >= 100 ? String(Math.round(value)) : value.toPrecision(3)
}
