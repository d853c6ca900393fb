import { describe, expect, it } from 'vitest'
import { Csr, decodeEdges } from './edges'
import { number, percent, token } from './format'
import { Graph } from './graph'
import { layOut, neighbour, nodeAt } from './layout'
import { BOX_HEIGHT, BOX_WIDTH, joinLinks, makeBoxes, place } from './subgraph'
import { EMBEDDING, FEATURE, LOGIT, type GraphData } from './types'

/** Three tokens, `perCell` features at each of 4 layers and positions, two outputs. */
function sample(perCell = 2): Graph {
  const nodes: GraphData['nodes'] = { id: [], kind: [], layer: [], position: [], feature: [], activation: [], influence: [], probability: [], label: [] }
  const add = (kind: number, layer: number, position: number, feature: number, label = '') => {
    nodes.id.push(`${layer}_${feature}_${position}_${nodes.id.length}`)
    nodes.kind.push(kind)
    nodes.layer.push(layer)
    nodes.position.push(position)
    nodes.feature.push(feature)
    nodes.activation.push(kind === FEATURE ? 1 : null)
    nodes.influence.push(kind === FEATURE ? (nodes.id.length % 10) / 10 : 0)
    nodes.probability.push(kind === LOGIT ? 0.5 : null)
    nodes.label.push(label)
  }
  for (let layer = 0; layer < 4; layer++)
    for (let position = 0; position < 3; position++) for (let n = 0; n < perCell; n++) add(FEATURE, layer, position, n)
  for (let position = 0; position < 3; position++) add(EMBEDDING, -1, position, -1)
  add(LOGIT, 4, 2, -1, ' yes')
  add(LOGIT, 4, 2, -1, ' no')
  return new Graph({
    slug: 's', prompt: 'p', model: '', n_layers: 4, tokens: ['<s>', ' Dallas', ' is'], nodes, n_edges: 0, n_edges_here: 0,
    scores: {}, images: [], explained: { '1/1': { text: 'Texas', source: 'm', detection: null, fuzzing: null } },
    notes: { pinned: [], supernodes: [], labels: {}, threshold: null }, threshold: null, has_examples: false,
  })
}

const space = { width: 900, height: 420, zoom: 1, textWidth: (text: string) => text.length * 7 }
const all = (graph: Graph) => new Uint8Array(graph.size).fill(1)

describe('numbers and tokens', () => {
  it('are readable', () => {
    expect(number(0.00012)).toBe('1.2e-4')
    expect(number(12.50)).toBe('12.5')
    expect(percent(0.0004)).toBe('<0.1%')
    expect(token('Ġthe')).toBe('the')
    expect(token('\n')).toBe('⏎')
    expect(token('  ')).toBe('␣␣')
  })
})

describe('the link graph', () => {
  it('puts no two nodes in one place and all inside', () => {
    for (const perCell of [1, 5, 40]) {
      const graph = sample(perCell)
      const layout = layOut(graph, all(graph), space)
      const places = new Set<string>()
      for (let node = 0; node < graph.size; node++) {
        places.add(`${layout.x[node].toFixed(1)} ${layout.y[node].toFixed(1)}`)
        expect(layout.x[node]).toBeGreaterThan(0)
        expect(layout.x[node]).toBeLessThan(layout.width)
        expect(layout.y[node]).toBeLessThan(layout.height)
      }
      expect(places.size).toBe(graph.size)
    }
  })

  it('has later layers higher up and outputs on top', () => {
    const graph = sample()
    const { y } = layOut(graph, all(graph), space)
    const { layer } = graph.data.nodes
    for (let a = 0; a < graph.size; a++) for (let b = 0; b < graph.size; b++) if (layer[a] > layer[b]) expect(y[a]).toBeLessThan(y[b])
  })

  it('finds the node under a point, and the next one in a direction', () => {
    const graph = sample()
    const layout = layOut(graph, all(graph), space)
    for (let node = 0; node < graph.size; node++) expect(nodeAt(graph, layout, all(graph), layout.x[node], layout.y[node])).toBe(node)
    const up = neighbour(layout, all(graph), 0, 0, -1)
    expect(graph.data.nodes.layer[up]).toBe(1)
  })

  it('hides by influence, but never what is pinned, an embedding or an output', () => {
    const graph = sample()
    const mask = graph.visible({ threshold: 0.2, errors: true, bias: true }, new Set([7]))
    for (let node = 0; node < graph.size; node++) {
      const shown = graph.kind(node) !== FEATURE || node === 7 || (graph.data.nodes.influence[node] ?? 0) <= 0.2
      expect(mask[node]).toBe(shown ? 1 : 0)
    }
  })

  it('is searched by label, token, layer and position', () => {
    const graph = sample()
    expect(graph.search('texas', {}).length).toBe(3)
    expect(graph.search('texas', { '1/1': 'Utah' })).toEqual([])
    const found = graph.search('l2 p1', {})
    expect(found.map((node) => [graph.data.nodes.layer[node], graph.data.nodes.position[node]])).toEqual([[2, 1], [2, 1]])
  })
})

describe('edges of a saved page', () => {
  const csr = new Csr(Uint32Array.of(0, 1, 1), Uint32Array.of(2, 2, 3), Float32Array.of(2, -1, 4), 4, Float32Array.of(0, 0, 6, 4))

  it('answer as the server does', () => {
    expect(csr.links(2).inputs).toEqual({ node: [0, 1], weight: [2, -1], count: 2, total: 6 })
    expect(csr.links(1).outputs.node).toEqual([3, 2])
    expect(csr.among([1, 2])).toEqual({ source: [1], target: [2], weight: [-1], share: [-1 / 6] })
  })

  it('are refused when cut off', () => {
    expect(() => decodeEdges(btoa('abcdefgh'), 1)).toThrow(/cut off/)
  })
})

describe('the subgraph', () => {
  it('sums links of supernodes and lets no boxes overlap', () => {
    const graph = sample()
    const pinned = new Set([0, 1, 2, 8, 14, 20, graph.size - 1])
    const boxes = makeBoxes(graph, pinned, [{ name: 'group', nodes: [0, 1] }], String)
    const edges = { source: [0, 1, 0], target: [8, 8, 1], weight: [1, 2, 9], share: [0.1, 0.2, 0.9] }
    const links = joinLinks(boxes, edges)
    expect(links.map(({ weight }) => weight)).toEqual([3])
    const picture = place(boxes, links, 700)
    for (const a of picture.boxes)
      for (const b of picture.boxes)
        if (a !== b) expect(Math.abs(a.x - b.x) >= BOX_WIDTH || Math.abs(a.y - b.y) >= BOX_HEIGHT).toBe(true)
  })
})
