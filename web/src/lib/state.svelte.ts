/** What the reader looks at and has added; every component reads from here. */

import { Graph, type Filter } from './graph'
import { readStorage, type Source } from './source'
import { FEATURE, type EdgeSet, type Library, type NodeLinks, type Notes } from './types'

const SAVE_AFTER_MS = 500

export class AppState {
  library = $state.raw<Library | null>(null)
  graph = $state.raw<Graph | null>(null)
  overview = $state.raw<EdgeSet | null>(null)
  links = $state.raw<NodeLinks | null>(null)
  problem = $state('')
  isLoading = $state(true)
  saved = $state<'' | 'saving' | 'saved' | 'failed'>('')
  saveProblem = $state('')

  selected = $state(-1)
  hovered = $state(-1)
  pinned = $state.raw<ReadonlySet<number>>(new Set())
  supernodes = $state.raw<{ name: string; nodes: number[] }[]>([])
  labels = $state.raw<Record<string, string>>({})
  filter = $state.raw<Filter>({ threshold: 1, errors: true, bias: true })
  linkType = $state<'both' | 'inputs' | 'outputs'>('both')
  query = $state('')

  private passing = $derived(this.graph ? this.graph.visible(this.filter, this.pinned) : new Uint8Array())
  /** The selected node is shown even where the filter hides it (it was found by search, or in a list). */
  visible = $derived.by(() => {
    if (this.selected < 0 || this.passing[this.selected]) return this.passing
    const mask = this.passing.slice()
    mask[this.selected] = 1
    return mask
  })
  nVisible = $derived(this.visible.reduce((sum, one) => sum + one, 0))
  found = $derived(this.graph && this.query.trim() ? this.graph.search(this.query, this.labels) : null)

  private saveTimer: ReturnType<typeof setTimeout> | undefined
  /** Grows with every selection: an answer to an older one is thrown away. */
  private selection = 0

  constructor(readonly source: Source) {}

  async start(): Promise<void> {
    try {
      this.library = await this.source.library()
      const wanted = this.fromAddress('graph')
      const first = this.library.graphs.find((graph) => graph.slug === wanted) ?? this.library.graphs[0]
      if (first) await this.open(first.slug)
    } catch (error) {
      this.problem = message(error)
    }
    this.isLoading = false
  }

  async open(slug: string): Promise<void> {
    this.flush()
    this.isLoading = true
    this.problem = ''
    this.selected = this.hovered = -1
    this.links = this.overview = null
    try {
      const graph = new Graph(await this.source.graph(slug))
      const indices = (ids: string[]) => ids.map((id) => graph.byId.get(id)).filter((node) => node !== undefined)
      const { notes } = graph.data
      this.pinned = new Set(indices(notes.pinned))
      this.supernodes = notes.supernodes
        .map(({ name, nodes }) => ({ name, nodes: indices(nodes) }))
        .filter(({ nodes }) => nodes.length > 0)
      this.labels = notes.labels
      this.filter = { ...this.filter, threshold: notes.threshold ?? graph.data.threshold ?? 1 }
      this.query = ''
      this.saved = ''
      this.graph = graph
      const node = graph.byId.get(this.fromAddress('node') ?? '')
      if (node !== undefined && this.fromAddress('graph') === slug) this.select(node)
      else this.writeAddress()
      this.overview = await this.source.overview(slug)
      setTimeout(() => graph.search('?', this.labels)) // what search looks through, ready before the first key
    } catch (error) {
      this.problem = message(error)
    }
    this.isLoading = false
  }

  select(node: number): void {
    this.selected = node
    this.links = null
    this.writeAddress()
    const turn = ++this.selection
    if (node < 0 || !this.graph) return
    this.source.links(this.graph.data.slug, node).then(
      (links) => {
        if (turn === this.selection) this.links = links
      },
      (error) => {
        if (turn === this.selection) this.problem = message(error)
      },
    )
  }

  togglePin(node: number): void {
    if (node < 0) return
    const pinned = new Set(this.pinned)
    if (!pinned.delete(node)) pinned.add(node)
    this.setPinned(pinned)
  }

  setPinned(pinned: Set<number>): void {
    this.pinned = pinned
    this.setSupernodes(
      this.supernodes.map((group) => ({ ...group, nodes: group.nodes.filter((node) => pinned.has(node)) })),
    )
  }

  setSupernodes(groups: { name: string; nodes: number[] }[]): void {
    this.supernodes = groups.filter((group) => group.nodes.length > 0)
    this.changed()
  }

  group(nodes: number[], name: string): void {
    const taken = new Set(nodes)
    const rest = this.supernodes.map((group) => ({ ...group, nodes: group.nodes.filter((node) => !taken.has(node)) }))
    this.setSupernodes([...rest, { name, nodes }])
  }

  label(node: number, text: string): void {
    if (!this.graph || this.graph.kind(node) !== FEATURE) return
    const labels = { ...this.labels }
    if (text.trim()) labels[this.graph.featureKey(node)] = text.trim()
    else delete labels[this.graph.featureKey(node)]
    this.labels = labels
    this.changed()
  }

  setThreshold(threshold: number): void {
    this.filter = { ...this.filter, threshold }
    this.changed()
  }

  name(node: number): string {
    return this.graph?.name(node, this.labels) ?? ''
  }

  notes(): Notes {
    const id = (node: number) => this.graph?.data.nodes.id[node] ?? ''
    return {
      pinned: [...this.pinned].map(id),
      supernodes: this.supernodes.map(({ name, nodes }) => ({ name, nodes: nodes.map(id) })),
      labels: this.labels,
      threshold: this.filter.threshold,
    }
  }

  private changed(): void {
    clearTimeout(this.saveTimer)
    this.saved = 'saving'
    this.saveTimer = setTimeout(() => this.flush(), SAVE_AFTER_MS)
  }

  /** Write what is not saved yet. */
  flush(): void {
    if (this.saved !== 'saving' || !this.graph) return
    clearTimeout(this.saveTimer)
    this.saved = ''
    this.source.save(this.graph.data.slug, this.notes()).then(
      () => (this.saved = 'saved'),
      (error) => {
        this.saved = 'failed'
        this.saveProblem = message(error)
      },
    )
  }

  private fromAddress(name: string): string | null {
    return new URLSearchParams(location.hash.slice(1)).get(name)
  }

  private writeAddress(): void {
    if (!this.graph) return
    const place = new URLSearchParams({ graph: this.graph.data.slug })
    if (this.selected >= 0) place.set('node', this.graph.data.nodes.id[this.selected])
    history.replaceState(null, '', `#${place}`)
  }
}

export function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

/** Light, dark, or as the system says. */
export function initialTheme(): 'light' | 'dark' {
  const saved = readStorage('crosslayer-theme')
  if (saved === 'light' || saved === 'dark') return saved
  return matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'
}
