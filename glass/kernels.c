/* What decoding does for each token, on all cores: products with a few rows, and attention.

   Every sum is taken in one order, whatever the number of rows or threads, so a text does not
   depend on what is generated beside it. Built and called by kernels.py; no -ffast-math, which
   would turn denormal numbers off in the whole process. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define EACH _Pragma("omp parallel for schedule(static) num_threads(threads)")
#define SUM1 _Pragma("omp simd reduction(+ : s)")
#define SUM4 _Pragma("omp simd reduction(+ : s0, s1, s2, s3)")

static inline float of_float(float value) { return value; }

static inline float of_bfloat16(uint16_t bits) {
    union { uint32_t bits; float value; } wide = {(uint32_t)bits << 16};
    return wide.value;
}

/* y (b, n) = x (b, k) times the transpose of w (n, k), plus bias (n,) or NULL. Four rows of w at a
   time: one sum alone waits for its own last addition. */
#define ROWS(name, type, wide)                                                                    \
    void name(const type *w, const float *x, const float *bias, float *y, long n, long k, long b, \
              int threads) {                                                                      \
        EACH for (long first = 0; first < n; first += 4) {                                        \
            long rows = n - first < 4 ? n - first : 4;                                            \
            const type *w0 = w + first * k, *w1 = w0 + (rows > 1) * k;                            \
            const type *w2 = w1 + (rows > 2) * k, *w3 = w2 + (rows > 3) * k;                      \
            for (long j = 0; j < b; j++) {                                                        \
                const float *xj = x + j * k;                                                      \
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                             \
                SUM4 for (long i = 0; i < k; i++) {                                               \
                    s0 += wide(w0[i]) * xj[i];                                                    \
                    s1 += wide(w1[i]) * xj[i];                                                    \
                    s2 += wide(w2[i]) * xj[i];                                                    \
                    s3 += wide(w3[i]) * xj[i];                                                    \
                }                                                                                 \
                float s[4] = {s0, s1, s2, s3};                                                    \
                for (long r = 0; r < rows; r++)                                                   \
                    y[j * n + first + r] = s[r] + (bias ? bias[first + r] : 0);                   \
            }                                                                                     \
        }                                                                                         \
    }

ROWS(rows_float32, float, of_float)
ROWS(rows_bfloat16, uint16_t, of_bfloat16)

/* The same for w in int8 with a scale for each row. x is rounded to 15 bits and a sign, the largest
   of a row being 32767: 256 products of 8 and 16 bits fit into an int32. */
#define BLOCK 256

void rows_int8(const int8_t *w, const float *scale, const float *x, const float *bias, float *y,
               long n, long k, long b, int threads) {
    int16_t *rounded = malloc(sizeof(int16_t) * b * k);
    float *unit = malloc(sizeof(float) * b);
    for (long j = 0; j < b; j++) {
        float largest = 0;
        for (long i = 0; i < k; i++) largest = fmaxf(largest, fabsf(x[j * k + i]));
        unit[j] = largest / 32767;
        float inverse = largest > 0 ? 32767 / largest : 0;
        for (long i = 0; i < k; i++) rounded[j * k + i] = (int16_t)rintf(x[j * k + i] * inverse);
    }
    EACH for (long first = 0; first < n; first += 4) {
        long rows = n - first < 4 ? n - first : 4;
        const int8_t *w0 = w + first * k, *w1 = w0 + (rows > 1) * k;
        const int8_t *w2 = w1 + (rows > 2) * k, *w3 = w2 + (rows > 3) * k;
        for (long j = 0; j < b; j++) {
            const int16_t *xj = rounded + j * k;
            float s[4] = {0, 0, 0, 0};
            for (long begin = 0; begin < k; begin += BLOCK) {
                long end = begin + BLOCK < k ? begin + BLOCK : k;
                const int8_t *w_of[4] = {w0, w1, w2, w3};
                for (int r = 0; r < 4; r++) {
                    int16_t wide[BLOCK];
                    int32_t sum = 0;
                    for (long i = 0; i < end - begin; i++) wide[i] = w_of[r][begin + i];
                    for (long i = 0; i < end - begin; i++) sum += wide[i] * xj[begin + i];
                    s[r] += sum;
                }
            }
            for (long r = 0; r < rows; r++)
                y[j * n + first + r] = s[r] * unit[j] * scale[first + r] + (bias ? bias[first + r] : 0);
        }
    }
    free(rounded);
    free(unit);
}

/* Attention of one new token in each of b rows: q (b, h, d); k and v (b, hkv, room, d), of which
   row j has lengths[j] positions, the new one included; y (b, h, d). */
#define ATTEND(name, type, wide)                                                                  \
    void name(const float *q, const type *k, const type *v, float *y, const int64_t *lengths,     \
              long b, long h, long hkv, long room, long d, int threads) {                         \
        EACH for (long each = 0; each < b * h; each++) {                                          \
            long row = each / h, shared = each % h / (h / hkv), length = lengths[row];            \
            const type *keys = k + (row * hkv + shared) * room * d;                               \
            const type *values = v + (row * hkv + shared) * room * d;                             \
            const float *query = q + each * d;                                                    \
            float *result = y + each * d, *weight = malloc(sizeof(float) * length);               \
            float largest = -INFINITY, total = 0;                                                 \
            for (long t = 0; t < length; t++) {                                                   \
                float s = 0;                                                                      \
                SUM1 for (long i = 0; i < d; i++) s += query[i] * wide(keys[t * d + i]);         \
                weight[t] = s / sqrtf(d);                                                         \
                largest = fmaxf(largest, weight[t]);                                              \
            }                                                                                     \
            for (long t = 0; t < length; t++) {                                                   \
                weight[t] = expf(weight[t] - largest);                                            \
                total += weight[t];                                                               \
            }                                                                                     \
            for (long i = 0; i < d; i++) result[i] = 0;                                           \
            for (long t = 0; t < length; t++) {                                                   \
                float share = weight[t] / total;                                                  \
                for (long i = 0; i < d; i++) result[i] += share * wide(values[t * d + i]);        \
            }                                                                                     \
            free(weight);                                                                         \
        }                                                                                         \
    }

ATTEND(attend_float32, float, of_float)
ATTEND(attend_bfloat16, uint16_t, of_bfloat16)
