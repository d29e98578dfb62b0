/* What training does to each value beside the products, in one pass over memory instead of torch's
   many: QK-norm with RoPE, embed_skip, the loss and its gradient, and that of a long
   attention.

   x and what is made of it are float32 or, if half, bfloat16; sums are float32, each in one order
   whatever the number of threads. Built by kernels.py, called by fused.py. */

#include "kernels.h"

static inline void read_values(const void *x, long i, long n, int half, float *wide) {
    if (!half) memcpy(wide, (const float *)x + i, sizeof(float) * n);
    else
        for (long j = 0; j < n; j++) wide[j] = of_bfloat16(((const uint16_t *)x)[i + j]);
}

static inline void write_values(void *y, long i, long n, int half, const float *wide) {
    if (!half) memcpy((float *)y + i, wide, sizeof(float) * n);
    else
        for (long j = 0; j < n; j++) put(y, i + j, 1, wide[j]);
}

static inline float dot(const float *a, const float *b, long n) {
    floats sums = {0};
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    float s = sum(sums);
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

static inline float largest_of(const float *x, long n) {
    floats most = {0};
    most -= INFINITY;
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats values = load(x + i);
        words larger = (words)(values > most);
        most = (floats)(((words)values & larger) | ((words)most & ~larger));
    }
    float lanes[LANES], largest = -INFINITY;
    memcpy(lanes, &most, sizeof lanes);
    for (int l = 0; l < LANES; l++) largest = lanes[l] > largest ? lanes[l] : largest;
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* x (n) becomes e^(factor (x - its largest)). Gives the sum of these. */
static inline float exponentials(float *x, long n, float factor) {
    float largest = largest_of(x, n), total = 0;
    floats sums = {0};
    for (long i = 0; i < n; i++) x[i] = exponential(factor * (x[i] - largest));
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(x + i);
    for (total = sum(sums); i < n; i++) total += x[i];
    return total;
}

/* Heads x (b, t, h, d) over their root mean squares, then rotated: y (b, h, t, d). scale (b, t, h): 1
   over those. cos and sin (t, d), as rope_rotation of model.py gives them. */
void turn_heads(const void *x, void *y, float *scale, const float *cos, const float *sin, long b,
                long t, long h, long d, float eps, int half, int threads) {
    EACH for (long row = 0; row < b * t; row++) {
        const float *c = cos + row % t * d, *s = sin + row % t * d;
        float wide[d], turned[d];
        for (long head = 0; head < h; head++) {
            read_values(x, (row * h + head) * d, d, half, wide);
            float factor = 1 / sqrtf(dot(wide, wide, d) / d + eps);
            scale[row * h + head] = factor;
            for (long i = 0, j = d / 2; i < d / 2; i++, j++) {
                turned[i] = (wide[i] * c[i] + wide[j] * s[i]) * factor;
                turned[j] = (wide[j] * c[j] + wide[i] * s[j]) * factor;
            }
            write_values(y, ((row / t * h + head) * t + row % t) * d, d, half, turned);
        }
    }
}

/* The gradient of x from that of y. A rotation keeps lengths, so it is that of a norm, turned back. */
void turn_heads_back(const void *grad, const void *y, const float *scale, const float *cos,
                     const float *sin, void *x_grad, long b, long t, long h, long d, int half,
                     int threads) {
    EACH for (long row = 0; row < b * t; row++) {
        const float *c = cos + row % t * d, *s = sin + row % t * d;
        float wide[d], of_y[d], back[d];
        for (long head = 0; head < h; head++) {
            long place = ((row / t * h + head) * t + row % t) * d;
            read_values(grad, place, d, half, wide);
            read_values(y, place, d, half, of_y);
            float share = dot(wide, of_y, d) / d, factor = scale[row * h + head];
            for (long i = 0; i < d; i++) wide[i] = (wide[i] - share * of_y[i]) * factor;
            for (long i = 0, j = d / 2; i < d / 2; i++, j++) {
                back[i] = wide[i] * c[i] + wide[j] * s[j];
                back[j] = wide[j] * c[j] + wide[i] * s[i];
            }
            write_values(x_grad, (row * h + head) * d, d, half, back);
        }
    }
}

/* Scores (n, t, s) of the last t of s positions become their weights: the softmax of factor times those
   up to the position itself, then zeros. The gradients of these weights become those of the scores. */
void attention_back(void *scores, void *grads, long n, long t, long s, float factor, int half,
                    int threads) {
    EACH for (long row = 0; row < n * t; row++) {
        long seen = s - t + row % t + 1, whole = seen;
        float weight[s], wide[s];
        read_values(scores, row * s, seen, half, weight);
        read_values(grads, row * s, seen, half, wide);
        for (; whole < s && whole % LANES; whole++) weight[whole] = -INFINITY; /* whole vectors: faster */
        float share = 1 / exponentials(weight, whole, factor);
        for (long i = 0; i < seen; i++) weight[i] *= share;
        float mean = dot(weight, wide, seen);
        for (long i = 0; i < seen; i++) wide[i] = factor * weight[i] * (wide[i] - mean);
        for (long i = seen; i < s; i++) weight[i] = wide[i] = 0;
        write_values(scores, row * s, s, half, weight);
        write_values(grads, row * s, s, half, wide);
    }
}

/* y = share x + share_e e, of n values each. */
void mix(const float *x, const float *e, float *y, float share, float share_e, long n, int threads) {
    EACH for (long i = 0; i < n; i++) y[i] = share * x[i] + share_e * e[i];
}

/* The gradients of x and e (rows, c) from that of y, and, of each row, those of both shares. */
void mix_back(const float *grad, const float *x, const float *e, float *x_grad, float *e_grad,
              float *of_share, float *of_share_e, float share, float share_e, long rows, long c,
              int threads) {
    EACH for (long row = 0; row < rows; row++) {
        long begin = row * c;
        for (long i = begin; i < begin + c; i++) {
            x_grad[i] = share * grad[i];
            e_grad[i] = share_e * grad[i];
        }
        of_share[row] = dot(grad + begin, x + begin, c);
        of_share_e[row] = dot(grad + begin, e + begin, c);
    }
}

/* The cross-entropy of each row of logits (n, v), in nats: losses (n). If trains, the logits become
   its gradients. A target below 0 is not scored. */
void cross_entropies(void *logits, const int64_t *targets, float *losses, long n, long v, int trains,
                     int half, int threads) {
    EACH for (long row = 0; row < n; row++) {
        float *wide = malloc(sizeof(float) * v);
        long target = targets[row];
        losses[row] = 0;
        read_values(logits, row * v, v, half, wide);
        if (target >= 0) {
            float right = wide[target] - largest_of(wide, v), total = exponentials(wide, v, 1);
            losses[row] = logf(total) - right;
            for (long i = 0; i < v && trains; i++) wide[i] *= 1 / total;
            wide[target] -= 1;
        } else
            memset(wide, 0, sizeof(float) * v);
        if (trains) write_values(logits, row * v, v, half, wide);
        free(wide);
    }
}
