/* Gathers over decoder rows, for activations of which few are kept. Plain C with GCC/Clang vector types, no headers of
 * torch: compiled once per machine (build.py), called with raw pointers. Every output element is summed by one thread
 * in a fixed order, so results do not depend on the number of threads.
 *
 * entries of token i: offsets[i] .. offsets[i + 1] of `features`, `values`.
 * Sorted by feature, entry j is order[j]; those of feature f are bounds[f] .. bounds[f + 1].
 *
 * Rows are gathered a block of columns at a time, from a packed copy of that block: it stays in a core's second-level
 * cache, while the rows themselves, a power of two apart, would all fall into the same few lines of it.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64)));

#define LANES 16
#define WIDE 4               /* vectors per column block: the accumulators of one row */
#define NARROW 2             /* in decoding, whose table has a row per feature and would not fit otherwise */
#define BLOCK (WIDE * LANES)
#define REUSE 2              /* gathers per row from which packing pays */

/* Room for packed rows, in large pages where the system has them: gathers would miss the table of small ones. */
static float *room(int64_t n_rows) {
    size_t page = (size_t)1 << 21, size = ((size_t)n_rows * BLOCK * sizeof(float) / page + 1) * page;
    float *rows = aligned_alloc(page, size);
#ifdef __linux__
    madvise(rows, size, MADV_HUGEPAGE);
#endif
    return rows;
}

/* rows[i, :block] = from[i, column .. column + n], filled up with zeros; shared out among the threads that meet here. */
static void pack(const float *from, int64_t n_rows, int64_t stride, int64_t column, int n, int block, float *rows) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_rows; i++) {
        memcpy(rows + i * block, from + i * stride + column, n * sizeof(float));
        if (n < block) memset(rows + i * block + n, 0, (block - n) * sizeof(float));
    }
}

/* A row's part in a block, vector by vector where it is whole: the compiler then keeps it in registers. */
static inline __attribute__((always_inline)) void load_block(const float *from, int n, int wide, v16 *to) {
    float whole[BLOCK] = {0};
    if (n < wide * LANES) memcpy(whole, from, n * sizeof(float)), from = whole;
    for (int i = 0; i < wide; i++) to[i] = *(const v16 *)(from + i * LANES);
}

static inline __attribute__((always_inline)) void store_block(float *to, int n, int wide, const v16 *from) {
    float whole[BLOCK], *place = n < wide * LANES ? whole : to;
    for (int i = 0; i < wide; i++) *(v16 *)(place + i * LANES) = from[i];
    if (n < wide * LANES) memcpy(to, whole, n * sizeof(float));
}

typedef struct {
    const float *rows; /* of the present column block */
    int64_t stride;
} Table;

static inline __attribute__((always_inline)) void decode_block(const float *values, const int64_t *features,
                                                               int64_t start, int64_t stop, Table table, int n,
                                                               int wide, float *out) {
    v16 total[WIDE];
    load_block(out, n, wide, total);
    for (int64_t e = start; e < stop; e++) {
        const float *row = table.rows + features[e] * table.stride;
        for (int i = 0; i < wide; i++) total[i] += values[e] * *(const v16 *)(row + i * LANES);
    }
    store_block(out, n, wide, total);
}

/* out[t, :width] += sum over the token's entries of values * weight[feature, :]; rows of `out` lie `stride` apart. */
void clt_decode(const float *values, const int64_t *features, const int64_t *offsets, const float *weight, float *out,
                int64_t n_tokens, int64_t n_features, int64_t width, int64_t stride) {
    int pays = offsets[n_tokens] > REUSE * n_features, block = (pays ? NARROW : WIDE) * LANES;
    float *packed = room(n_features);
#pragma omp parallel
    for (int64_t column = 0; column < width; column += block) {
        int n = width - column < block ? (int)(width - column) : block, copied = pays || n < block;
        Table table = {copied ? packed : weight + column, copied ? block : width};
        if (copied) pack(weight, n_features, width, column, n, block, packed);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            float *place = out + t * stride + column;
            if (n < block) decode_block(values, features, offsets[t], offsets[t + 1], table, n, block / LANES, place);
            else if (pays) decode_block(values, features, offsets[t], offsets[t + 1], table, NARROW * LANES, NARROW, place);
            else decode_block(values, features, offsets[t], offsets[t + 1], table, BLOCK, WIDE, place);
        }
    }
    free(packed);
}

/* Sums of 16 vectors, in their order: neighbours are added until one vector is left. */
static inline v16 sums_of(v16 *x) {
    const i16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) + __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
    return x[0];
}

/* Entries by feature; dots wait until 16 of them can be summed at once. */
typedef struct {
    const float *values;
    const int32_t *tokens;
    const int64_t *bounds;
    float *dots; /* or none */
    v16 waiting[LANES];
    int n_waiting;
} Sorted;

static void finish_dots(Sorted *s, int64_t end) {
    for (int i = s->n_waiting; i < LANES; i++) s->waiting[i] = (v16){0};
    v16 sums = sums_of(s->waiting);
    for (int i = 0; i < s->n_waiting; i++) s->dots[end - s->n_waiting + i] += sums[i];
    s->n_waiting = 0;
}

static inline __attribute__((always_inline)) void backward_block(Sorted *s, int64_t f, Table grad, const float *weight,
                                                                 float scale, float *out, int accumulate, int n,
                                                                 int wants_dots) {
    v16 total[WIDE] = {{0}}, own[WIDE] = {{0}};
    if (weight) load_block(weight, n, WIDE, own);
    if (accumulate) load_block(out, n, WIDE, total);
    for (int i = 0; i < WIDE; i++) total[i] += scale * own[i];
    int64_t stop = s->bounds[f + 1];
    for (int64_t j = s->bounds[f]; j < stop; j++) {
        const float *row = grad.rows + s->tokens[j] * grad.stride;
        v16 dot = {0};
        for (int i = 0; i < WIDE; i++) {
            v16 g = *(const v16 *)(row + i * LANES);
            total[i] += s->values[j] * g;
            if (wants_dots) dot += own[i] * g;
        }
        if (wants_dots) {
            s->waiting[s->n_waiting++] = dot;
            if (s->n_waiting == LANES) finish_dots(s, j + 1);
        }
    }
    store_block(out, n, WIDE, total);
}

/* Values and tokens of the entries in sorted order, so that the loops over blocks read them in a row. */
static void in_order(const float *values, const int64_t *order, const int64_t *tokens, int64_t n_entries,
                     float *sorted_values, int32_t *sorted_tokens, float *dots) {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < n_entries; j++) {
        sorted_values[j] = values[order[j]];
        sorted_tokens[j] = (int32_t)tokens[order[j]];
        if (dots) dots[j] = 0;
    }
}

/* Both gradients of a decode in one pass over the rows of `grad`:
 *   out[f]  = (accumulate ? out[f] : 0) + scale[f] * weight[f] + sum over its entries of values * grad[token]
 *   dots[e] = grad[token] . weight[feature]            (if asked for)
 * `weight` and `scale` may be missing where neither is wanted. */
void clt_backward(const float *values, const int64_t *order, const int64_t *tokens, const int64_t *bounds,
                  const float *grad, const float *weight, const float *scale, float *out, float *dots,
                  int64_t n_tokens, int64_t n_features, int64_t width, int64_t stride, int accumulate) {
    int64_t n_entries = bounds[n_features];
    float *packed = room(n_tokens);
    float *sorted_values = malloc((n_entries + 1) * sizeof(float)), *sorted_dots = 0;
    int32_t *sorted_tokens = malloc((n_entries + 1) * sizeof(int32_t));
    if (dots) sorted_dots = malloc((n_entries + 1) * sizeof(float));
#pragma omp parallel
    {
        Sorted s = {sorted_values, sorted_tokens, bounds, sorted_dots, {{0}}, 0};
        in_order(values, order, tokens, n_entries, sorted_values, sorted_tokens, sorted_dots);
        for (int64_t column = 0; column < width; column += BLOCK) {
            int n = width - column < BLOCK ? (int)(width - column) : BLOCK;
            int copied = n < BLOCK || n_entries > REUSE * n_tokens;
            Table table = {copied ? packed : grad + column, copied ? BLOCK : stride};
            if (copied) pack(grad, n_tokens, stride, column, n, BLOCK, packed);
#pragma omp for schedule(dynamic, 64)
            for (int64_t f = 0; f < n_features; f++) {
                float *row = out + f * width + column;
                const float *own = weight ? weight + f * width + column : 0;
                float by = scale ? scale[f] : 0;
                if (n < BLOCK) backward_block(&s, f, table, own, by, row, accumulate, n, dots != 0);
                else if (dots) backward_block(&s, f, table, own, by, row, accumulate, BLOCK, 1);
                else backward_block(&s, f, table, own, by, row, accumulate, BLOCK, 0);
                /* the next feature may be another chunk's */
                if (s.n_waiting && ((f + 1) % 64 == 0 || f + 1 == n_features)) finish_dots(&s, bounds[f + 1]);
            }
        }
        if (dots) {
#pragma omp for schedule(static)
            for (int64_t j = 0; j < n_entries; j++) dots[order[j]] = sorted_dots[j];
        }
    }
    free(packed), free(sorted_values), free(sorted_tokens), free(sorted_dots);
}

/* Stable counting sort of entries by feature; bounds has n_features + 1 elements. */
void clt_sort(const int64_t *features, int64_t n_entries, int64_t n_features, int64_t *order, int64_t *bounds) {
    memset(bounds, 0, (n_features + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < n_entries; e++) bounds[features[e] + 1]++;
    for (int64_t f = 0; f < n_features; f++) bounds[f + 1] += bounds[f];
    int64_t *next = malloc((n_features + 1) * sizeof(int64_t));
    memcpy(next, bounds, n_features * sizeof(int64_t));
    for (int64_t e = 0; e < n_entries; e++) order[next[features[e]]++] = e;
    free(next);
}
