/* The k largest of fp32 pre-activations without computing them all in fp32. Products of bf16 copies, several times
 * faster, come with a bound on what rounding did to each:
 *
 *     |x.w - x'.w'| = |(x - x').w + x'.(w - w')| <= |x - x'| |w| + |x'| |w - w'|        (Cauchy-Schwarz)
 *
 * beside what is lost in sums (SUM) and in rounding the result (HALF). Only entries that may be among the k largest within
 * these bounds are computed in fp32, and chosen from: the choice is the exact one. */
#include "select.h"

#define HALF 0x1p-8f    /* half a unit in the last place of bf16 */
#define SUM 0x1p-23f    /* per term, twice the rounding error of fp32 */

static inline uint16_t rounded(float value) { /* to bf16, ties to even; a NaN stays one */
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

/* A bf16 copy of some rows, the length of each row, and that of what rounding took from it. */
void clt_round_rows(const float *rows, int64_t n_rows, int64_t width, uint16_t *out, float *length, float *lost) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *row = rows + r * width;
        float all[LANES] = {0}, rest[LANES] = {0};
        for (int64_t i = 0; i < width; i++) {
            uint16_t bits = rounded(row[i]);
            uint32_t word = (uint32_t)bits << 16;
            float kept;
            memcpy(&kept, &word, 4);
            out[r * width + i] = bits;
            all[i % LANES] += row[i] * row[i];
            rest[i % LANES] += (row[i] - kept) * (row[i] - kept);
        }
        float sum = 0, loss = 0;
        for (int i = 0; i < LANES; i++) sum += all[i], loss += rest[i];
        length[r] = sqrtf(sum) * (1 + 64 * SUM), lost[r] = sqrtf(loss) * (1 + 64 * SUM);
    }
}

typedef struct {
    const uint16_t *h; /* bf16 products, without bias */
    const float *bias, *scale;
    const float *x, *weight;
    const float *x_length, *x_lost, *length, *lost; /* of tokens, of features */
    int64_t n_features, width;
} Screen;

/* By how much less, at most, and by how much more the scores of a token may be than those of its products. */
static void bounds_of(const Screen *c, int64_t t, float *restrict low, float *restrict high) {
    const uint16_t *h = c->h + t * c->n_features;
    float by_length = c->x_lost[t] + c->x_length[t] * (float)(c->width + 4) * SUM;
    float by_lost = c->x_length[t] + c->x_lost[t];
    const float *bias = c->bias, *scale = c->scale, *length = c->length, *lost = c->lost;
    for (int64_t f = 0; f < c->n_features; f++) {
        uint32_t word = (uint32_t)h[f] << 16;
        float product;
        memcpy(&product, &word, 4);
        float error = by_length * length[f] + by_lost * lost[f]
                    + HALF * __builtin_fabsf(product) + 4 * SUM * __builtin_fabsf(bias[f]);
        low[f] = scale[f] * (product + bias[f] - error), high[f] = scale[f] * (product + bias[f] + error);
    }
}

static float product_of(const float *a, const float *b, int64_t n) {
    v16 total[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) total[j] += *(const v16 *)(a + i + j * LANES) * *(const v16 *)(b + i + j * LANES);
    v16 sum = (total[0] + total[1]) + (total[2] + total[3]);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    for (int j = 0; j < LANES; j++) rest += sum[j];
    return rest;
}

/* features[t, :] = the k entries of row t of h * scale (scale >= 0) that are largest, h = x W^T + bias in fp32; values = their h. */
void clt_topk_screened(const uint16_t *h, const float *bias, const float *scale, const float *x, const float *weight,
                       const float *x_length, const float *x_lost, const float *length, const float *lost,
                       int64_t n_tokens, int64_t n_features, int64_t width, int64_t k, int64_t *features,
                       float *values) {
    Screen c = {h, bias, scale, x, weight, x_length, x_lost, length, lost, n_features, width};
#pragma omp parallel
    {
        float *low = malloc((n_features + LANES) * sizeof(float)), *high = malloc((n_features + LANES) * sizeof(float));
        float *work = malloc((n_features + LANES) * sizeof(float));
        int64_t *where = malloc((n_features + 1) * sizeof(int64_t)), *chosen = malloc((k + 1) * sizeof(int64_t));
        int64_t *maybe = malloc((n_features + 1) * sizeof(int64_t));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n_tokens; t++) {
            bounds_of(&c, t, low, high);
            int64_t found = clt_not_below(high, n_features, clt_bound_below(low, n_features, k, work), maybe);
            for (int64_t i = 0; i < found; i++) { /* h into `low`, scores into `high`, which are no longer needed */
                int64_t f = maybe[i];
                if (i + 1 < found)
                    for (int64_t j = 0; j < width; j += LANES) __builtin_prefetch(weight + maybe[i + 1] * width + j);
                low[i] = product_of(x + t * width, weight + f * width, width) + bias[f];
                high[i] = low[i] * scale[f];
            }
            clt_topk_of(high, found, k, work, where, chosen);
            for (int64_t i = 0; i < k; i++) {
                features[t * k + i] = maybe[chosen[i]];
                values[t * k + i] = low[chosen[i]];
            }
        }
        free(low), free(high), free(work), free(where), free(chosen), free(maybe);
    }
}
