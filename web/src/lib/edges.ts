/** Edges of a self-contained page: decoding, and the questions the server answers otherwise. */

import type { EdgeSet, Links, NodeLinks } from './types'

export class Csr {
  private readonly inStart: Uint32Array
  private readonly inEdge: Uint32Array
  private readonly outStart: Uint32Array
  private readonly outEdge: Uint32Array
  private readonly inTotal: Float64Array

  constructor(
    readonly source: Uint32Array,
    readonly target: Uint32Array,
    readonly weight: Float32Array,
    nNodes: number,
    totals: Float32Array,
  ) {
    ;[this.inStart, this.inEdge] = bucket(target, nNodes)
    ;[this.outStart, this.outEdge] = bucket(source, nNodes)
    this.inTotal = Float64Array.from(totals)
  }

  links(node: number): NodeLinks {
    return {
      inputs: this.side(this.inStart, this.inEdge, node, this.source),
      outputs: this.side(this.outStart, this.outEdge, node, this.target),
    }
  }

  among(nodes: number[]): EdgeSet {
    const wanted = new Set(nodes)
    const edges: number[] = []
    for (const node of wanted)
      for (let at = this.inStart[node]; at < this.inStart[node + 1]; at++)
        if (wanted.has(this.source[this.inEdge[at]])) edges.push(this.inEdge[at])
    return this.take(edges)
  }

  take(edges: number[]): EdgeSet {
    return {
      source: edges.map((edge) => this.source[edge]),
      target: edges.map((edge) => this.target[edge]),
      weight: edges.map((edge) => this.weight[edge]),
      share: edges.map((edge) => this.share(edge)),
    }
  }

  share(edge: number): number {
    return this.weight[edge] / Math.max(this.inTotal[this.target[edge]], 1e-12)
  }

  private side(start: Uint32Array, list: Uint32Array, node: number, other: Uint32Array): Links {
    const edges = Array.from(list.subarray(start[node], start[node + 1]))
    edges.sort((a, b) => Math.abs(this.weight[b]) - Math.abs(this.weight[a]))
    const sum = edges.reduce((total, edge) => total + Math.abs(this.weight[edge]), 0)
    return {
      node: edges.map((edge) => other[edge]),
      weight: edges.map((edge) => this.weight[edge]),
      count: edges.length,
      total: other === this.source ? Math.max(this.inTotal[node], sum) : sum,
    }
  }
}

/** The edges' numbers sorted into one list per node: [start of each node's part, edge numbers]. */
function bucket(node: Uint32Array, nNodes: number): [Uint32Array, Uint32Array] {
  const start = new Uint32Array(nNodes + 1)
  for (const n of node) start[n + 1]++
  for (let n = 0; n < nNodes; n++) start[n + 1] += start[n]
  const next = start.slice()
  const edges = new Uint32Array(node.length)
  node.forEach((n, edge) => (edges[next[n]++] = edge))
  return [start, edges]
}

/**
 * Base64 of little-endian arrays: source uint32[n], target uint32[n], weight float32[n], then the sum of absolute
 * weights into each node, float32[nNodes]. Sorted by what an edge carries, strongest first.
 */
export function decodeEdges(base64: string, nNodes: number): Csr {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))
  const n = (bytes.length / 4 - nNodes) / 3
  if (!Number.isInteger(n) || n < 0) throw new Error('The edges of this page are cut off; save it again.')
  const part = (index: number) => bytes.buffer.slice(index * n * 4, (index + 1) * n * 4)
  const totals = new Float32Array(bytes.buffer.slice(3 * n * 4))
  return new Csr(new Uint32Array(part(0)), new Uint32Array(part(1)), new Float32Array(part(2)), nNodes, totals)
}

export function strongestFirst(edges: Csr, count: number): EdgeSet {
  return edges.take(Array.from({ length: Math.min(count, edges.source.length) }, (_, edge) => edge))
}
