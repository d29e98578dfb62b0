/* What decoding does for each token, on all cores: products with a few rows, and attention.

   Every sum is taken in one order, whatever the number of rows or threads, so a text does not
   depend on what is generated beside it. Built and called by kernels.py. No -ffast-math: it would
   turn denormal numbers off in the whole process. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define EACH _Pragma("omp parallel for schedule(static) num_threads(threads)")

/* Vectors of GCC and clang, as wide as the processor's. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

static inline floats load(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float sum(floats v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

static inline float of_bfloat16(uint16_t bits) {
    union { uint32_t bits; float value; } wide = {(uint32_t)bits << 16};
    return wide.value;
}

static inline float of_float32(float value) { return value; }

/* Place i of an array of float32 or, if half, of bfloat16. */
static inline float get(const void *x, long i, int half) {
    return half ? of_bfloat16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static inline void put(void *y, long i, int half, float value) {
    if (!half) {
        ((float *)y)[i] = value;
        return;
    }
    uint32_t bits; /* rounded to the nearest, of two to the even one; NaN stays NaN */
    memcpy(&bits, &value, sizeof bits);
    bits = value != value ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
    ((uint16_t *)y)[i] = bits >> 16;
}

/* A row w (k) times n rows x[j] (k), into s (n). n is 1 or 2, and known where this is inlined. Four
   sums each, since one alone waits for its own last addition. w is read once, from one end to the
   other, as memory likes it best. x is as `prepare` of the same type leaves it. */
/* Memory is asked for four kilobytes before it is needed. */
#define AHEAD(p) __builtin_prefetch((const char *)(p) + 8192)

#define DOT static inline __attribute__((always_inline)) void

static void prepare_float32(const void *x, long first, long k, int half, float *prepared) {
    if (!half) memcpy(prepared, (const float *)x + first, sizeof(float) * k);
    else
        for (long i = 0; i < k; i++) prepared[i] = get(x, first + i, 1);
}

DOT dot_float32(const float *w, const float *const *x, int n, long k, float *s) {
    floats sums[2][4] = {0};
    long i = 0;
    for (; i + 4 * LANES <= k; i += 4 * LANES)
        for (int c = 0; c < 4; c++) {
            floats values = load(w + i + c * LANES);
            AHEAD(w + i + c * LANES);
            for (int j = 0; j < n; j++) sums[j][c] += values * load(x[j] + i + c * LANES);
        }
    for (int j = 0; j < n; j++) {
        s[j] = sum((sums[j][0] + sums[j][1]) + (sums[j][2] + sums[j][3]));
        for (long rest = i; rest < k; rest++) s[j] += w[rest] * x[j][rest];
    }
}

/* Two bfloat16 are one word: the first in its lower half, the second in its upper half, each of
   which is a float32 with the other half zero. So x has its even places first, then the odd ones. */

static void prepare_bfloat16(const void *x, long first, long k, int half, float *prepared) {
    float *odd = prepared + (k + 1) / 2;
    for (long i = 0; i < k; i += 2) prepared[i / 2] = get(x, first + i, half);
    for (long i = 1; i < k; i += 2) odd[i / 2] = get(x, first + i, half);
}

DOT dot_bfloat16(const uint16_t *w, const float *const *x, int n, long k, float *s) {
    floats sums[2][4] = {0};
    long i = 0, odd = (k + 1) / 2;
    for (; i + 4 * LANES <= k; i += 4 * LANES)
        for (int c = 0; c < 2; c++) {
            words pairs;
            memcpy(&pairs, w + i + 2 * c * LANES, sizeof pairs);
            AHEAD(w + i + 2 * c * LANES);
            floats lower = (floats)(pairs << 16), upper = (floats)(pairs & 0xffff0000);
            for (int j = 0; j < n; j++) {
                const float *xs = x[j] + i / 2 + c * LANES;
                sums[j][2 * c] += lower * load(xs);
                sums[j][2 * c + 1] += upper * load(xs + odd);
            }
        }
    for (int j = 0; j < n; j++) {
        s[j] = sum((sums[j][0] + sums[j][1]) + (sums[j][2] + sums[j][3]));
        for (long rest = i; rest < k; rest++)
            s[j] += of_bfloat16(w[rest]) * x[j][(rest & 1) * odd + rest / 2];
    }
}

/* int8 times 15 bits and a sign: 512 such products fit into an int32. */
#define BLOCK 512

DOT dot_int8(const int8_t *w, const int16_t *const *x, int n, long k, float *s) {
    for (int j = 0; j < n; j++) s[j] = 0;
    for (long begin = 0; begin < k; begin += BLOCK) {
        long end = begin + BLOCK < k ? begin + BLOCK : k, i = begin;
        int32_t totals[2] = {0};
#ifdef __AVX2__
        __m256i sums[2][2] = {{_mm256_setzero_si256(), _mm256_setzero_si256()},
                              {_mm256_setzero_si256(), _mm256_setzero_si256()}};
        for (; i + 32 <= end; i += 32)
            for (int c = 0; c < 2; c++) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(w + i + 16 * c));
                __m256i values = _mm256_cvtepi8_epi16(bytes);
                if (!c) AHEAD(w + i);
                for (int j = 0; j < n; j++) {
                    __m256i xs = _mm256_loadu_si256((const __m256i *)(x[j] + i + 16 * c));
                    sums[j][c] = _mm256_add_epi32(sums[j][c], _mm256_madd_epi16(values, xs));
                }
            }
        for (int j = 0; j < n; j++) {
            int32_t lanes[8];
            __m256i both = _mm256_add_epi32(sums[j][0], sums[j][1]);
            memcpy(lanes, &both, sizeof lanes);
            for (int l = 0; l < 8; l++) totals[j] += lanes[l];
        }
#endif
        for (int j = 0; j < n; j++) {
            for (long rest = i; rest < end; rest++) totals[j] += w[rest] * x[j][rest];
            s[j] += totals[j];
        }
    }
}

/* y (b, n) = x (b, k) times the transpose of w (n, k), plus bias (n,) or NULL. x and y are float32
   or, if half, bfloat16. SCALE: of a result. */
#define ROWS(kind, SCALE)                                                                         \
    EACH for (long row = 0; row < n; row++)                                                       \
        for (long j = 0; j < b; j += 2) {                                                         \
            float s[2];                                                                           \
            if (j + 1 < b) dot_##kind(w + row * k, prepared + j, 2, k, s);                        \
            else dot_##kind(w + row * k, prepared + j, 1, k, s);                                  \
            for (long i = j; i < j + 2 && i < b; i++)                                             \
                put(y, i * n + row, half, s[i - j] * SCALE + (bias ? bias[row] : 0));             \
        }

#define ROWS_OF_FLOATS(kind, type)                                                                \
    void rows_##kind(const type *w, const void *x, const float *bias, void *y, long n, long k,    \
                     long b, int half, int threads) {                                             \
        float *space = malloc(sizeof(float) * b * k);                                             \
        const float **prepared = malloc(sizeof(float *) * b);                                     \
        for (long j = 0; j < b; j++) {                                                            \
            prepare_##kind(x, j * k, k, half, space + j * k);                                     \
            prepared[j] = space + j * k;                                                          \
        }                                                                                         \
        ROWS(kind, 1)                                                                             \
        free(prepared);                                                                           \
        free(space);                                                                              \
    }

ROWS_OF_FLOATS(float32, float)
ROWS_OF_FLOATS(bfloat16, uint16_t)

/* The same for w in int8 with a scale (n,). The largest number of a row of x becomes 32767. */
void rows_int8(const int8_t *w, const float *scale, const void *x, const float *bias, void *y,
               long n, long k, long b, int half, int threads) {
    int16_t *space = malloc(sizeof(int16_t) * b * k);
    const int16_t **prepared = malloc(sizeof(int16_t *) * b);
    float *unit = malloc(sizeof(float) * b);
    for (long j = 0; j < b; j++) {
        float largest = 0;
        for (long i = 0; i < k; i++) {
            float size = fabsf(get(x, j * k + i, half));
            largest = size > largest ? size : largest;
        }
        float inverse = largest > 0 ? 32767 / largest : 0;
        unit[j] = largest / 32767;
        for (long i = 0; i < k; i++)
            space[j * k + i] = (int16_t)rintf(get(x, j * k + i, half) * inverse);
        prepared[j] = space + j * k;
    }
    ROWS(int8, (scale[row] * unit[i]))
    free(unit);
    free(prepared);
    free(space);
}

/* Attention of one new token in each of b rows: q (b, h, d); k and v (b, hkv, room, d), of which
   row j has lengths[j] positions, the new one included; y (b, h, d). */
#define ATTEND(kind, type)                                                                        \
    void attend_##kind(const void *q, const type *k, const type *v, void *y,                      \
                       const int64_t *lengths, long b, long h, long hkv, long room, long d,       \
                       int half, int threads) {                                                   \
        EACH for (long each = 0; each < b * h; each++) {                                          \
            long row = each / h, shared = each % h / (h / hkv), length = lengths[row];            \
            const type *keys = k + (row * hkv + shared) * room * d;                               \
            const type *values = v + (row * hkv + shared) * room * d;                             \
            float *weight = malloc(sizeof(float) * (length + 2 * d)), *query = weight + length;   \
            float *result = query + d, largest = -INFINITY, total = 0;                            \
            prepare_##kind(q, each * d, d, half, query);                                          \
            for (long t = 0; t < length; t++) {                                                   \
                dot_##kind(keys + t * d, (const float *const *)&query, 1, d, weight + t);         \
                weight[t] /= sqrtf(d);                                                            \
                largest = weight[t] > largest ? weight[t] : largest;                              \
            }                                                                                     \
            for (long t = 0; t < length; t++) {                                                   \
                weight[t] = expf(weight[t] - largest);                                            \
                total += weight[t];                                                               \
            }                                                                                     \
            for (long i = 0; i < d; i++) result[i] = 0;                                           \
            for (long t = 0; t < length; t++) {                                                   \
                float share = weight[t] / total;                                                  \
                for (long i = 0; i < d; i++) result[i] += share * of_##kind(values[t * d + i]);   \
            }                                                                                     \
            for (long i = 0; i < d; i++) put(y, each * d + i, half, result[i]);                   \
            free(weight);                                                                         \
        }                                                                                         \
    }

ATTEND(float32, float)
ATTEND(bfloat16, uint16_t)
