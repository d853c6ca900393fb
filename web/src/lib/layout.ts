/** Where everything of the link graph goes: a column per position, a row per layer, an image where its patches are. */

import { shorten } from './format'
import type { Graph } from './graph'
import { EMBEDDING, LOGIT } from './types'

export const GUTTER_LEFT = 52
const PAD_TOP = 14
const PAD_RIGHT = 18
const NODE = 11
const SMALLEST_NODE = 6
const MIN_COLUMN = 26
const MIN_ROW = 12
const OUTPUT_ROW = 34

export interface Column {
  left: number
  right: number
  label: string
  /** Positions drawn in this column; many for an image. */
  positions: number[]
  image: number
}

export interface Row {
  top: number
  bottom: number
  label: string
  layer: number
}

export interface Chip {
  node: number
  left: number
  top: number
  width: number
  height: number
  text: string
}

export interface Layout {
  width: number
  height: number
  x: Float32Array
  y: Float32Array
  radius: Float32Array
  columns: Column[]
  rows: Row[]
  chips: Chip[]
  images: { index: number; left: number; top: number; width: number; height: number }[]
  /** Half sizes of the patch rectangles of embedding nodes, 0 for all others. */
  patchWidth: Float32Array
  patchHeight: Float32Array
  /** Centres [x, y] of the other patches that a node stands for. */
  alike: Map<number, [number, number][]>
  /** Height of the strip of tokens below. */
  gutter: number
}

export interface Space {
  width: number
  height: number
  zoom: number
  textWidth: (text: string) => number
}

export function layOut(graph: Graph, visible: Uint8Array, space: Space): Layout {
  const columns = makeColumns(graph)
  const cells = fillCells(graph, visible, columns)
  // Slanted labels take more room; whether some must be is known once the columns have widths.
  for (const gutter of [28, 66]) {
    const rows = makeRows(graph, space, gutter, cells)
    const step = setWidths(graph, columns, rows, cells, space)
    const areFlat = columns.every((column) => space.textWidth(column.label) + 8 <= column.right - column.left)
    if (areFlat || gutter > 28) return placeAll(graph, visible, space, columns, rows, cells, step, gutter)
  }
  throw new Error('unreachable')
}

function placeAll(
  graph: Graph,
  visible: Uint8Array,
  space: Space,
  columns: Column[],
  rows: Row[],
  cells: Map<number, number[]>[],
  step: number,
  gutter: number,
): Layout {
  const layout = emptyLayout(graph, columns, rows, gutter)
  placeCells(graph, layout, cells, step)
  placeImages(graph, layout, visible, space)
  placeOutputs(graph, layout, visible, space)
  return layout
}

function makeColumns(graph: Graph): Column[] {
  const columns: Column[] = []
  const seen = new Map<number, Column>()
  graph.data.tokens.forEach((_, position) => {
    const patch = graph.patchOf.get(position)
    const known = patch && seen.get(patch.image)
    if (known) {
      known.positions.push(position)
      return
    }
    const label = patch ? `image${graph.data.images.length > 1 ? ` ${patch.image + 1}` : ''}` : graph.tokenAt(position)
    const column = { left: 0, right: 0, label: shorten(label, 13), positions: [position], image: patch ? patch.image : -1 }
    if (patch) seen.set(patch.image, column)
    columns.push(column)
  })
  return columns
}

/** From the output down to the embeddings; layers with fuller cells get more of the height. */
function makeRows(graph: Graph, space: Space, gutter: number, cells: Map<number, number[]>[]): Row[] {
  const nLayers = graph.data.n_layers
  const bottomRow = graph.data.images.length ? imageHeight(space) + 12 : 26
  const free = space.height - gutter - PAD_TOP - OUTPUT_ROW - bottomRow
  const weights = Array.from({ length: nLayers }, (_, layer) => {
    const fullest = Math.max(0, ...cells.map((column) => column.get(layer)?.length ?? 0))
    return 0.25 + 0.6 * Math.log2(1 + fullest / 4)
  })
  const total = weights.reduce((sum, weight) => sum + weight, 0)
  const spare = Math.max(0, free - nLayers * MIN_ROW)
  const rows: Row[] = [{ top: PAD_TOP, bottom: PAD_TOP + OUTPUT_ROW, label: 'out', layer: nLayers }]
  for (let layer = nLayers - 1; layer >= 0; layer--) {
    const top = rows[rows.length - 1].bottom
    const height = (MIN_ROW + (spare * weights[layer]) / total) * space.zoom
    rows.push({ top, bottom: top + height, label: String(layer), layer })
  }
  const top = rows[rows.length - 1].bottom
  rows.push({ top, bottom: top + bottomRow, label: 'emb', layer: -1 })
  return rows
}

/** Visible nodes by column and layer; patches and outputs have places of their own. */
function fillCells(graph: Graph, visible: Uint8Array, columns: Column[]): Map<number, number[]>[] {
  const columnOf = new Int32Array(graph.data.tokens.length).fill(-1)
  columns.forEach((column, index) => column.positions.forEach((position) => (columnOf[position] = index)))
  const cells = columns.map(() => new Map<number, number[]>())
  const { kind, layer, position } = graph.data.nodes
  for (let node = 0; node < graph.size; node++) {
    const isPatch = kind[node] === EMBEDDING && graph.patchOf.has(position[node])
    if (!visible[node] || kind[node] === LOGIT || isPatch) continue
    const cell = cells[Math.max(columnOf[position[node]], 0)]
    const nodes = cell.get(layer[node])
    if (nodes) nodes.push(node)
    else cell.set(layer[node], [node])
  }
  return cells
}

/** Widths that hold each column's fullest cell; nodes move together (the step that comes back) before it gets too wide. */
function setWidths(graph: Graph, columns: Column[], rows: Row[], cells: Map<number, number[]>[], space: Space): number {
  const rowOf = new Map(rows.map((row) => [row.layer, row]))
  const room = (space.width - GUTTER_LEFT - PAD_RIGHT) * space.zoom
  const widths = (step: number) =>
    columns.map((column, index) => {
      let widest = 0
      for (const [layer, nodes] of cells[index]) {
        const row = rowOf.get(layer) ?? rows[0]
        const stack = Math.max(1, Math.floor((row.bottom - row.top - 2) / step))
        widest = Math.max(widest, Math.ceil(nodes.length / stack))
      }
      const image = column.image >= 0 ? imageSize(graph, column.image, space).width + 20 : 0
      return Math.max(MIN_COLUMN * space.zoom, widest * step + 10, image)
    })
  const sum = (values: number[]) => values.reduce((total, value) => total + value, 0)
  let step = NODE
  let natural = widths(step)
  while (sum(natural) > room && step > SMALLEST_NODE) natural = widths((step -= 1))
  const total = sum(natural)
  const extra = Math.max(0, room - total) / columns.length
  let left = GUTTER_LEFT
  columns.forEach((column, index) => {
    column.left = left
    left = column.right = left + natural[index] + extra
  })
  return step
}

function emptyLayout(graph: Graph, columns: Column[], rows: Row[], gutter: number): Layout {
  const make = () => new Float32Array(graph.size)
  return {
    width: columns[columns.length - 1].right + PAD_RIGHT,
    height: rows[rows.length - 1].bottom + gutter,
    gutter,
    x: make().fill(-1e4),
    y: make().fill(-1e4),
    radius: make(),
    patchWidth: make(),
    patchHeight: make(),
    alike: new Map(),
    columns,
    rows,
    chips: [],
    images: [],
  }
}

/** Nodes of a cell side by side, the most influential first, wrapped into as many lines as the row has room for. */
function placeCells(graph: Graph, layout: Layout, cells: Map<number, number[]>[], space: number): void {
  const { influence } = graph.data.nodes
  const rowOf = new Map(layout.rows.map((row) => [row.layer, row]))
  layout.columns.forEach((column, index) => {
    for (const [layer, nodes] of cells[index]) {
      const row = rowOf.get(layer)
      if (!row) continue
      nodes.sort((a, b) => (influence[a] ?? 1) - (influence[b] ?? 1))
      const perLine = Math.max(1, Math.floor((column.right - column.left - 6) / space))
      const lines = Math.ceil(nodes.length / perLine)
      const step = Math.min(space, (row.bottom - row.top - 2) / lines)
      nodes.forEach((node, at) => {
        const line = Math.floor(at / perLine)
        const inLine = Math.min(perLine, nodes.length - line * perLine)
        layout.x[node] = (column.left + column.right) / 2 + ((at % perLine) - (inLine - 1) / 2) * space
        layout.y[node] = (row.top + row.bottom) / 2 + (line - (lines - 1) / 2) * step
        layout.radius[node] = (3 + 2.2 * (1 - Math.min(1, influence[node] ?? 1))) * Math.max(0.62, space / NODE)
      })
    }
  })
}

function imageHeight(space: Space): number {
  return Math.min(150, Math.max(84, space.height * 0.27)) * Math.sqrt(space.zoom)
}

function imageSize(graph: Graph, index: number, space: Space): { width: number; height: number } {
  const image = graph.data.images[index]
  const height = imageHeight(space)
  return { width: Math.min(2 * height, (height * image.width) / image.height), height }
}

function placeImages(graph: Graph, layout: Layout, visible: Uint8Array, space: Space): void {
  const row = layout.rows[layout.rows.length - 1]
  const { kind, position } = graph.data.nodes
  layout.columns.forEach((column) => {
    if (column.image < 0) return
    const { width, height } = imageSize(graph, column.image, space)
    const left = (column.left + column.right - width) / 2
    layout.images.push({ index: column.image, left, top: row.top + 6, width, height })
  })
  for (let node = 0; node < graph.size; node++) {
    const found = kind[node] === EMBEDDING && visible[node] ? graph.patchOf.get(position[node]) : undefined
    const place = found && layout.images.find((image) => image.index === found.image)
    if (!found || !place) continue
    const [, , , left, top, width, height] = found.patch
    const centre = (x: number, y: number): [number, number] => [
      place.left + (x + width / 2) * place.width,
      place.top + (y + height / 2) * place.height,
    ]
    ;[layout.x[node], layout.y[node]] = centre(left, top)
    const others = (graph.patchesOf.get(position[node]) ?? []).filter((patch) => patch !== found.patch)
    if (others.length) layout.alike.set(node, others.map((patch) => centre(patch[3], patch[4])))
    layout.patchWidth[node] = width * place.width
    layout.patchHeight[node] = height * place.height
    layout.radius[node] = Math.max(2, Math.min(layout.patchWidth[node], layout.patchHeight[node]) / 2)
  }
}

/** Outputs are chips with their token, right-aligned above the last position: nothing else is in that row. */
function placeOutputs(graph: Graph, layout: Layout, visible: Uint8Array, space: Space): void {
  const row = layout.rows[0]
  const height = 22
  const top = (row.top + row.bottom - height) / 2
  const { kind, position, probability } = graph.data.nodes
  const outputs: number[] = []
  for (let node = 0; node < graph.size; node++) if (kind[node] === LOGIT && visible[node]) outputs.push(node)
  outputs.sort((a, b) => position[a] - position[b] || (probability[b] ?? 0) - (probability[a] ?? 0))
  const texts = outputs.map((node) => {
    const share = probability[node]
    return graph.logitToken(node).slice(0, 14) + (share === null ? '' : `  ${Math.round(share * 100)}%`)
  })
  const widths = texts.map((text) => space.textWidth(text) + 16)
  const total = widths.reduce((sum, width) => sum + width + 6, 0)
  let left = Math.max(GUTTER_LEFT + 4, layout.width - PAD_RIGHT - total)
  outputs.forEach((node, at) => {
    layout.chips.push({ node, left, top, width: widths[at], height, text: texts[at] })
    layout.x[node] = left + widths[at] / 2
    layout.y[node] = top + height / 2
    layout.radius[node] = height / 2
    left += widths[at] + 6
  })
  layout.width = Math.max(layout.width, left + PAD_RIGHT)
}

/** The node under a point of the content, -1 for none. */
export function nodeAt(graph: Graph, layout: Layout, visible: Uint8Array, x: number, y: number): number {
  for (const chip of layout.chips)
    if (x >= chip.left && x <= chip.left + chip.width && y >= chip.top && y <= chip.top + chip.height) return chip.node
  let best = -1
  let nearest = 9 * 9
  for (let node = 0; node < graph.size; node++) {
    if (!visible[node]) continue
    const dx = x - layout.x[node]
    const dy = y - layout.y[node]
    if (layout.patchWidth[node]) {
      const places: [number, number][] = [[layout.x[node], layout.y[node]], ...(layout.alike.get(node) ?? [])]
      const isIn = ([left, top]: [number, number]) =>
        Math.abs(x - left) <= layout.patchWidth[node] / 2 && Math.abs(y - top) <= layout.patchHeight[node] / 2
      if (places.some(isIn)) return node
      continue
    }
    const distance = dx * dx + dy * dy
    if (distance < nearest) [best, nearest] = [node, distance]
  }
  return best
}

/** The next node from `from` in a direction; among nodes of the same row (left, right) or of the nearest other row. */
export function neighbour(layout: Layout, visible: Uint8Array, from: number, dx: number, dy: number): number {
  let best = from
  let nearest = Infinity
  for (let node = 0; node < layout.x.length; node++) {
    if (!visible[node] || node === from) continue
    const x = layout.x[node] - layout.x[from]
    const y = layout.y[node] - layout.y[from]
    const ahead = x * dx + y * dy
    if (ahead <= 0.5) continue
    const cost = ahead + 3 * Math.abs(dx ? y : x)
    if (cost < nearest) [best, nearest] = [node, cost]
  }
  return best
}
