/* Vectors, bfloat16 and e^x, for kernels.c and fused.c. */

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

/* The upper half is added to the lower one until one value is left. */
static inline float sum(floats v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#endif
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

/* e^x = 2^n e^r with |r| < 0.35, by eight terms of its series: 1e-7 relative. Without branches, so that
   a loop over it becomes vector code, which one over expf does not. */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first of few bits */
    float y = 1 + r / 7;
    for (int i = 6; i; i--) y = 1 + r * (1.0f / i) * y;
    union { int32_t bits; float value; } power = {((int)n + 127) << 23};
    return y * power.value;
}
