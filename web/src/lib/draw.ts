/** The link graph on a canvas: plain 2D drawing, a few milliseconds for thousands of nodes. */

import type { Graph } from './graph'
import { shorten } from './format'
import { GUTTER_LEFT, type Layout } from './layout'
import { BIAS, EMBEDDING, ERROR, LOGIT, type EdgeSet, type NodeLinks } from './types'

export interface Palette {
  paper: string
  wash: string
  line: string
  ink: string
  soft: string
  faint: string
  node: string
  error: string
  accent: string
  positive: string
  negative: string
  found: string
  onAccent: string
}

export function readPalette(element: Element): Palette {
  const style = getComputedStyle(element)
  const names = ['paper', 'wash', 'line', 'ink', 'soft', 'faint', 'node', 'error', 'accent', 'positive', 'negative', 'found']
  const colours = [...names, 'on-accent'].map((name) => style.getPropertyValue(`--${name}`).trim())
  const keys = [...names, 'onAccent']
  return Object.fromEntries(keys.map((key, at) => [key, colours[at]])) as unknown as Palette
}

export interface Scene {
  graph: Graph
  layout: Layout
  visible: Uint8Array
  selected: number
  hovered: number
  pinned: ReadonlySet<number>
  found: ReadonlySet<number> | null
  links: NodeLinks | null
  linkType: 'both' | 'inputs' | 'outputs'
  overview: EdgeSet | null
  images: (HTMLImageElement | null)[]
}

export interface Viewport {
  width: number
  height: number
  left: number
  top: number
  ratio: number
}

const FONT = '12px system-ui, "Segoe UI", sans-serif'
/** More links than this in one picture cannot be told apart. */
const MOST_LINKS = 250

export function draw(context: CanvasRenderingContext2D, scene: Scene, view: Viewport, palette: Palette): void {
  context.setTransform(view.ratio, 0, 0, view.ratio, 0, 0)
  context.fillStyle = palette.paper
  context.fillRect(0, 0, view.width, view.height)
  context.font = FONT
  context.save()
  context.translate(-view.left, -view.top)
  drawGrid(context, scene, view, palette)
  drawImages(context, scene)
  const weights = linkWeights(scene)
  if (!weights) drawOverview(context, scene, palette)
  else drawLinks(context, scene, palette)
  drawNodes(context, scene, view, palette, weights)
  drawChips(context, scene, palette, weights)
  context.restore()
  drawAxes(context, scene, view, palette)
}

function drawGrid(context: CanvasRenderingContext2D, { layout }: Scene, view: Viewport, palette: Palette): void {
  context.fillStyle = palette.wash
  layout.rows.forEach((row, index) => {
    if (index % 2) context.fillRect(view.left, row.top, view.width, row.bottom - row.top)
  })
  context.strokeStyle = palette.line
  context.lineWidth = 1
  context.beginPath()
  const [top, bottom] = [layout.rows[0].bottom, layout.rows[layout.rows.length - 1].bottom]
  for (const column of layout.columns) {
    if (column.right < view.left || column.left > view.left + view.width) continue
    const x = Math.round(column.right) + 0.5
    context.moveTo(x, top)
    context.lineTo(x, bottom)
  }
  context.stroke()
}

function drawImages(context: CanvasRenderingContext2D, { layout, images }: Scene): void {
  for (const place of layout.images) {
    const image = images[place.index]
    if (!image) continue
    context.imageSmoothingEnabled = image.naturalWidth > place.width
    context.drawImage(image, place.left, place.top, place.width, place.height)
  }
}

/** Weight of every node linked to the selected one, over the strongest; null if nothing is selected. */
function linkWeights({ links, linkType, selected }: Scene): Map<number, number> | null {
  if (!links || selected < 0) return null
  const weights = new Map<number, number>()
  const sides = [linkType !== 'outputs' && links.inputs, linkType !== 'inputs' && links.outputs]
  for (const side of sides) {
    if (!side) continue
    const strongest = Math.abs(side.weight[0] ?? 0) || 1
    side.node.forEach((node, at) => weights.set(node, side.weight[at] / strongest))
  }
  return weights
}

function curve(context: CanvasRenderingContext2D, { x, y }: Layout, source: number, target: number): void {
  const middle = (y[source] + y[target]) / 2
  context.moveTo(x[source], y[source])
  context.bezierCurveTo(x[source], middle, x[target], middle, x[target], y[target])
}

function drawOverview(context: CanvasRenderingContext2D, { overview, layout, visible }: Scene, palette: Palette): void {
  if (!overview) return
  // Three strokes in all, one per strength: thousands of separate ones would take the time of everything else.
  const strongest = overview.share.length
  for (const [from, to, alpha, width] of [
    [600, strongest, 0.05, 0.8],
    [120, 600, 0.12, 0.9],
    [0, 120, 0.28, 1.2],
  ]) {
    context.globalAlpha = alpha
    context.lineWidth = width
    context.strokeStyle = palette.soft
    context.beginPath()
    for (let edge = from; edge < Math.min(to, strongest); edge++) {
      const [source, target] = [overview.source[edge], overview.target[edge]]
      if (visible[source] && visible[target]) curve(context, layout, source, target)
    }
    context.stroke()
  }
  context.globalAlpha = 1
}

function drawLinks(context: CanvasRenderingContext2D, scene: Scene, palette: Palette): void {
  const { links, linkType, selected, layout, visible } = scene
  if (!links || !visible[selected]) return
  const sides = [
    { side: links.inputs, shown: linkType !== 'outputs', isInput: true },
    { side: links.outputs, shown: linkType !== 'inputs', isInput: false },
  ]
  for (const { side, shown, isInput } of sides) {
    if (!shown) continue
    const strongest = Math.abs(side.weight[0] ?? 0) || 1
    // Weakest first, so that strong links end on top.
    for (let at = Math.min(side.node.length, MOST_LINKS) - 1; at >= 0; at--) {
      const other = side.node[at]
      if (!visible[other]) continue
      const strength = Math.abs(side.weight[at]) / strongest
      context.globalAlpha = 0.18 + 0.72 * strength
      context.lineWidth = 0.6 + 3.2 * strength
      context.strokeStyle = side.weight[at] < 0 ? palette.negative : palette.positive
      context.beginPath()
      curve(context, layout, isInput ? other : selected, isInput ? selected : other)
      context.stroke()
    }
  }
  context.globalAlpha = 1
}

function shape(context: CanvasRenderingContext2D, kind: number, x: number, y: number, r: number): void {
  if (kind === ERROR) {
    context.moveTo(x, y - r)
    context.lineTo(x + r, y)
    context.lineTo(x, y + r)
    context.lineTo(x - r, y)
    context.closePath()
  } else if (kind === EMBEDDING) {
    context.rect(x - r, y - r, 2 * r, 2 * r)
  } else if (kind === BIAS) {
    context.moveTo(x, y - r)
    context.lineTo(x + r, y + r)
    context.lineTo(x - r, y + r)
    context.closePath()
  } else {
    context.moveTo(x + r, y)
    context.arc(x, y, r, 0, 2 * Math.PI)
  }
}

function drawNodes(
  context: CanvasRenderingContext2D,
  scene: Scene,
  view: Viewport,
  palette: Palette,
  weights: Map<number, number> | null,
): void {
  const { graph, layout, visible, pinned, found, selected, hovered } = scene
  const { x, y, radius, patchWidth } = layout
  const { kind } = graph.data.nodes
  const quiet: number[] = []
  const special: number[] = []
  for (let node = 0; node < graph.size; node++) {
    if (!visible[node] || kind[node] === LOGIT) continue
    if (x[node] < view.left - 20 || x[node] > view.left + view.width + 20) continue
    if (y[node] < view.top - 20 || y[node] > view.top + view.height + 20) continue
    const isSpecial = node === selected || node === hovered || pinned.has(node) || found?.has(node) || weights?.has(node)
    ;(isSpecial ? special : quiet).push(node)
  }
  // The many ordinary nodes: one path per look.
  const isDimmed = weights !== null || found !== null
  for (const [wanted, colour] of [
    [0, palette.node],
    [ERROR, palette.error],
    [EMBEDDING, palette.soft],
    [BIAS, palette.soft],
  ] as const) {
    context.globalAlpha = isDimmed ? 0.28 : 0.9
    context.fillStyle = context.strokeStyle = colour
    context.lineWidth = 1.1
    context.beginPath()
    for (const node of quiet) {
      if (kind[node] !== wanted || patchWidth[node]) continue
      shape(context, wanted, x[node], y[node], wanted === ERROR ? radius[node] * 0.95 : radius[node])
    }
    if (wanted === ERROR) context.stroke()
    else context.fill()
  }
  context.globalAlpha = 1
  for (const node of special) drawSpecial(context, scene, palette, weights, node)
}

function drawSpecial(
  context: CanvasRenderingContext2D,
  { graph, layout, pinned, found, selected, hovered }: Scene,
  palette: Palette,
  weights: Map<number, number> | null,
  node: number,
): void {
  const { x, y, radius, patchWidth, patchHeight, alike } = layout
  const kind = graph.data.nodes.kind[node]
  const weight = weights?.get(node)
  const isSelected = node === selected
  const path = (grow: number) => {
    context.beginPath()
    const [w, h] = [patchWidth[node] + 2 * grow, patchHeight[node] + 2 * grow]
    if (patchWidth[node]) {
      context.rect(x[node] - w / 2, y[node] - h / 2, w, h)
      for (const [left, top] of alike.get(node) ?? []) context.rect(left - w / 2, top - h / 2, w, h)
    } else shape(context, kind, x[node], y[node], radius[node] + grow)
  }
  if (weight !== undefined || !patchWidth[node]) {
    path(isSelected ? 2 : 0.6)
    context.fillStyle = palette.paper
    if (!patchWidth[node]) context.fill()
    context.fillStyle = isSelected ? palette.accent : weight === undefined ? palette.node : weight < 0 ? palette.negative : palette.positive
    const strength = patchWidth[node] ? 0.75 * Math.abs(weight ?? 0) : 0.25 + 0.75 * Math.abs(weight ?? 0)
    context.globalAlpha = isSelected || weight === undefined ? 1 : strength
    context.fill()
    context.globalAlpha = 1
  }
  const ring = (grow: number, colour: string, width: number) => {
    path(grow)
    context.strokeStyle = colour
    context.lineWidth = width
    context.stroke()
  }
  if (found?.has(node)) ring(2.5, palette.found, 2.2)
  if (pinned.has(node)) ring(1.6, palette.ink, 1.6)
  if (isSelected) ring(3.4, palette.accent, 2)
  else if (node === hovered) ring(2.6, palette.ink, 1.2)
}

function drawChips(
  context: CanvasRenderingContext2D,
  { layout, selected, hovered, pinned, found }: Scene,
  palette: Palette,
  weights: Map<number, number> | null,
): void {
  context.textBaseline = 'middle'
  context.textAlign = 'left'
  for (const { node, left, top, width, height, text } of layout.chips) {
    const weight = weights?.get(node)
    const isSelected = node === selected
    context.beginPath()
    context.roundRect(left, top, width, height, 6)
    context.fillStyle = isSelected ? palette.accent : palette.paper
    context.fill()
    if (weight !== undefined) {
      context.globalAlpha = 0.12 + 0.35 * Math.abs(weight)
      context.fillStyle = weight < 0 ? palette.negative : palette.positive
      context.fill()
      context.globalAlpha = 1
    }
    const isLoud = pinned.has(node) || node === hovered
    context.strokeStyle = found?.has(node) ? palette.found : isLoud ? palette.ink : isSelected ? palette.accent : palette.faint
    context.lineWidth = found?.has(node) ? 2.2 : isLoud ? 1.6 : 1
    context.stroke()
    context.fillStyle = isSelected ? palette.onAccent : palette.ink
    context.fillText(text, left + 8, top + height / 2 + 0.5)
  }
}

/** Layer numbers at the left and tokens below stay in place while the graph scrolls under them. */
function drawAxes(context: CanvasRenderingContext2D, { layout }: Scene, view: Viewport, palette: Palette): void {
  context.fillStyle = palette.paper
  context.fillRect(0, view.height - layout.gutter, view.width, layout.gutter)
  context.fillRect(0, 0, GUTTER_LEFT - 4, view.height)
  context.strokeStyle = palette.line
  context.lineWidth = 1
  context.beginPath()
  context.moveTo(GUTTER_LEFT - 4.5, 0)
  context.lineTo(GUTTER_LEFT - 4.5, view.height - layout.gutter + 0.5)
  context.lineTo(view.width, view.height - layout.gutter + 0.5)
  context.stroke()
  context.fillStyle = palette.soft
  context.textBaseline = 'middle'
  context.textAlign = 'right'
  let last = -Infinity
  for (const row of layout.rows) {
    const y = (row.top + row.bottom) / 2 - view.top
    const isInView = y > 4 && y < view.height - layout.gutter - 4
    if (!isInView || y - last < 13) continue
    context.fillText(row.label, GUTTER_LEFT - 11, y)
    last = y
  }
  drawTokens(context, layout, view, palette)
}

function drawTokens(context: CanvasRenderingContext2D, layout: Layout, view: Viewport, palette: Palette): void {
  const y = view.height - layout.gutter
  context.save()
  context.beginPath()
  context.rect(0, y, view.width, layout.gutter)
  context.clip()
  context.fillStyle = palette.ink
  let free = -Infinity // x from which on a slanted label does not run into the last one
  for (const column of layout.columns) {
    const x = (column.left + column.right) / 2 - view.left
    if (x < GUTTER_LEFT - 10 || x > view.width + 10) continue
    const text = column.label
    const width = context.measureText(text).width
    if (width + 8 <= column.right - column.left) {
      context.textAlign = 'center'
      context.fillText(text, x, y + 15)
      free = x + width / 2
    } else if (x > free) {
      context.save()
      context.translate(x + 4, y + 9)
      context.rotate(-Math.PI / 4)
      context.textAlign = 'right'
      context.fillText(shorten(text, 10), 0, 0)
      context.restore()
      free = x + 13
    }
  }
  context.restore()
}
