/** Where graphs come from: the server, or the data embedded in a self-contained page. */

import { decodeEdges, strongestFirst, type Csr } from './edges'
import type {
  EdgeSet,
  FeatureExamples,
  GraphData,
  Library,
  NodeLinks,
  Notes,
  SteerAnswer,
  SteerRequest,
} from './types'

export interface Source {
  library(): Promise<Library>
  graph(slug: string): Promise<GraphData>
  links(slug: string, node: number): Promise<NodeLinks>
  /** The most influential edges of the whole graph, for the background. */
  overview(slug: string): Promise<EdgeSet>
  among(slug: string, nodes: number[]): Promise<EdgeSet>
  examples(slug: string, layer: number, feature: number): Promise<FeatureExamples | null>
  save(slug: string, notes: Notes): Promise<void>
  steer(slug: string, request: SteerRequest): Promise<SteerAnswer>
}

export class SourceError extends Error {}

async function answer<T>(path: string, init?: RequestInit): Promise<T> {
  let response: Response
  try {
    response = await fetch(path, init)
  } catch {
    throw new SourceError('The server does not answer. Is `clt serve graphs` still running?')
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null)
    const detail = typeof body?.detail === 'string' ? body.detail : `${response.status} ${response.statusText}`
    throw new SourceError(detail)
  }
  return response.json()
}

function send<T>(path: string, method: 'POST' | 'PUT', body: unknown): Promise<T> {
  const text = JSON.stringify(body)
  const headers = { 'Content-Type': 'application/json' }
  // Notes are also sent while the page closes; browsers allow that for 64 kB.
  return answer<T>(path, { method, headers, body: text, keepalive: method === 'PUT' && text.length < 50_000 })
}

export class ServerSource implements Source {
  private readonly kept = new Map<string, NodeLinks>()

  library() {
    return answer<Library>('api/graphs')
  }

  graph(slug: string) {
    return answer<GraphData>(this.path(slug))
  }

  async links(slug: string, node: number) {
    const key = `${slug}\n${node}`
    const known = this.kept.get(key)
    if (known) return known
    const links = await answer<NodeLinks>(`${this.path(slug)}/links/${node}`)
    if (this.kept.size > 500) this.kept.clear()
    this.kept.set(key, links)
    return links
  }

  overview(slug: string) {
    return answer<EdgeSet>(`${this.path(slug)}/overview`)
  }

  among(slug: string, nodes: number[]) {
    return send<EdgeSet>(`${this.path(slug)}/among`, 'POST', { nodes })
  }

  examples(slug: string, layer: number, feature: number) {
    return answer<FeatureExamples | null>(`${this.path(slug)}/features/${layer}/${feature}`)
  }

  async save(slug: string, notes: Notes) {
    await send(`${this.path(slug)}/notes`, 'PUT', notes)
  }

  steer(slug: string, request: SteerRequest) {
    return send<SteerAnswer>(`${this.path(slug)}/steer`, 'POST', request)
  }

  private path(slug: string) {
    return `api/graphs/${encodeURIComponent(slug)}`
  }
}

export interface Embedded {
  graph: GraphData
  /** Base64 of the edges, see decodeEdges. */
  edges: string
  /** "layer/feature" -> examples. */
  examples: Record<string, FeatureExamples>
}

/** Notes stay in this browser's storage: a file cannot be written from a page. */
export class EmbeddedSource implements Source {
  private readonly edges: Csr

  constructor(private readonly data: Embedded) {
    this.edges = decodeEdges(data.edges, data.graph.nodes.id.length)
  }

  async library(): Promise<Library> {
    const { slug, prompt, model, nodes, n_edges } = this.data.graph
    const summary = { slug, prompt, model, n_nodes: nodes.id.length, n_edges }
    return { graphs: [summary], folder: '', can_steer: false, can_save: false, refused: [] }
  }

  async graph(): Promise<GraphData> {
    const saved = readStorage(this.key())
    return { ...this.data.graph, notes: saved ? { ...this.data.graph.notes, ...JSON.parse(saved) } : this.data.graph.notes }
  }

  async links(_: string, node: number) {
    return this.edges.links(node)
  }

  async overview() {
    return strongestFirst(this.edges, 1500)
  }

  async among(_: string, nodes: number[]) {
    return this.edges.among(nodes)
  }

  async examples(_: string, layer: number, feature: number) {
    return this.data.examples[`${layer}/${feature}`] ?? null
  }

  async save(_: string, notes: Notes) {
    try {
      localStorage.setItem(this.key(), JSON.stringify(notes))
    } catch {
      throw new SourceError('This browser keeps no storage for local files; export the notes instead.')
    }
  }

  async steer(): Promise<SteerAnswer> {
    throw new SourceError('A saved page has no model. Start `clt serve graphs` with --model and --transcoder.')
  }

  private key() {
    return `crosslayer-notes:${this.data.graph.slug}`
  }
}

export function readStorage(key: string): string | null {
  try {
    return localStorage.getItem(key)
  } catch {
    return null // storage is switched off: the page works, it only forgets
  }
}

/** The embedded data if this page carries some. */
export function openSource(): Source {
  const element = document.getElementById('graph-data')
  return element?.textContent ? new EmbeddedSource(JSON.parse(element.textContent)) : new ServerSource()
}
