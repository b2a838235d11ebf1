/* What eager torch is slow at in a generation step on a CPU: attention that reads the KV cache where it lies, writing
 * new keys and values there, the low-rank updates of many LoRAs at once, and products with one row. Compiled at first use for the processor at
 * hand.
 *
 * Cache: keys [blocks, kv_heads, head_width, 16], values [blocks, kv_heads, 16, head_width], fp32 or bf16.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 16
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (BLOCK / LANES) /* vectors that hold a value for each place of a block */

/* GCC's and clang's own vectors, as wide as the processor's; wider ones would be taken apart in memory. */
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec load_f32(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store_f32(float *p, vec x) { memcpy(p, &x, sizeof x); }

INLINE vec load_bf16(const uint16_t *p) {
    hvec halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, uvec) << 16);
}

INLINE vec load(const void *p, int64_t at, int is_bf16) {
    return is_bf16 ? load_bf16((const uint16_t *)p + at) : load_f32((const float *)p + at);
}

/* e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, and e^r by its Taylor series to the 7th power (error below 1e-7). */
INLINE vec exp_vec(vec x) {
    ivec is_tiny = x < -87.0f;
    vec t = x * 1.44269504088896f;
    ivec n = __builtin_convertvector(t - 0.5f, ivec); /* rounds towards zero, and t is not positive */
    vec k = __builtin_convertvector(n, vec);
    vec r = (x - k * 0.693145751953125f) - k * 1.42860682030941e-6f;
    vec p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec bits = (ivec)(p * (vec)((n + 127) << 23)) & ~is_tiny;
    return (vec)bits;
}

INLINE float sum_of(vec x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

INLINE uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* One query head over the first `seen` places of a sequence, with a running maximum as in FlashAttention. Called with
 * `width` and `is_bf16` known to the compiler, which then keeps the result in registers. */
INLINE void attend_head(const float *restrict q, const void *keys, const void *values, float *restrict out,
                        const int32_t *table, int64_t seen, int64_t kv_heads, int64_t kv_head, int64_t width,
                        int is_bf16, float scale) {
    vec mixed[256 / LANES];
    const int64_t parts = width / LANES;
    for (int64_t i = 0; i < parts; i++) mixed[i] = all(0);
    float largest = -INFINITY, total = 0;
    for (int64_t first = 0; first < seen; first += BLOCK) {
        int64_t at = ((int64_t)table[first / BLOCK] * kv_heads + kv_head) * width * BLOCK;
        vec even[PARTS], odd[PARTS];
        for (int j = 0; j < PARTS; j++) even[j] = odd[j] = all(0);
        for (int64_t i = 0; i < width; i += 2)
            for (int j = 0; j < PARTS; j++) {
                even[j] += q[i] * load(keys, at + i * BLOCK + j * LANES, is_bf16);
                odd[j] += q[i + 1] * load(keys, at + (i + 1) * BLOCK + j * LANES, is_bf16);
            }
        float scores[BLOCK];
        for (int j = 0; j < PARTS; j++) store_f32(scores + j * LANES, (even[j] + odd[j]) * scale);
        int64_t here = seen - first < BLOCK ? seen - first : BLOCK;
        for (int64_t i = here; i < BLOCK; i++) scores[i] = -INFINITY;
        float most = scores[0];
        for (int64_t i = 1; i < BLOCK; i++) most = scores[i] > most ? scores[i] : most;
        if (most > largest) {
            float shrink = largest == -INFINITY ? 0 : expf(largest - most);
            total *= shrink;
            for (int64_t i = 0; i < parts; i++) mixed[i] *= shrink;
            largest = most;
        }
        for (int j = 0; j < PARTS; j++) {
            vec weight = exp_vec(load_f32(scores + j * LANES) - largest);
            total += sum_of(weight);
            store_f32(scores + j * LANES, weight);
        }
        for (int64_t place = 0; place < here; place++)
            for (int64_t i = 0; i < parts; i++)
                mixed[i] += scores[place] * load(values, at + place * width + i * LANES, is_bf16);
    }
    for (int64_t i = 0; i < parts; i++) store_f32(out + i * LANES, mixed[i] / total);
}

static void attend_any(const float *q, const void *keys, const void *values, float *out, const int32_t *table,
                       int64_t seen, int64_t kv_heads, int64_t kv_head, int64_t width, int is_bf16, float scale) {
#define OF(WIDTH, IS_BF16) \
    if (width == WIDTH && is_bf16 == IS_BF16) \
        return attend_head(q, keys, values, out, table, seen, kv_heads, kv_head, WIDTH, IS_BF16, scale);
    OF(64, 0) OF(64, 1) OF(128, 0) OF(128, 1)
    attend_head(q, keys, values, out, table, seen, kv_heads, kv_head, width, is_bf16, scale);
}

/* For row r of `rows`: queries q + rows[r] * q_row + head * q_head, over the first seen[r] places of the sequence whose
 * blocks are tables[table_of_row[r]]; results likewise in out. head_width is a multiple of 16, 256 at most. */
void attend(const float *q, int64_t q_row, int64_t q_head, const void *keys, const void *values, int is_bf16, float *out,
            int64_t out_row, int64_t out_head, const int64_t *rows, const int64_t *seen, const int64_t *table_of_row,
            const int32_t *tables, int64_t table_width, int64_t num_rows, int64_t heads, int64_t kv_heads,
            int64_t width, float scale) {
#pragma omp parallel for schedule(dynamic, 8) collapse(2) if (num_rows * heads > 16)
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t head = 0; head < heads; head++) {
            const float *query = q + rows[r] * q_row + head * q_head;
            float *result = out + rows[r] * out_row + head * out_head;
            const int32_t *table = tables + table_of_row[r] * table_width;
            int64_t kv_head = head / (heads / kv_heads);
            attend_any(query, keys, values, result, table, seen[r], kv_heads, kv_head, width, is_bf16, scale);
        }
}

/* Put each row's keys and values into place offsets[r] of blocks[r]. */
void write_cache(const float *k, int64_t k_row, int64_t k_head, const float *v, int64_t v_row, int64_t v_head,
                 void *keys, void *values, int is_bf16, const int64_t *blocks, const int64_t *offsets,
                 int64_t num_rows, int64_t kv_heads, int64_t width) {
#pragma omp parallel for if (num_rows > 16)
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t head = 0; head < kv_heads; head++) {
            const float *key = k + r * k_row + head * k_head, *value = v + r * v_row + head * v_head;
            int64_t at = (blocks[r] * kv_heads + head) * width * BLOCK;
            if (is_bf16) {
                uint16_t *to_k = (uint16_t *)keys + at + offsets[r], *to_v = (uint16_t *)values + at + offsets[r] * width;
                for (int64_t i = 0; i < width; i++) to_k[i * BLOCK] = to_bf16(key[i]), to_v[i] = to_bf16(value[i]);
            } else {
                float *to_k = (float *)keys + at + offsets[r], *to_v = (float *)values + at + offsets[r] * width;
                for (int64_t i = 0; i < width; i++) to_k[i * BLOCK] = key[i], to_v[i] = value[i];
            }
        }
}

/* y += scale * B (A x) for each row, by the LoRA of its group: A [rank, in], B transposed [rank, out]. */
void add_lora(const float *x, int64_t in, float *y, int64_t out, const int64_t *group_of_row, int64_t num_rows,
              const int64_t *a, const int64_t *b, const int64_t *ranks, const float *scales) {
#pragma omp parallel for schedule(dynamic, 1) if (num_rows > 1)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t group = group_of_row[r];
        if (group < 0) continue;
        const float *xr = x + r * in, *low_to_out = (const float *)b[group];
        float *yr = y + r * out;
        for (int64_t j = 0; j < ranks[group]; j++) {
            const float *row = (const float *)a[group] + j * in;
            vec sum = all(0);
            int64_t i = 0;
            for (; i + LANES <= in; i += LANES) sum += load_f32(row + i) * load_f32(xr + i);
            float low = sum_of(sum);
            for (; i < in; i++) low += row[i] * xr[i];
            low *= scales[group];
            const float *direction = low_to_out + j * out;
            for (i = 0; i + LANES <= out; i += LANES)
                store_f32(yr + i, load_f32(yr + i) + low * load_f32(direction + i));
            for (; i < out; i++) yr[i] += low * direction[i];
        }
    }
}

/* y = W x + bias for one row: W [out, in] as it is, read once; bias may be null. */
void multiply_row(const float *restrict x, int64_t in, const float *restrict w, const float *bias, float *restrict y,
                  int64_t out) {
    const int64_t whole = in / (2 * LANES) * (2 * LANES);
#pragma omp parallel for schedule(static) if (in * out > 65536)
    for (int64_t group = 0; group < (out + 3) / 4; group++) {
        int64_t first = group * 4, count = out - first < 4 ? out - first : 4;
        vec sums[4][2];
        for (int r = 0; r < 4; r++) sums[r][0] = sums[r][1] = all(0);
        const float *rows[4];
        for (int r = 0; r < 4; r++) rows[r] = w + (first + (r < count ? r : 0)) * in;
        for (int64_t i = 0; i < whole; i += 2 * LANES) {
            vec low = load_f32(x + i), high = load_f32(x + i + LANES);
            for (int r = 0; r < 4; r++) {
                sums[r][0] += low * load_f32(rows[r] + i);
                sums[r][1] += high * load_f32(rows[r] + i + LANES);
            }
        }
        for (int r = 0; r < count; r++) {
            float sum = sum_of(sums[r][0] + sums[r][1]);
            for (int64_t i = whole; i < in; i++) sum += x[i] * rows[r][i];
            y[first + r] = sum + (bias ? bias[first + r] : 0);
        }
    }
}
