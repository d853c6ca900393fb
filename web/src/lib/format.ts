/** Numbers and tokens as people read them. */

export function number(value: number, digits = 3): string {
  if (value === 0) return '0'
  const size = Math.abs(value)
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1)
  return value.toPrecision(digits).replace(/(\.\d*?)0+$/, '$1').replace(/\.$/, '')
}

export function signed(value: number): string {
  return (value < 0 ? '−' : '+') + number(Math.abs(value))
}

export function percent(share: number): string {
  const value = share * 100
  if (value === 0) return '0%'
  if (Math.abs(value) < 0.1) return '<0.1%'
  return `${Math.abs(value) < 10 ? value.toFixed(1) : value.toFixed(0)}%`
}

export function count(value: number): string {
  return value.toLocaleString('en-US')
}

/** A token on one line: tokenizers' marks for a space and line breaks made visible, never empty. */
export function token(text: string): string {
  const shown = text
    .replace(/[Ġ▁]/g, ' ')
    .replace(/\r?\n|Ċ/g, '⏎')
    .replace(/\t/g, '⇥')
  const trimmed = shown.trim()
  return trimmed === '' ? '␣'.repeat(Math.min(shown.length, 3)) || '∅' : trimmed
}

/** A token inside running text: its spaces kept. */
export function runningToken(text: string): string {
  return text.replace(/[Ġ▁]/g, ' ').replace(/Ċ|\r?\n/g, '⏎')
}

export function shorten(text: string, length: number): string {
  return text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text
}

export function plural(n: number, one: string, many = `${one}s`): string {
  return `${count(n)} ${n === 1 ? one : many}`
}
