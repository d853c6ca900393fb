/* From pre-activations to the kept entries in one pass, for fp32 and bf16. The type is chosen by the caller: `half`
 * says that `h` holds bf16 bit patterns. Scores are h * scale[feature] (scale may be missing). */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16x32 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

#define LANES 16

/* A row of h as floats, in `row` if it has to be converted or scaled. */
static const float *scores_of(const void *h, int half, const float *scale, int64_t start, int64_t n, float *row) {
    if (half) {
        const uint16_t *bits = (const uint16_t *)h + start;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            union { u16x32 u; v16 f; } wide;
            wide.u = __builtin_convertvector(*(const u16x16 *)(bits + i), u16x32) << 16;
            *(v16 *)(row + i) = wide.f;
        }
        for (; i < n; i++) {
            uint32_t word = (uint32_t)bits[i] << 16;
            memcpy(row + i, &word, 4);
        }
        if (scale)
            for (int64_t j = 0; j < n; j++) row[j] *= scale[j];
        return row;
    }
    const float *values = (const float *)h + start;
    if (!scale) return values;
    for (int64_t j = 0; j < n; j++) row[j] = values[j] * scale[j];
    return row;
}

static inline float value_at(const void *h, int half, int64_t i) {
    if (!half) return ((const float *)h)[i];
    uint32_t word = (uint32_t)((const uint16_t *)h)[i] << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* The k-th largest of n numbers (1 <= k <= n), which it reorders. */
static float kth_largest(float *x, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1, want = k - 1;
    while (low < high) {
        float a = x[low], b = x[(low + high) / 2], c = x[high];
        float pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (want <= j) high = j;
        else if (want >= i) low = i;
        else break;
    }
    return x[want];
}

/* Where the k largest of a row may lie: lane maxima of groups of vectors bound the k-th largest from below, so only
 * lanes whose maximum reaches that bound are looked through. Returns how many candidates there are, k or more, or 0 if
 * the row is too short for this, or holds a NaN. */
static int64_t candidates(const float *s, int64_t n, int64_t k, float *maxima, float *copy, int64_t *where) {
    int64_t vectors = n / LANES, groups = (4 * k + LANES - 1) / LANES;
    if (groups * 2 > vectors) groups = vectors / 2;
    if (groups * LANES < k + LANES) return 0;
    int64_t per = (vectors + groups - 1) / groups, found = 0;
    v16 bad = {0};
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * per, last = first + per < vectors ? first + per : vectors;
        float *best = maxima + g * LANES;
        for (int j = 0; j < LANES; j++) best[j] = -INFINITY;
        for (int64_t i = first; i < last; i++) {
            const float *v = s + i * LANES;
            bad += *(const v16 *)v * 0;
            for (int j = 0; j < LANES; j++) best[j] = v[j] > best[j] ? v[j] : best[j];
        }
    }
    for (int i = 0; i < LANES; i++)
        if (!(bad[i] == 0)) return 0;
    memcpy(copy, maxima, groups * LANES * sizeof(float));
    float bound = kth_largest(copy, groups * LANES, k);
    for (int64_t m = 0; m < groups * LANES; m++) {
        if (maxima[m] < bound) continue;
        int64_t first = (m / LANES) * per, last = first + per < vectors ? first + per : vectors;
        for (int64_t i = first; i < last; i++) {
            int64_t at = i * LANES + m % LANES;
            where[found] = at;
            found += s[at] >= bound;
        }
    }
    for (int64_t i = vectors * LANES; i < n; i++) {
        if (!(s[i] == s[i])) return 0;
        where[found] = i;
        found += s[i] >= bound;
    }
    return found;
}

static int by_index(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The k entries of a row with the largest scores, smallest index first among equals; a NaN counts as the largest. */
static void topk_of(const float *s, int64_t n, int64_t k, float *work, int64_t *where, int64_t *out) {
    int64_t found = candidates(s, n, k, work, work + n, where), kept = 0;
    if (found == 0) {
        for (int64_t i = 0; i < n; i++) where[i] = i;
        found = n;
    } else {
        qsort(where, found, sizeof(int64_t), by_index);
    }
    for (int64_t i = 0; i < found; i++) {
        float v = s[where[i]];
        work[i] = v == v ? v : INFINITY;
    }
    float bound = kth_largest(work, found, k);
    int64_t equal = k; /* how many of those at the bound have a place */
    for (int64_t i = 0; i < found; i++) equal -= !(s[where[i]] <= bound);
    for (int64_t i = 0; i < found && kept < k; i++) {
        float v = s[where[i]];
        if (!(v <= bound) || (v == bound && equal-- > 0)) out[kept++] = where[i];
    }
}

/* features[t, :] = which k entries of row t score highest; values[t, :] = their h. */
void clt_topk(const void *h, int half, const float *scale, int64_t n_tokens, int64_t n_features, int64_t k,
              int64_t *features, float *values) {
#pragma omp parallel
    {
        float *row = malloc((n_features + LANES) * sizeof(float));
        float *work = malloc((2 * n_features + 2 * LANES) * sizeof(float));
        int64_t *where = malloc((n_features + 1) * sizeof(int64_t));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *s = scores_of(h, half, scale, t * n_features, n_features, row);
            topk_of(s, n_features, k, work, where, features + t * k);
            for (int64_t i = 0; i < k; i++) values[t * k + i] = value_at(h, half, t * n_features + features[t * k + i]);
        }
        free(row), free(work), free(where);
    }
}

/* Is s above its bound? A NaN is, so that it is not lost. */
#define ABOVE(s, bound) (!((s) <= (bound)))

/* counts[t] = how many scores of row t exceed bound[feature]. */
void clt_count_above(const void *h, int half, const float *scale, const float *bound, int64_t n_tokens,
                     int64_t n_features, int64_t *counts) {
#pragma omp parallel
    {
        float *row = malloc((n_features + LANES) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *s = scores_of(h, half, scale, t * n_features, n_features, row);
            int32_t count = 0;
            for (int64_t f = 0; f < n_features; f++) count += ABOVE(s[f], bound[f]);
            counts[t] = count;
        }
        free(row);
    }
}

/* The entries that clt_count_above counted: their features, h, and (if asked for) scores. */
void clt_take_above(const void *h, int half, const float *scale, const float *bound, int64_t n_tokens,
                    int64_t n_features, const int64_t *offsets, int64_t *features, float *values, float *scores) {
#pragma omp parallel
    {
        float *row = malloc((n_features + LANES) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *s = scores_of(h, half, scale, t * n_features, n_features, row);
            int64_t at = offsets[t], f = 0;
#ifdef __AVX512F__
            for (; f + LANES <= n_features; f += LANES) {
                __m512 v = _mm512_loadu_ps(s + f), b = _mm512_loadu_ps(bound + f);
                uint32_t mask = _mm512_cmp_ps_mask(v, b, _CMP_NLE_UQ);
                for (; mask; mask &= mask - 1) features[at++] = f + __builtin_ctz(mask);
            }
#endif
            for (; f < n_features; f++)
                if (ABOVE(s[f], bound[f])) features[at++] = f;
            for (int64_t e = offsets[t]; e < offsets[t + 1]; e++) {
                values[e] = value_at(h, half, t * n_features + features[e]);
                if (scores) scores[e] = s[features[e]];
            }
        }
        free(row);
    }
}
