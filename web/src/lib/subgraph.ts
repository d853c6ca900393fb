/** The subgraph of pinned nodes: supernodes joined, links summed, boxes placed so that they do not overlap. */

import type { Graph } from './graph'
import type { EdgeSet } from './types'

export const BOX_WIDTH = 138
export const BOX_HEIGHT = 40
const GAP_X = 18
const GAP_Y = 26

export interface Box {
  key: string
  name: string
  nodes: number[]
  isGroup: boolean
  /** Mean layer and position of its nodes. */
  layer: number
  position: number
  x: number
  y: number
}

export interface Link {
  source: Box
  target: Box
  weight: number
  /** Its part of everything that enters the target's nodes. */
  share: number
}

export interface Picture {
  boxes: Box[]
  links: Link[]
  width: number
  height: number
}

export function makeBoxes(
  graph: Graph,
  pinned: ReadonlySet<number>,
  groups: { name: string; nodes: number[] }[],
  name: (node: number) => string,
): Box[] {
  const { id } = graph.data.nodes
  const grouped = new Set(groups.flatMap((group) => group.nodes))
  const boxes = groups.map((group) => box(graph, `group ${group.name} ${id[group.nodes[0]]}`, group.name, group.nodes, true))
  for (const node of pinned) if (!grouped.has(node)) boxes.push(box(graph, id[node], name(node), [node], false))
  return boxes
}

function box(graph: Graph, key: string, name: string, nodes: number[], isGroup: boolean): Box {
  const mean = (column: number[]) => nodes.reduce((sum, node) => sum + column[node], 0) / nodes.length
  const { layer, position } = graph.data.nodes
  return { key, name, nodes, isGroup, layer: mean(layer), position: mean(position), x: 0, y: 0 }
}

/** Links between boxes: weights of their nodes' links summed, those inside a box left out. */
export function joinLinks(boxes: Box[], edges: EdgeSet): Link[] {
  const boxOf = new Map<number, Box>()
  for (const box of boxes) for (const node of box.nodes) boxOf.set(node, box)
  const links = new Map<string, Link>()
  edges.source.forEach((from, at) => {
    const source = boxOf.get(from)
    const target = boxOf.get(edges.target[at])
    if (!source || !target || source === target) return
    const key = `${source.key}\n${target.key}`
    const link = links.get(key) ?? { source, target, weight: 0, share: 0 }
    link.weight += edges.weight[at]
    link.share += edges.share[at] / target.nodes.length
    links.set(key, link)
  })
  return [...links.values()].sort((a, b) => Math.abs(a.share) - Math.abs(b.share))
}

/** Rows by layer, within one by position and by what is linked. */
export function place(boxes: Box[], links: Link[], width: number): Picture {
  const perRow = Math.max(1, Math.floor((width - 16 + GAP_X) / (BOX_WIDTH + GAP_X)))
  const rows = makeRows(boxes, links, perRow)
  rows.forEach((row) => row.sort((a, b) => a.position - b.position || a.layer - b.layer))
  rows.forEach((row) => spread(row, width))
  for (let pass = 0; pass < 4; pass++) {
    for (const row of rows) {
      const pull = new Map(row.map((box) => [box, barycentre(box, links)]))
      row.sort((a, b) => (pull.get(a) ?? 0) - (pull.get(b) ?? 0))
      spread(row, width)
    }
  }
  rows.forEach((row, at) => row.forEach((box) => (box.y = 12 + at * (BOX_HEIGHT + GAP_Y))))
  return { boxes, links, width, height: 12 + rows.length * (BOX_HEIGHT + GAP_Y) - GAP_Y + 14 }
}

/** Higher layers first; boxes of other layers join a row that has room and nothing they are linked with. */
function makeRows(boxes: Box[], links: Link[], perRow: number): Box[][] {
  const strongest = Math.max(0, ...links.map(({ share }) => Math.abs(share)))
  const strong = links.filter(({ share }) => Math.abs(share) > 0.08 * strongest)
  const linked = new Set(strong.map((link) => `${link.source.key}\n${link.target.key}`))
  const top = Math.max(...boxes.map(({ layer }) => layer))
  const sorted = [...boxes].sort((a, b) => b.layer - a.layer || a.position - b.position)
  const rows: Box[][] = []
  for (const box of sorted) {
    const row = rows[rows.length - 1]
    const joins = row && row.length < perRow && (row[0].layer < top || box.layer === top) && row.every((other) => !linked.has(`${box.key}\n${other.key}`))
    if (joins) row.push(box)
    else rows.push([box])
  }
  return rows
}

function spread(row: Box[], width: number): void {
  const step = Math.min((width - 16) / row.length, (BOX_WIDTH + GAP_X) * 2)
  row.forEach((box, at) => (box.x = width / 2 + (at - (row.length - 1) / 2) * step - BOX_WIDTH / 2))
}

function barycentre(box: Box, links: Link[]): number {
  let [sum, weight] = [box.x * 0.05, 0.05]
  for (const link of links) {
    const other = link.source === box ? link.target : link.target === box ? link.source : null
    if (!other) continue
    sum += other.x * Math.abs(link.share)
    weight += Math.abs(link.share)
  }
  return sum / weight
}

/** The text in at most two lines of about 20 letters. */
export function twoLines(text: string): string[] {
  const limit = 21
  if (text.length <= limit) return [text]
  const cut = text.lastIndexOf(' ', limit)
  const at = cut > 8 ? cut : limit
  const rest = text.slice(at).trim()
  return [text.slice(0, at), rest.length > limit ? `${rest.slice(0, limit - 1).trimEnd()}…` : rest]
}
