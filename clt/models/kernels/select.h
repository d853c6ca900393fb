/* What choosing entries is made of; select.c explains. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4)));

#define LANES 16

/* At most the k-th largest of n numbers, and mostly little below it; -INFINITY if one is a NaN. work: n + LANES. */
float clt_bound_below(const float *s, int64_t n, int64_t k, float *work);

/* The k largest, smallest index first among equals, by rising index; a NaN counts as the largest. where: n + 1. */
void clt_topk_of(const float *s, int64_t n, int64_t k, float *work, int64_t *where, int64_t *out);

/* The indices of all numbers that are not below a bound (a NaN is not); returns how many. */
int64_t clt_not_below(const float *s, int64_t n, float bound, int64_t *where);
