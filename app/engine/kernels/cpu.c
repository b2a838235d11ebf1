/* What eager torch is slow at in a generation step on a CPU: attention that reads the KV cache where it lies, writing
 * new keys and values there, and the low-rank updates of many LoRAs at once. Compiled at first use for the processor at
 * hand; vectors are GCC's and clang's own, 16 floats wide, which become what the processor has.
 *
 * Cache: keys [blocks, kv_heads, head_width, 16], values [blocks, kv_heads, 16, head_width], fp32 or bf16.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 16

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2)));

static inline vec all(float x) {
    return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

static inline vec load_f32(const float *p) { return *(const vec *)p; }

static inline vec load_bf16(const uint16_t *p) {
    uvec bits = __builtin_convertvector(*(const hvec *)p, uvec) << 16;
    return (vec)bits;
}

static inline uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, and e^r by its Taylor series to the 7th power (error below 1e-7). */
static inline vec exp_vec(vec x) {
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
    vec scale = (vec)((n + 127) << 23);
    ivec bits = (ivec)(p * scale) & ~is_tiny;
    return (vec)bits;
}

static inline float sum_of(vec x) {
    float s = 0;
    for (int i = 0; i < 16; i++) s += x[i];
    return s;
}

static inline float max_of(vec x) {
    float m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* One query head over the first `seen` places of a sequence, with a running maximum as in FlashAttention. */
#define ATTEND_HEAD(NAME, TYPE, LOAD)                                                                              \
    static void NAME(const float *q, const TYPE *keys, const TYPE *values, float *out, const int32_t *table,       \
                     int64_t seen, int64_t kv_heads, int64_t kv_head, int64_t width, float scale) {                \
        vec mixed[16]; /* head_width up to 256 */                                                                  \
        int64_t parts = width / 16;                                                                                \
        for (int64_t i = 0; i < parts; i++) mixed[i] = all(0);                                                     \
        float largest = -INFINITY, total = 0;                                                                      \
        for (int64_t first = 0; first < seen; first += BLOCK) {                                                    \
            int64_t at = ((int64_t)table[first / BLOCK] * kv_heads + kv_head) * width * BLOCK;                     \
            const TYPE *k = keys + at, *v = values + at;                                                           \
            vec even = all(0), odd = all(0);                                                                       \
            for (int64_t i = 0; i < width; i += 2) {                                                               \
                even += q[i] * LOAD(k + i * BLOCK);                                                                \
                odd += q[i + 1] * LOAD(k + (i + 1) * BLOCK);                                                       \
            }                                                                                                      \
            vec score = (even + odd) * scale;                                                                      \
            int64_t here = seen - first < BLOCK ? seen - first : BLOCK;                                            \
            for (int64_t i = here; i < BLOCK; i++) score[i] = -INFINITY;                                           \
            float most = max_of(score);                                                                            \
            if (most > largest) {                                                                                  \
                float shrink = largest == -INFINITY ? 0 : expf(largest - most);                                    \
                total *= shrink;                                                                                   \
                for (int64_t i = 0; i < parts; i++) mixed[i] *= shrink;                                            \
                largest = most;                                                                                    \
            }                                                                                                      \
            vec weight = exp_vec(score - largest);                                                                 \
            total += sum_of(weight);                                                                               \
            for (int64_t place = 0; place < here; place++) {                                                       \
                float w = weight[place];                                                                           \
                for (int64_t i = 0; i < parts; i++) mixed[i] += w * LOAD(v + place * width + i * 16);              \
            }                                                                                                      \
        }                                                                                                          \
        for (int64_t i = 0; i < parts; i++) *(vec *)(out + i * 16) = mixed[i] / total;                             \
    }

ATTEND_HEAD(attend_head_f32, float, load_f32)
ATTEND_HEAD(attend_head_bf16, uint16_t, load_bf16)

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
            if (is_bf16)
                attend_head_bf16(query, keys, values, result, table, seen[r], kv_heads, kv_head, width, scale);
            else
                attend_head_f32(query, keys, values, result, table, seen[r], kv_heads, kv_head, width, scale);
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
            for (; i + 16 <= in; i += 16) sum += load_f32(row + i) * load_f32(xr + i);
            float low = sum_of(sum);
            for (; i < in; i++) low += row[i] * xr[i];
            low *= scales[group];
            const float *direction = low_to_out + j * out;
            for (i = 0; i + 16 <= out; i += 16) *(vec *)(yr + i) += low * load_f32(direction + i);
            for (; i < out; i++) yr[i] += low * direction[i];
        }
    }
}
