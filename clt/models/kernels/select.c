/* From pre-activations to the kept entries in one pass, for fp32 and bf16. The type is chosen by the caller: `half`
 * says that `h` holds bf16 bit patterns. Scores are h * scale[feature] (scale may be missing). */
#include "select.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define FEW 256

typedef uint32_t u16x32 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

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

/* As below, for few: halving the range of numbers, read as integers of the same order, takes no branch per number. */
static float kth_of_few(const float *x, int64_t n, int64_t k) {
    int32_t keys[FEW];
    int64_t low = INT32_MAX, high = INT32_MIN; /* the result lies within; at least k numbers reach low */
    memcpy(keys, x, n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        keys[i] ^= (keys[i] >> 31) & 0x7fffffff;
        low = keys[i] < low ? keys[i] : low;
        high = keys[i] > high ? keys[i] : high;
    }
    while (low < high) {
        int32_t middle = (int32_t)(low + (high - low + 1) / 2), reach = 0;
        for (int64_t i = 0; i < n; i++) reach += keys[i] >= middle;
        if (reach >= k) low = middle;
        else high = middle - 1;
        if (reach == k) break; /* then it is the smallest of these */
    }
    int32_t found = INT32_MAX;
    for (int64_t i = 0; i < n; i++) found = keys[i] >= low && keys[i] < found ? keys[i] : found;
    found ^= (found >> 31) & 0x7fffffff;
    float value;
    memcpy(&value, &found, 4);
    return value;
}

/* The k-th largest of n numbers (1 <= k <= n, none a NaN), which it reorders. */
static float kth_largest(float *x, int64_t n, int64_t k) {
    if (n <= FEW) return kth_of_few(x, n, k);
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

/* For each lane the largest of a run of vectors; returns whether there was no NaN. */
static int lane_maxima(const float *s, int64_t first, int64_t last, float *best) {
#ifdef __AVX512F__
    __m512 most = _mm512_set1_ps(-INFINITY);
    __mmask16 bad = 0;
    for (int64_t i = first; i < last; i++) {
        __m512 v = _mm512_loadu_ps(s + i * LANES);
        bad |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, v);
    }
    _mm512_storeu_ps(best, most);
    return bad == 0;
#else
    v16 bad = {0};
    for (int j = 0; j < LANES; j++) best[j] = -INFINITY;
    for (int64_t i = first; i < last; i++) {
        const float *v = s + i * LANES;
        bad += *(const v16 *)v * 0;
        for (int j = 0; j < LANES; j++) best[j] = v[j] > best[j] ? v[j] : best[j];
    }
    for (int j = 0; j < LANES; j++)
        if (!(bad[j] == 0)) return 0;
    return 1;
#endif
}

/* Lane maxima of groups of vectors bound the k-th largest of a row from below, closely: of four times as many lanes as
 * are wanted, few have two of the largest. -INFINITY if the row is too short for this, or holds a NaN. */
float clt_bound_below(const float *s, int64_t n, int64_t k, float *work) {
    int64_t vectors = n / LANES, groups = (4 * k + LANES - 1) / LANES;
    if (groups * 2 > vectors) groups = vectors / 2;
    if (groups * LANES < k + LANES) return -INFINITY;
    int64_t per = (vectors + groups - 1) / groups;
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * per, last = first + per < vectors ? first + per : vectors;
        if (!lane_maxima(s, first, last, work + g * LANES)) return -INFINITY;
    }
    for (int64_t i = vectors * LANES; i < n; i++)
        if (!(s[i] == s[i])) return -INFINITY;
    return kth_largest(work, groups * LANES, k);
}

int64_t clt_not_below(const float *s, int64_t n, float bound, int64_t *where) {
    int64_t found = 0, i = 0;
#ifdef __AVX512F__
    __m512 least = _mm512_set1_ps(bound);
    for (; i + LANES <= n; i += LANES) {
        uint32_t mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(s + i), least, _CMP_NLT_UQ);
        for (; mask; mask &= mask - 1) where[found++] = i + __builtin_ctz(mask);
    }
#endif
    for (; i < n; i++)
        if (!(s[i] < bound)) where[found++] = i;
    return found;
}

void clt_topk_of(const float *s, int64_t n, int64_t k, float *work, int64_t *where, int64_t *out) {
    int64_t found = clt_not_below(s, n, clt_bound_below(s, n, k, work), where), kept = 0;
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
        float *work = malloc((n_features + LANES) * sizeof(float));
        int64_t *where = malloc((n_features + 1) * sizeof(int64_t));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *s = scores_of(h, half, scale, t * n_features, n_features, row);
            clt_topk_of(s, n_features, k, work, where, features + t * k);
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
