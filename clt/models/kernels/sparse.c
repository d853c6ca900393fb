/* Gathers over decoder rows, for activations of which few are kept. Plain C with GCC/Clang vector types, no headers of
 * torch: compiled once per machine (build.py), called with raw pointers. Every output element is summed by one thread
 * in a fixed order, so results do not depend on the number of threads.
 *
 * entries of token i: offsets[i] .. offsets[i + 1] of `features`, `values`.
 * Sorted by feature, entry j is order[j]; those of feature f are bounds[f] .. bounds[f + 1].
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4)));

#define LANES 16
#define WIDE 8               /* vectors per column block: 128 floats, the accumulators of one row */
#define BLOCK (WIDE * LANES)

static inline float sum16(v16 v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

static inline void prefetch_row(const float *row, int n) {
    for (int i = 0; i < n; i += 16) __builtin_prefetch(row + i, 0, 2);
}

/* out[t, column .. column + n] += sum over entries of values * weight[feature, column ..]; n < BLOCK */
static void decode_tail(const float *values, const int64_t *features, int64_t start, int64_t stop, const float *weight,
                        int64_t width, int64_t column, int n, float *out) {
    float total[BLOCK];
    memcpy(total, out + column, n * sizeof(float));
    for (int64_t e = start; e < stop; e++) {
        const float *row = weight + features[e] * width + column;
        for (int i = 0; i < n; i++) total[i] += values[e] * row[i];
    }
    memcpy(out + column, total, n * sizeof(float));
}

static void decode_block(const float *values, const int64_t *features, int64_t start, int64_t stop,
                         const float *weight, int64_t width, int64_t column, float *out) {
    v16 total[WIDE];
    for (int i = 0; i < WIDE; i++) total[i] = *(const v16 *)(out + column + i * LANES);
    for (int64_t e = start; e < stop; e++) {
        if (e + 2 < stop) prefetch_row(weight + features[e + 2] * width + column, BLOCK);
        const float *row = weight + features[e] * width + column;
        for (int i = 0; i < WIDE; i++) total[i] += values[e] * *(const v16 *)(row + i * LANES);
    }
    for (int i = 0; i < WIDE; i++) *(v16 *)(out + column + i * LANES) = total[i];
}

/* out[t, :width] += sum over the token's entries of values * weight[feature, :]; rows of `out` lie `stride` apart. */
void clt_decode(const float *values, const int64_t *features, const int64_t *offsets, const float *weight, float *out,
                int64_t n_tokens, int64_t width, int64_t stride) {
    for (int64_t column = 0; column < width; column += BLOCK) {
        int n = width - column < BLOCK ? (int)(width - column) : BLOCK;
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            if (n == BLOCK)
                decode_block(values, features, offsets[t], offsets[t + 1], weight, width, column, out + t * stride);
            else
                decode_tail(values, features, offsets[t], offsets[t + 1], weight, width, column, n, out + t * stride);
        }
    }
}

typedef struct {
    const float *values;     /* by entry */
    const int64_t *order, *tokens, *bounds;
    const float *grad;       /* [token, width], rows `stride` apart */
    int64_t width, stride;
} Sorted;

static void backward_tail(const Sorted *s, int64_t f, const float *weight, float scale, float *out, float *dots,
                          int64_t column, int n) {
    float total[BLOCK];
    for (int i = 0; i < n; i++) total[i] = out[i] + (scale != 0 ? scale * weight[i] : 0);
    for (int64_t j = s->bounds[f]; j < s->bounds[f + 1]; j++) {
        int64_t e = s->order[j];
        const float *row = s->grad + s->tokens[e] * s->stride + column;
        float dot = 0;
        for (int i = 0; i < n; i++) {
            total[i] += s->values[e] * row[i];
            if (dots) dot += weight[i] * row[i];
        }
        if (dots) dots[e] += dot;
    }
    memcpy(out, total, n * sizeof(float));
}

static inline __attribute__((always_inline)) void backward_block(const Sorted *s, int64_t f, const float *weight,
                                                                 float scale, float *out, float *dots, int64_t column) {
    v16 total[WIDE], own[WIDE];
    for (int i = 0; i < WIDE; i++) {
        own[i] = weight ? *(const v16 *)(weight + i * LANES) : (v16){0};
        total[i] = *(const v16 *)(out + i * LANES) + scale * own[i];
    }
    int64_t stop = s->bounds[f + 1];
    for (int64_t j = s->bounds[f]; j < stop; j++) {
        int64_t e = s->order[j];
        if (j + 2 < stop) prefetch_row(s->grad + s->tokens[s->order[j + 2]] * s->stride + column, BLOCK);
        const float *row = s->grad + s->tokens[e] * s->stride + column;
        v16 dot[2] = {{0}, {0}};
        for (int i = 0; i < WIDE; i++) {
            v16 g = *(const v16 *)(row + i * LANES);
            total[i] += s->values[e] * g;
            if (dots) dot[i & 1] += own[i] * g;
        }
        if (dots) dots[e] += sum16(dot[0] + dot[1]);
    }
    for (int i = 0; i < WIDE; i++) *(v16 *)(out + i * LANES) = total[i];
}

/* Both gradients of a decode in one pass over the rows of `grad`:
 *   out[f]  = (accumulate ? out[f] : 0) + scale[f] * weight[f] + sum over its entries of values * grad[token]
 *   dots[e] = grad[token] . weight[feature]            (if asked for; starts at zero)
 * `weight` and `scale` may be missing where neither is wanted. */
void clt_backward(const float *values, const int64_t *order, const int64_t *tokens, const int64_t *bounds,
                  const float *grad, const float *weight, const float *scale, float *out, float *dots,
                  int64_t n_features, int64_t width, int64_t stride, int accumulate) {
    Sorted s = {values, order, tokens, bounds, grad, width, stride};
    for (int64_t column = 0; column < width; column += BLOCK) {
        int n = width - column < BLOCK ? (int)(width - column) : BLOCK;
#pragma omp parallel for schedule(dynamic, 64)
        for (int64_t f = 0; f < n_features; f++) {
            float *row = out + f * width + column;
            const float *own = weight ? weight + f * width + column : 0;
            float by = scale ? scale[f] : 0;
            if (!accumulate) memset(row, 0, n * sizeof(float));
            if (n < BLOCK)
                backward_tail(&s, f, own, by, row, dots, column, n);
            else if (dots)
                backward_block(&s, f, own, by, row, dots, column);
            else
                backward_block(&s, f, own, by, row, 0, column);
        }
    }
}

/* dots[e] = grad[token] . weight[feature], entries in token order. */
void clt_dots(const int64_t *features, const int64_t *offsets, const float *grad, const float *weight, float *dots,
              int64_t n_tokens, int64_t width, int64_t stride) {
    memset(dots, 0, offsets[n_tokens] * sizeof(float));
    for (int64_t column = 0; column < width; column += BLOCK) {
        int n = width - column < BLOCK ? (int)(width - column) : BLOCK;
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *g = grad + t * stride + column;
            for (int64_t e = offsets[t]; e < offsets[t + 1]; e++) {
                const float *row = weight + features[e] * width + column;
                if (n == BLOCK) {
                    v16 dot[2] = {{0}, {0}};
                    for (int i = 0; i < WIDE; i++)
                        dot[i & 1] += *(const v16 *)(g + i * LANES) * *(const v16 *)(row + i * LANES);
                    dots[e] += sum16(dot[0] + dot[1]);
                } else {
                    float dot = 0;
                    for (int i = 0; i < n; i++) dot += g[i] * row[i];
                    dots[e] += dot;
                }
            }
        }
    }
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
