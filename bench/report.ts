/** Results as text: one table for the terminal and for RESULTS.md. */
import { goalFigure, goalMet, type Goal, type Result } from './rounds.ts'

/** One load as a Markdown table, then its notes and goals. A cell is `ratio× (median)`; the baseline's ratio is 1. */
export function formatResult(result: Result): string {
  const { load, rounds, figures } = result
  const header = ['', ...load.measures.map(({ label, unit }) => (unit === '' ? label : `${label} (${unit})`))]
  const rows = [...figures].map(([name, measures]) => [name, ...load.measures.map(({ key }) => {
    const figure = measures.get(key)
    return figure === undefined || Number.isNaN(figure.median) ? '' : `${figure.ratio.toFixed(2)}× (${formatNumber(figure.median)})`
  })])
  const lines = [...(load.notes ?? []), ...load.goals.map((goal) => formatGoal(goal, result))].map((line) => `- ${line}`)
  return [`### ${load.title}`, '', `Median of ${rounds} rounds, ratio to ${load.baseline} within each round.`, '', formatTable([header, ...rows]), ...(lines.length > 0 ? ['', ...lines] : []), ''].join('\n')
}

function formatGoal(goal: Goal, result: Result): string {
  const measure = result.load.measures.find(({ key }) => key === goal.measure)
  const { ratio, lowest, highest } = goalFigure(goal, result)
  const [unit, digits, whom] = goal.against === null ? [` ${measure?.unit}`, 1, ''] : ['×', 2, ` ${goal.against ?? result.load.baseline}`]
  const found = Number.isNaN(ratio) ? 'no figure' : `${ratio.toFixed(digits)}${unit}, rounds ${lowest.toFixed(digits)}–${highest.toFixed(digits)}`
  return `${goalMet(goal, result) ? 'met' : 'MISSED'}: ${goal.contender}, ${measure?.label ?? goal.measure} ${goal.sense} ${goal.limit}${unit}${whom}: ${found}`
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
