/** What the server (or the self-contained page) says about a graph. Kept in step with clt/attribution/view.py. */

export const KINDS = ['feature', 'error', 'embedding', 'logit', 'bias'] as const
export const FEATURE = 0
export const ERROR = 1
export const EMBEDDING = 2
export const LOGIT = 3
export const BIAS = 4

export interface GraphSummary {
  slug: string
  prompt: string
  model: string
  n_nodes: number | null
  n_edges: number | null
}

export interface Library {
  graphs: GraphSummary[]
  folder: string
  can_steer: boolean
  can_save: boolean
  /** Files that look like graphs and could not be read: why. */
  refused: { file: string; reason: string }[]
}

/** Columns of equal length, one entry per node. */
export interface NodeColumns {
  id: string[]
  kind: number[]
  /** -1 for embeddings and the bias, n_layers for logits. */
  layer: number[]
  position: number[]
  /** -1 where the node is no feature. */
  feature: number[]
  activation: (number | null)[]
  /** Share of all influence held by the nodes at least as influential as this one; null where unknown. */
  influence: (number | null)[]
  probability: (number | null)[]
  label: string[]
}

/**
 * [position, row, column, left, top, width, height, group]: the four before the last as shares of the image's size;
 * last, the position whose embedding node stands for the patch (its own, or that of the first of patches like it).
 */
export type Patch = [number, number, number, number, number, number, number, number]

export interface GraphImage {
  src: string
  width: number
  height: number
  patches: Patch[]
}

export interface FeatureLabel {
  text: string
  source: string
  detection: number | null
  fuzzing: number | null
}

export interface Supernode {
  name: string
  nodes: string[]
}

/** What a reader adds to a graph; saved beside it. */
export interface Notes {
  pinned: string[]
  supernodes: Supernode[]
  /** Labels by hand: "layer/feature" -> text. */
  labels: Record<string, string>
  threshold: number | null
}

export interface GraphData {
  slug: string
  prompt: string
  model: string
  n_layers: number
  tokens: string[]
  nodes: NodeColumns
  n_edges: number
  /** Edges this page can show; fewer than n_edges in a self-contained page of a large graph. */
  n_edges_here: number
  scores: Record<string, number>
  images: GraphImage[]
  /** Labels from `clt explain`: "layer/feature" -> label. */
  explained: Record<string, FeatureLabel>
  notes: Notes
  threshold: number | null
  has_examples: boolean
}

export interface Links {
  node: number[]
  weight: number[]
  /** How many there are in all, and the sum of their absolute weights. */
  count: number
  total: number
}

export interface NodeLinks {
  inputs: Links
  outputs: Links
}

export interface EdgeSet {
  source: number[]
  target: number[]
  weight: number[]
  /** Weight over the sum of absolute weights into the target. */
  share: number[]
}

export interface ExampleImage {
  src: string
  rows: number
  columns: number
  /** Activation per patch, row by row. */
  activations: number[]
}

export interface Example {
  tokens: string[]
  tokens_acts_list: number[]
  train_token_ind: number
  images?: ExampleImage[]
}

export interface FeatureExamples {
  examples_quantiles: { quantile_name: string; examples: Example[] }[]
  top_logits?: string[]
  bottom_logits?: string[]
  act_max?: number
  activation_frequency?: number
  histogram?: number[]
  quantile_values?: number[]
  isDead?: boolean
}

export interface SteerRequest {
  layer: number
  feature: number
  position: number | null
  mode: 'scale' | 'add' | 'set'
  value: number
}

export interface SteerSide {
  top: { token: string; probability: number }[]
  text: string
}

export interface SteerAnswer {
  before: SteerSide
  after: SteerSide
}
