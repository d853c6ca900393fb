/* Elementwise work of the dense route in one pass each, for fp32 and bf16 (`half`: bit patterns). Columns are shared out
 * among threads, so sums over tokens have one order whatever the number of threads. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 64 /* features per strip */
#define ROWS 32 /* tokens per tile: what is transposed at once */

static inline float from_half(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static inline uint16_t to_half(float value) { /* to nearest, ties to even; a NaN stays one */
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

static inline void load(const void *from, int half, int64_t at, int n, float *to) {
    if (half)
        for (int i = 0; i < n; i++) to[i] = from_half(((const uint16_t *)from)[at + i]);
    else
        memcpy(to, (const float *)from + at, n * sizeof(float));
}

static inline void store(void *to, int half, int64_t at, int n, const float *from) {
    if (half)
        for (int i = 0; i < n; i++) ((uint16_t *)to)[at + i] = to_half(from[i]);
    else
        memcpy((float *)to + at, from, n * sizeof(float));
}

/* exp for -87 <= x <= 0, to about 2 units in the last place; plain arithmetic, which compilers vectorise. */
static inline float exp_down(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666657f + r * (0.0416657962f + r * (0.00833345205f
            + r * 0.00139315584f)))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline void store_columns(void *out, int half, int64_t f0, int nf, int64_t t0, int nt, int64_t n_tokens,
                                 float tile[ROWS][TILE]) {
    float line[ROWS];
    for (int f = 0; f < nf; f++) {
        for (int t = 0; t < nt; t++) line[t] = tile[t][f];
        store(out, half, (f0 + f) * n_tokens + t0, nt, line);
    }
}

/* a = h where h > theta else 0, as [token, feature] or, transposed, [feature, token]; fired[f] = on how many tokens. */
void clt_gate(const void *h, int half, const float *theta, int64_t n_tokens, int64_t n_features, int transposed,
              void *out, int64_t *fired) {
#pragma omp parallel for schedule(static)
    for (int64_t f0 = 0; f0 < n_features; f0 += TILE) {
        int nf = n_features - f0 < TILE ? (int)(n_features - f0) : TILE;
        int32_t count[TILE] = {0};
        float tile[ROWS][TILE];
        for (int64_t t0 = 0; t0 < n_tokens; t0 += ROWS) {
            int nt = n_tokens - t0 < ROWS ? (int)(n_tokens - t0) : ROWS;
            for (int t = 0; t < nt; t++) {
                float *x = tile[t];
                load(h, half, (t0 + t) * n_features + f0, nf, x);
                for (int f = 0; f < nf; f++) {
                    int on = !(x[f] <= theta[f0 + f]);
                    count[f] += on;
                    x[f] = on ? x[f] : 0.0f;
                }
                if (!transposed) store(out, half, (t0 + t) * n_features + f0, nf, x);
            }
            if (transposed) store_columns(out, half, f0, nf, t0, nt, n_tokens, tile);
        }
        if (fired)
            for (int f = 0; f < nf; f++) fired[f0 + f] += count[f];
    }
}

typedef struct {
    float price, steepness;  /* price * tanh(steepness * norm * a) per entry */
    float pull;              /* pull * norm * relu(theta - h), or, if `negative`, pull * relu(-h) */
    float half_width, over;  /* straight-through window: |h - theta| < half_width; over = 1 / bandwidth (0: none) */
    int height_is_h, reaches_h, negative;
} Terms;

typedef struct {
    float bias[TILE], theta[TILE], norm[TILE], price[TILE], pull[TILE];
} Sums;

static inline __attribute__((always_inline)) void one_row(const float *restrict x, float *restrict g,
                                                          const float *restrict theta, const float *restrict norm,
                                                          int nf, const Terms c, Sums *restrict s) {
    const float by_h = c.height_is_h ? 1.0f : 0.0f, reach = c.reaches_h ? 1.0f : 0.0f;
    const float by_norm = c.negative ? 0.0f : 1.0f;
#pragma omp simd
    for (int f = 0; f < nf; f++) {
        float on = x[f] <= theta[f] ? 0.0f : 1.0f, a = x[f] * on;
        float e = exp_down(-2.0f * c.steepness * norm[f] * a), d = 1.0f / (1.0f + e);
        float slope = 4.0f * e * d * d;
        float ga = g[f] + c.price * c.steepness * norm[f] * slope;
        float near = __builtin_fabsf(x[f] - theta[f]) < c.half_width ? c.over : 0.0f;
        float step = ga * near * (by_h * x[f] + (1.0f - by_h) * theta[f]);
        float gap = by_norm * theta[f] - x[f], weight = by_norm * norm[f] + (1.0f - by_norm);
        float below = gap > 0.0f ? 1.0f : 0.0f;
        float gh = ga * on + reach * step - c.pull * weight * below;
        s->price[f] += (1.0f - e) * d;
        s->pull[f] += gap * below;
        s->norm[f] += c.price * c.steepness * a * slope + by_norm * c.pull * gap * below;
        s->theta[f] += by_norm * c.pull * weight * below - step;
        s->bias[f] += gh;
        g[f] = gh;
    }
}

/* Everything between the gradient of the activations (grad) and that of the pre-activations, which is written
 * transposed, [feature, token]. sums: bias, theta, norm, price, pull, each [feature]; price and pull are the plain sums
 * of tanh(...) and relu(...), not weighted. */
void clt_gate_backward(const void *h, const void *grad, int half, const float *theta, const float *norm, float price,
                       float steepness, float pull, float bandwidth, int height_is_h, int reaches_h, int negative,
                       int64_t n_tokens, int64_t n_features, void *out, float *sums) {
    Terms c = {price, steepness, pull, bandwidth / 2, bandwidth > 0 ? 1 / bandwidth : 0, height_is_h, reaches_h, negative};
#pragma omp parallel for schedule(static)
    for (int64_t f0 = 0; f0 < n_features; f0 += TILE) {
        int nf = n_features - f0 < TILE ? (int)(n_features - f0) : TILE;
        Sums s;
        memset(&s, 0, sizeof(s));
        float tile[ROWS][TILE], x[TILE];
        for (int64_t t0 = 0; t0 < n_tokens; t0 += ROWS) {
            int nt = n_tokens - t0 < ROWS ? (int)(n_tokens - t0) : ROWS;
            for (int t = 0; t < nt; t++) {
                load(h, half, (t0 + t) * n_features + f0, nf, x);
                load(grad, half, (t0 + t) * n_features + f0, nf, tile[t]);
                if (nf == TILE) one_row(x, tile[t], theta + f0, norm + f0, TILE, c, &s);
                else one_row(x, tile[t], theta + f0, norm + f0, nf, c, &s);
            }
            store_columns(out, half, f0, nf, t0, nt, n_tokens, tile);
        }
        const float *each[] = {s.bias, s.theta, s.norm, s.price, s.pull};
        for (int i = 0; i < 5; i++) memcpy(sums + i * n_features + f0, each[i], nf * sizeof(float));
    }
}
