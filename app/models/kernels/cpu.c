/* What eager torch is slow at in a training step on a CPU: GELU, and the loss of a chunk of logits with its gradient.
 * Compiled at first use for the processor at hand. Data are fp32 or bf16, as flags say; sums are fp32. */
#include "vectors.h"

/* s + x * s * (1 - s) * t', s being the sigmoid of t. */
INLINE vec slope_vec(vec x) {
    vec square = x * x, s = sigmoid_vec(x * (all(FIRST) + THIRD * square));
    return s + x * s * (1.0f - s) * (all(FIRST) + 3 * THIRD * square);
}

void gelu(const void *x, void *y, int is_bf16, int64_t count) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for schedule(static) if (count > 16384)
    for (int64_t i = 0; i < whole; i += LANES) store(y, i, gelu_vec(load(x, i, is_bf16)), is_bf16);
    store_some(y, whole, count - whole, gelu_vec(load_some(x, whole, count - whole, is_bf16)), is_bf16);
}

void gelu_backward(const void *x, const void *grad_y, void *grad_x, int is_bf16, int64_t count) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for schedule(static) if (count > 16384)
    for (int64_t i = 0; i < whole; i += LANES)
        store(grad_x, i, load(grad_y, i, is_bf16) * slope_vec(load(x, i, is_bf16)), is_bf16);
    vec slope = slope_vec(load_some(x, whole, count - whole, is_bf16));
    store_some(grad_x, whole, count - whole, load_some(grad_y, whole, count - whole, is_bf16) * slope, is_bf16);
}

/* Of each row of logits [rows, vocab], `stride` apart, -log p under its label, smoothed; a label outside the vocabulary
 * gives NaN. With a gradient the logits become softmax(logits) - smoothed label. */
void cross_entropy(void *logits, int is_bf16, int64_t stride, const int64_t *labels, float *losses, int64_t rows,
                   int64_t vocab, float smoothing, int with_gradient) {
    const int64_t whole = vocab / LANES * LANES;
    const float share = smoothing / vocab;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = r * stride, label = labels[r];
        const int is_known = label >= 0 && label < vocab;
        const float answer = is_known ? one(logits, at + label, is_bf16) : NAN;
        vec most = all(-INFINITY), sums = all(0), totals = all(0);
        for (int64_t i = 0; i < whole; i += LANES) {
            vec v = load(logits, at + i, is_bf16);
            most = either(v > most, v, most);
            sums += v;
        }
        float largest = -INFINITY, sum = sum_of(sums);
        for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        for (int64_t i = whole; i < vocab; i++) {
            float v = one(logits, at + i, is_bf16);
            largest = v > largest ? v : largest;
            sum += v;
        }
        for (int64_t i = 0; i < whole; i += LANES) totals += exp_vec(load(logits, at + i, is_bf16) - largest);
        float total = sum_of(totals);
        for (int64_t i = whole; i < vocab; i++) total += expf(one(logits, at + i, is_bf16) - largest);
        const float log_total = largest + logf(total);
        losses[r] = log_total - (1 - smoothing) * answer - (share ? share * sum : 0);
        if (!with_gradient) continue;
        for (int64_t i = 0; i < whole; i += LANES)
            store(logits, at + i, exp_vec(load(logits, at + i, is_bf16) - log_total) - share, is_bf16);
        for (int64_t i = whole; i < vocab; i++)
            put(logits, at + i, expf(one(logits, at + i, is_bf16) - log_total) - share, is_bf16);
        /* Less one in fp32: bf16 would round the p of a sure answer to 1, and its gradient to 0. */
        if (is_known) put(logits, at + label, expf(answer - log_total) - (1 - smoothing) - share, is_bf16);
    }
}
