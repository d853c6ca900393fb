/** A graph as the page uses it: columns, names, filters and search. All of it plain functions over arrays. */

import { percent, token } from './format'
import { BIAS, EMBEDDING, ERROR, FEATURE, KINDS, LOGIT, type GraphData, type Patch } from './types'

export interface Filter {
  /** Nodes whose cumulative influence is above this are hidden; 1 shows all. */
  threshold: number
  errors: boolean
  bias: boolean
}

export class Graph {
  readonly size: number
  readonly byId: Map<string, number>
  /** Positions that are patches of an image. */
  readonly patchOf: Map<number, { image: number; patch: Patch }>
  /** All patches that the embedding node at a position stands for. */
  readonly patchesOf: Map<number, Patch[]>

  /** What search looks through, made once for the labels at hand. */
  private searchable: { labels: Record<string, string>; texts: string[] } | null = null

  constructor(readonly data: GraphData) {
    this.size = data.nodes.id.length
    this.byId = new Map(data.nodes.id.map((id, node) => [id, node]))
    this.patchOf = new Map()
    this.patchesOf = new Map()
    data.images.forEach((image, index) => {
      for (const patch of image.patches) {
        this.patchOf.set(patch[0], { image: index, patch })
        const alike = this.patchesOf.get(patch[7])
        if (alike) alike.push(patch)
        else this.patchesOf.set(patch[7], [patch])
      }
    })
  }

  kind(node: number): number {
    return this.data.nodes.kind[node]
  }

  /** "layer/feature": what labels are kept under. */
  featureKey(node: number): string {
    return `${this.data.nodes.layer[node]}/${this.data.nodes.feature[node]}`
  }

  tokenAt(position: number): string {
    return token(this.data.tokens[position] ?? '')
  }

  /** The label a reader, `clt explain` or the file gave; empty for none. */
  givenLabel(node: number, labels: Record<string, string>): string {
    const { nodes, explained } = this.data
    if (nodes.kind[node] !== FEATURE) return nodes.label[node]
    const key = this.featureKey(node)
    return labels[key] ?? explained[key]?.text ?? nodes.label[node]
  }

  name(node: number, labels: Record<string, string>): string {
    const { nodes } = this.data
    const kind = nodes.kind[node]
    const more = kind === EMBEDDING || kind === ERROR ? (this.patchesOf.get(nodes.position[node])?.length ?? 1) - 1 : 0
    const place = this.placeName(nodes.position[node]) + (more > 0 ? ` and ${more} like it` : '')
    if (kind === LOGIT) return `${this.logitToken(node)} ${percent(nodes.probability[node] ?? 0)}`
    if (kind === EMBEDDING) return place
    if (kind === BIAS) return 'Bias'
    if (kind === ERROR) return `Error, layer ${nodes.layer[node]}, ${place}`
    return this.givenLabel(node, labels) || `Feature ${nodes.layer[node]}/${nodes.feature[node]}`
  }

  logitToken(node: number): string {
    const label = this.data.nodes.label[node]
    return label ? token(label) || label : this.data.nodes.id[node]
  }

  placeName(position: number): string {
    const found = this.patchOf.get(position)
    if (found) {
      const image = this.data.images.length > 1 ? `image ${found.image + 1}, ` : ''
      return `${image}patch ${found.patch[1] + 1}, ${found.patch[2] + 1}`
    }
    return `“${this.tokenAt(position)}”`
  }

  describe(node: number, labels: Record<string, string>): string {
    const { nodes } = this.data
    const kind = KINDS[nodes.kind[node]]
    return `${this.name(node, labels)}; ${kind}, layer ${nodes.layer[node]}, at ${this.placeName(nodes.position[node])}`
  }

  /** 1 where a node is shown. */
  visible(filter: Filter, pinned: ReadonlySet<number>): Uint8Array {
    const { kind, influence } = this.data.nodes
    const mask = new Uint8Array(this.size)
    for (let node = 0; node < this.size; node++) {
      const k = kind[node]
      if (pinned.has(node) || k === EMBEDDING || k === LOGIT) mask[node] = 1
      else if (k === ERROR && !filter.errors) continue
      else if (k === BIAS) mask[node] = filter.bias ? 1 : 0
      else mask[node] = (influence[node] ?? 0) <= filter.threshold ? 1 : 0
    }
    return mask
  }

  /** Nodes matching every word of the query, in their name, token, id, "l7", "p3" or kind. */
  search(query: string, labels: Record<string, string>): number[] {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean).map((word) => (/^[lp]\d+$/.test(word) ? ` ${word} ` : word))
    if (!words.length) return []
    if (this.searchable?.labels !== labels) {
      this.searchable = { labels, texts: Array.from({ length: this.size }, (_, node) => this.searchText(node, labels)) }
    }
    const { texts } = this.searchable
    const found: number[] = []
    for (let node = 0; node < this.size; node++) if (words.every((word) => texts[node].includes(word))) found.push(node)
    return found
  }

  private searchText(node: number, labels: Record<string, string>): string {
    const { nodes } = this.data
    const layer = nodes.kind[node] === LOGIT ? 'output' : `l${nodes.layer[node]}`
    const parts = [this.name(node, labels), KINDS[nodes.kind[node]], `${layer}/${nodes.feature[node]}`]
    parts.push(` ${layer} p${nodes.position[node]} `, this.tokenAt(nodes.position[node]), nodes.id[node])
    return parts.join(' ').toLowerCase()
  }

  /** Nodes by influence, most influential first; outputs first, embeddings and the bias last. */
  ranked(mask: Uint8Array): number[] {
    const { kind, influence } = this.data.nodes
    const rank = (node: number) => {
      if (kind[node] === LOGIT) return -1
      return (influence[node] ?? 2) + (kind[node] === FEATURE ? 0 : kind[node] === ERROR ? 2 : 4)
    }
    const shown: number[] = []
    for (let node = 0; node < this.size; node++) if (mask[node]) shown.push(node)
    return shown.sort((a, b) => rank(a) - rank(b) || a - b)
  }
}
