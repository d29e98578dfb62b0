/* What decoding does for each token, on all cores: products with a few rows, and attention.

   Every sum is taken in one order, whatever the number of rows or threads, so a text does not
   depend on what is generated beside it. Built and called by kernels.py. No -ffast-math: it would
   turn denormal numbers off in the whole process. */

#include "kernels.h"

/* Room for n bytes; a vector of it never lies across two cache lines. */
static void *room_for(long n) { return aligned_alloc(64, (n + 63) / 64 * 64); }

/* A row w (k) times n rows x[j] (k), into s (n). n is 1 to MANY, and known where this is inlined. Four
   sums each, since one alone waits for its own last addition. w is read once, from one end to the
   other, and asked for eight kilobytes ahead. x is as `prepare` of the same type leaves it. */
#if LANES == 16
#define MANY 4 /* rows whose sums there are registers for */
#else
#define MANY 2
#endif
#define AHEAD(p) __builtin_prefetch((const char *)(p) + 8192)
#define DOT static inline __attribute__((always_inline)) void

static void prepare_float32(const float *x, long k, float *prepared) {
    memcpy(prepared, x, sizeof(float) * k);
}

DOT dot_float32(const float *w, const float *const *x, int n, long k, float *s) {
    floats sums[MANY][4] = {0};
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

static void prepare_bfloat16(const float *x, long k, float *prepared) {
    for (long i = 0; i < k; i += 2) prepared[i / 2] = x[i];
    for (long i = 1; i < k; i += 2) prepared[(k + 1) / 2 + i / 2] = x[i];
}

DOT dot_bfloat16(const uint16_t *w, const float *const *x, int n, long k, float *s) {
    floats sums[MANY][4] = {0};
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
#ifdef __AVX512VNNI__
#define WIDTH 32 /* products at once: two of int16 are added to each int32 */
typedef __m512i ints;
static inline ints widened(const int8_t *w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
}
static inline ints plus_products(ints sums, ints w, const int16_t *x) {
    return _mm512_dpwssd_epi32(sums, w, _mm512_loadu_si512(x));
}
#elif defined(__AVX2__)
#define WIDTH 16
typedef __m256i ints;
static inline ints widened(const int8_t *w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
}
static inline ints plus_products(ints sums, ints w, const int16_t *x) {
    __m256i products = _mm256_madd_epi16(w, _mm256_loadu_si256((const __m256i *)x));
    return _mm256_add_epi32(sums, products);
}
#endif

DOT dot_int8(const int8_t *w, const int16_t *const *x, int n, long k, float *s) {
    for (int j = 0; j < n; j++) s[j] = 0;
    for (long begin = 0; begin < k; begin += BLOCK) {
        long end = begin + BLOCK < k ? begin + BLOCK : k, i = begin;
        int32_t totals[MANY] = {0};
#ifdef WIDTH
        ints sums[MANY][2];
        memset(sums, 0, sizeof sums);
        for (; i + 2 * WIDTH <= end; i += 2 * WIDTH) {
            AHEAD(w + i);
            for (int c = 0; c < 2; c++) {
                ints values = widened(w + i + c * WIDTH);
                for (int j = 0; j < n; j++)
                    sums[j][c] = plus_products(sums[j][c], values, x[j] + i + c * WIDTH);
            }
        }
        for (int j = 0; j < n; j++) {
            int32_t lanes[WIDTH];
            memcpy(lanes, sums[j], sizeof lanes);
            for (int l = 0; l < WIDTH; l++) totals[j] += lanes[l];
        }
#endif
        for (int j = 0; j < n; j++) {
            for (long rest = i; rest < end; rest++) totals[j] += w[rest] * x[j][rest];
            s[j] += totals[j];
        }
    }
}

/* What goes before a product: nothing, or a norm of x over its k places. */
struct norm {
    int kind; /* 0: none, 1: LayerNorm, 2: RMSNorm */
    float eps;
    const float *weight, *bias;
};

static void normalise(float *x, long k, const struct norm *norm) {
    double mean = 0, square = 0;
    if (norm->kind == 1)
        for (long i = 0; i < k; i++) mean += x[i];
    mean /= k;
    for (long i = 0; i < k; i++) square += (x[i] - mean) * (x[i] - mean);
    float shift = mean, factor = 1 / sqrt(square / k + norm->eps);
    for (long i = 0; i < k; i++) {
        x[i] = (x[i] - shift) * factor * (norm->weight ? norm->weight[i] : 1);
        if (norm->bias) x[i] += norm->bias[i];
    }
}

static float *read_rows(const void *x, long b, long k, int half, const struct norm *norm) {
    float *rows = malloc(sizeof(float) * b * k);
    for (long i = 0; i < b * k; i++) rows[i] = get(x, i, half);
    for (long j = 0; j < b && norm->kind; j++) normalise(rows + j * k, k, norm);
    return rows;
}

/* What comes after it, for CHUNK values; with SWIGLU gates (n) and their factors (n). */
enum activation { NONE, GELU_BY_TANH, GELU, RELU_SQUARED, SWIGLU };
#define CHUNK 16

static inline void activate(float *x, const float *up, int activation) {
    if (activation == GELU_BY_TANH) /* x (1 + tanh z) / 2 = x / (1 + e^-2z) */
        for (int i = 0; i < CHUNK; i++)
            x[i] /= 1 + exponential(-1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    if (activation == GELU)
        for (int i = 0; i < CHUNK; i++) x[i] *= (1 + erff(x[i] * 0.7071067812f)) / 2;
    if (activation == RELU_SQUARED)
        for (int i = 0; i < CHUNK; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
    if (activation == SWIGLU)
        for (int i = 0; i < CHUNK; i++) x[i] *= up[i] / (1 + exponential(-x[i]));
}

/* y (b, n) = x (b, k) times the transpose of w (n, k), plus bias (n,), plus what y has already if
   adds; with SWIGLU w is (2 n, k), first the gate. x and y are float32 or, if half, bfloat16. SCALE(row, j):
   of a result. Pointers may be NULL. */
#define ONE(kind, which, values)                                                                  \
    {                                                                                             \
        float s[MANY];                                                                            \
        if (many == MANY) dot_##kind(w + (which) * k, prepared + j, MANY, k, s);                  \
        else                                                                                      \
            for (int i = 0; i < many; i++) dot_##kind(w + (which) * k, prepared + j + i, 1, k, s + i); \
        for (int i = 0; i < many; i++)                                                            \
            values[i][row - first] = s[i] * SCALE(which, j + i) + (bias ? bias[which] : 0);       \
    }

#define ROWS(kind)                                                                                \
    EACH for (long first = 0; first < n; first += CHUNK) {                                        \
        long end = first + CHUNK < n ? first + CHUNK : n;                                         \
        float values[MANY][CHUNK] = {0}, up[MANY][CHUNK] = {0};                                   \
        for (long j = 0; j < b; j += MANY) {                                                      \
            int many = b - j < MANY ? b - j : MANY;                                               \
            for (long row = first; row < end; row++) {                                            \
                ONE(kind, row, values)                                                            \
                if (activation == SWIGLU) ONE(kind, row + n, up)                                  \
            }                                                                                     \
            for (int i = 0; i < many; i++) {                                                      \
                activate(values[i], up[i], activation);                                           \
                for (long row = first, place = (j + i) * n + first; row < end; row++, place++) {  \
                    float value = values[i][row - first] + (adds ? get(y, place, half) : 0);      \
                    put(y, place, half, value);                                                   \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }

#define ROWS_OF_FLOATS(kind, type)                                                                \
    void rows_##kind(const type *w, const float *scale, const void *x, const float *bias, void *y, \
                     const struct norm *norm, long n, long k, long b, int activation, int adds,   \
                     int half, int threads) {                                                     \
        float *rows = read_rows(x, b, k, half, norm), *space = room_for(sizeof(float) * b * k);   \
        const float **prepared = malloc(sizeof(float *) * b);                                     \
        for (long j = 0; j < b; j++) {                                                            \
            prepare_##kind(rows + j * k, k, space + j * k);                                       \
            prepared[j] = space + j * k;                                                          \
        }                                                                                         \
        ROWS(kind)                                                                                \
        free(prepared);                                                                           \
        free(space);                                                                              \
        free(rows);                                                                               \
        (void)scale;                                                                              \
    }
#define SCALE(row, j) 1
ROWS_OF_FLOATS(float32, float)
ROWS_OF_FLOATS(bfloat16, uint16_t)
#undef SCALE

/* The same for w in int8 with a scale for each of its rows. The largest number of a row of x becomes
   32767. */
void rows_int8(const int8_t *w, const float *scale, const void *x, const float *bias, void *y,
               const struct norm *norm, long n, long k, long b, int activation, int adds, int half,
               int threads) {
    float *rows = read_rows(x, b, k, half, norm), *unit = malloc(sizeof(float) * b);
    int16_t *space = room_for(sizeof(int16_t) * b * k);
    const int16_t **prepared = malloc(sizeof(int16_t *) * b);
    for (long j = 0; j < b; j++) {
        float largest = 0;
        for (long i = j * k; i < (j + 1) * k; i++) {
            float size = fabsf(rows[i]);
            largest = size > largest ? size : largest;
        }
        float inverse = largest > 0 ? 32767 / largest : 0;
        unit[j] = largest / 32767;
        for (long i = j * k; i < (j + 1) * k; i++) space[i] = (int16_t)rintf(rows[i] * inverse);
        prepared[j] = space + j * k;
    }
#define SCALE(row, j) (scale[row] * unit[j])
    ROWS(int8)
    free(prepared);
    free(space);
    free(unit);
    free(rows);
}

/* Attention of b new tokens, `many` in a row of each text: qkv (b, h + 2 hkv, d) to y (b, h, d). k and
   v (b / many, hkv, room, d) hold the positions before them, and get theirs, positions[j]. Queries and
   keys go through norms of their own. cos and sin (b, d), as rope_rotation of model.py gives them, or
   NULL. */
#define ATTEND(kind, type)                                                                        \
    static void attend_##kind(const float *qkv, type *k, type *v, float *y,                       \
                              const int64_t *positions, const float *cos, const float *sin,       \
                              long b, long many, long h, long hkv, long room, long d,             \
                              const struct norm *q_norm, const struct norm *k_norm, int threads) { \
        long all = h + 2 * hkv, is_float = sizeof(type) == 4;                                     \
        float *ready = malloc(sizeof(float) * b * all * d);                                       \
        EACH for (long each = 0; each < b * all; each++) {                                        \
            long row = each / all, head = each % all, position = positions[row];                  \
            float *own = ready + each * d;                                                        \
            memcpy(own, qkv + each * d, sizeof(float) * d);                                       \
            if (head < h + hkv)                                                                   \
                turn(own, d, head < h ? q_norm : k_norm, cos ? cos + row * d : 0, sin + row * d); \
            if (head < h) continue;                                                               \
            long shared = (head - h) % hkv;                                                       \
            type *store = head < h + hkv ? k : v;                                                 \
            store += ((row / many * hkv + shared) * room + position) * d;                         \
            for (long i = 0; i < d; i++) put(store, i, !is_float, own[i]);                        \
        }                                                                                         \
        EACH for (long each = 0; each < b * h; each++) {                                          \
            long row = each / h, head = each % h, shared = head / (h / hkv);                      \
            long length = positions[row] + 1;                                                     \
            const type *keys = k + (row / many * hkv + shared) * room * d;                        \
            const type *values = v + (row / many * hkv + shared) * room * d;                      \
            float *weight = malloc(sizeof(float) * (length + 2 * d)), *query = weight + length;   \
            float *result = query + d, largest = -INFINITY, total = 0;                            \
            prepare_##kind(ready + (row * all + head) * d, d, query);                             \
            for (long t = 0; t < length; t++) {                                                   \
                dot_##kind(keys + t * d, (const float *const *)&query, 1, d, weight + t);         \
                weight[t] /= sqrtf(d);                                                            \
                largest = weight[t] > largest ? weight[t] : largest;                              \
            }                                                                                     \
            for (long t = 0; t < length; t++) weight[t] = exponential(weight[t] - largest);       \
            for (long t = 0; t < length; t++) total += weight[t];                                 \
            for (long i = 0; i < d; i++) result[i] = 0;                                           \
            for (long t = 0; t < length; t++) {                                                   \
                float share = weight[t] / total;                                                  \
                for (long i = 0; i < d; i++) result[i] += share * of_##kind(values[t * d + i]);   \
            }                                                                                     \
            memcpy(y + each * d, result, sizeof(float) * d);                                      \
            free(weight);                                                                         \
        }                                                                                         \
        free(ready);                                                                              \
    }

/* QK-norm and RoPE of one head (d). */
static void turn(float *x, long d, const struct norm *norm, const float *cos, const float *sin) {
    if (norm->kind) normalise(x, d, norm);
    for (long i = 0; cos && i < d / 2; i++) {
        float first = x[i], second = x[i + d / 2];
        x[i] = first * cos[i] + second * sin[i];
        x[i + d / 2] = second * cos[i + d / 2] + first * sin[i + d / 2];
    }
}

ATTEND(float32, float)
ATTEND(bfloat16, uint16_t)

/* The blocks of a model. Their float32 stream x (b, c) goes through all of them, in place. */
struct linear {
    const void *weight;
    const float *scale, *bias;
    long n, k;
    int kind; /* 0: float32, 1: bfloat16, 2: int8 */
};

struct block {
    struct norm attn_norm, mlp_norm, q_norm, k_norm;
    struct linear qkv, o, up, down;
    float stream_share, embed_share; /* of what the block reads */
};

struct shape {
    long h, hkv, d, room;
    int activation, cache_is_half;
};

static void multiply(const struct linear *own, const float *x, float *y, const struct norm *norm,
                     long b, int activation, int adds, int threads) {
    const void *w = own->weight;
    long n = own->n, k = own->k;
    if (own->kind == 0) rows_float32(w, 0, x, own->bias, y, norm, n, k, b, activation, adds, 0, threads);
    if (own->kind == 1) rows_bfloat16(w, 0, x, own->bias, y, norm, n, k, b, activation, adds, 0, threads);
    if (own->kind == 2)
        rows_int8(w, own->scale, x, own->bias, y, norm, n, k, b, activation, adds, 0, threads);
}

void run_blocks(const struct block *blocks, const struct shape *shape, float *x, void *const *keys,
                void *const *values, const int64_t *positions, const float *cos, const float *sin,
                long n_layer, long b, long many, int threads) {
    const struct norm none = {0, 0, 0, 0};
    if (!n_layer) return;
    long c = blocks->qkv.k, h = shape->h, hkv = shape->hkv, d = shape->d, room = shape->room;
    float *embedded = malloc(sizeof(float) * b * (c + blocks->qkv.n + h * d + blocks->up.n));
    float *qkv = embedded + b * c, *y = qkv + b * blocks->qkv.n, *inner = y + b * h * d;
    memcpy(embedded, x, sizeof(float) * b * c);
    for (long layer = 0; layer < n_layer; layer++) {
        const struct block *own = blocks + layer;
        for (long i = 0; i < b * c; i++)
            x[i] = own->stream_share * x[i] + own->embed_share * embedded[i];
        multiply(&own->qkv, x, qkv, &own->attn_norm, b, NONE, 0, threads);
        if (shape->cache_is_half)
            attend_bfloat16(qkv, keys[layer], values[layer], y, positions, cos, sin, b, many, h, hkv,
                            room, d, &own->q_norm, &own->k_norm, threads);
        else
            attend_float32(qkv, keys[layer], values[layer], y, positions, cos, sin, b, many, h, hkv,
                           room, d, &own->q_norm, &own->k_norm, threads);
        multiply(&own->o, y, x, &none, b, NONE, 1, threads);
        multiply(&own->up, x, inner, &own->mlp_norm, b, shape->activation, 0, threads);
        multiply(&own->down, inner, x, &none, b, NONE, 1, threads);
    }
    free(embedded);
}
