/* What eager torch is slow at in a generation step on a CPU: attention that reads the KV cache where it lies, writing
 * new keys and values there, the low-rank updates of many LoRAs at once, products with one row, rounding activations to
 * bytes and scaling the products back, and the largest logit. Compiled at first use for the processor at hand.
 *
 * Activations are fp32 or bf16, as flags say; sums are always fp32, or exact in int32.
 * Cache: keys [blocks, kv_heads, head_width, 16], values [blocks, kv_heads, 16, head_width], in one of three formats.
 * Bytes are multiples of a step, one for each place and head: fp32 [blocks, kv_heads, 16] for keys, and for values; keys
 * are [blocks, kv_heads, head_width / 4, 16, 4] then, as sums of four products are taken.
 */
#include "vectors.h"
#include <stdlib.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_BYTE_DOTS 1 /* products of unsigned and signed bytes, summed in 32 bits without saturation */
#else
#define HAS_BYTE_DOTS 0
#endif
#define BLOCK 16
#define CHUNK 8 /* blocks whose scores are computed before their weights: their sums and maxima are found once */
#define PARTS (BLOCK / LANES) /* vectors that hold a value for each place of a block */

enum { FP32, BF16, BYTES }; /* formats of the cache */

INLINE int64_t size_of(int format) { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }

INLINE vec load_cached(const void *p, int64_t at, int format) {
    return format == BYTES ? load_bytes((const int8_t *)p + at) : load(p, at, format == BF16);
}

/* Have `count` numbers from `at` on in the processor's second cache soon: the first has no room for a head's. */
INLINE void fetch(const void *p, int64_t at, int64_t count, int format) {
    const int64_t size = size_of(format);
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch((const char *)p + at * size + i, 0, 2);
}

/* `width` numbers of x from `at` on, with zeros behind up to a whole vector, as integers from -levels to levels with `zero`
 * added; returns the step of which these are multiples, the largest absolute value / levels. */
INLINE float round_to_bytes(void *to, const void *x, int64_t at, int64_t width, int is_bf16, int32_t levels, int32_t zero) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: added and taken away it rounds, ties to even */
    vec most = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
        vec size = absolute(load(x, at + i, is_bf16));
        most = either(size > most, size, most);
    }
    float largest = 1e-12f;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    const float step = largest / levels;
    for (int64_t i = 0; i < width; i += LANES) {
        vec rounded = (load(x, at + i, is_bf16) / step + magic) - magic;
        bvec bytes = __builtin_convertvector(__builtin_convertvector(rounded, ivec) + zero, bvec);
        if (i + LANES <= width) memcpy((uint8_t *)to + i, &bytes, LANES);
        else memcpy((uint8_t *)to + i, &bytes, width - i);
    }
    return step;
}

/* `sums` of products of a query's bytes with the keys' of a block, [PARTS] vectors of places. */
INLINE void multiply_bytes_of_block(const int8_t *query, const int8_t *keys, int64_t width, ivec *sums) {
#if HAS_BYTE_DOTS
    __m512i dots[4], negated = _mm512_set1_epi8((char)0x80); /* to unsigned: 128 more, of which the query's sum is taken */
    for (int u = 0; u < 4; u++) dots[u] = _mm512_setzero_si512();
    int32_t sum = 0;
    for (int64_t i = 0; i < width; i++) sum += query[i];
    for (int64_t i = 0; i < width; i += 16)
        for (int u = 0; u < 4; u++) {
            int32_t four;
            memcpy(&four, query + i + 4 * u, 4);
            __m512i unsigned_keys = _mm512_xor_si512(_mm512_loadu_si512(keys + (i + 4 * u) * BLOCK), negated);
            dots[u] = _mm512_dpbusd_epi32(dots[u], unsigned_keys, _mm512_set1_epi32(four));
        }
    sums[0] = (ivec)_mm512_add_epi32(_mm512_add_epi32(dots[0], dots[1]), _mm512_add_epi32(dots[2], dots[3])) - 128 * sum;
#else
    for (int j = 0; j < PARTS; j++) {
        ivec sum = {0};
        for (int64_t i = 0; i < width; i += 4) {
            ivec fours;
            memcpy(&fours, keys + i * BLOCK + 4 * j * LANES, sizeof fours);
            for (int u = 0; u < 4; u++) sum += (fours << (24 - 8 * u) >> 24) * query[i + u];
        }
        sums[j] = sum;
    }
#endif
}

/* One head of one sequence's keys and values. */
typedef struct {
    const int32_t *table;
    int64_t seen, kv_head;
} sequence_head;

/* The cache of one layer; steps are null unless it holds bytes. */
typedef struct {
    const void *keys, *values;
    const float *key_steps, *value_steps;
} cached;

/* Of block `number` the place among all heads, or a negative one where the sequence has no such block. */
INLINE int64_t place_ahead(sequence_head next, int64_t number, int64_t kv_heads) {
    return number * BLOCK < next.seen ? (int64_t)next.table[number] * kv_heads + next.kv_head : -1;
}

/* One query head over the first places of a sequence, with a running maximum as in FlashAttention; what comes `next` is
 * asked for meanwhile. Called with `width` and `format` known to the compiler, which then keeps the result in registers. */
INLINE void attend_head(const void *query, void *out, int q_is_bf16, const cached *c, sequence_head of, sequence_head next,
                        int64_t kv_heads, int64_t width, int format, float scale) {
    const int32_t *table = of.table;
    const int64_t seen = of.seen, kv_head = of.kv_head;
    vec mixed[256 / LANES];
    float q[256], scores[CHUNK * BLOCK], q_step = 0;
    int8_t q_bytes[256];
    const int64_t parts = width / LANES;
    if (format == BYTES) q_step = scale * round_to_bytes(q_bytes, query, 0, width, q_is_bf16, 127, 0);
    for (int64_t i = 0; i < parts; i++) store_f32(q + i * LANES, load(query, i * LANES, q_is_bf16) * scale);
    for (int64_t i = 0; i < parts; i++) mixed[i] = all(0);
    float largest = -INFINITY;
    vec total = all(0);
    for (int64_t first = 0; first < seen; first += CHUNK * BLOCK) {
        int64_t here = seen - first < CHUNK * BLOCK ? seen - first : CHUNK * BLOCK, blocks = (here + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t head = (int64_t)table[first / BLOCK + b] * kv_heads + kv_head, at = head * width * BLOCK;
            int64_t ahead = place_ahead(next, first / BLOCK + b, kv_heads) * width * BLOCK;
            if (ahead >= 0) fetch(c->keys, ahead, width * BLOCK, format);
            if (format == BYTES) {
                ivec sums[PARTS];
                multiply_bytes_of_block(q_bytes, (const int8_t *)c->keys + at, width, sums);
                for (int j = 0; j < PARTS; j++) {
                    vec steps = load_f32(c->key_steps + head * BLOCK + j * LANES) * q_step;
                    store_f32(scores + b * BLOCK + j * LANES, __builtin_convertvector(sums[j], vec) * steps);
                }
                continue;
            }
            vec sums[4][PARTS]; /* of every fourth part of the width: additions need not wait for each other */
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < PARTS; j++) sums[i][j] = all(0);
            for (int64_t i = 0; i < width; i += 4)
                for (int u = 0; u < 4; u++)
                    for (int j = 0; j < PARTS; j++)
                        sums[u][j] += q[i + u] * load_cached(c->keys, at + (i + u) * BLOCK + j * LANES, format);
            for (int j = 0; j < PARTS; j++)
                store_f32(scores + b * BLOCK + j * LANES, (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]));
        }
        for (int64_t i = here; i < blocks * BLOCK; i++) scores[i] = -INFINITY;
        vec most_of = load_f32(scores);
        for (int64_t i = LANES; i < blocks * BLOCK; i += LANES) {
            vec score = load_f32(scores + i);
            most_of = either(score > most_of, score, most_of);
        }
        float most = most_of[0];
        for (int i = 1; i < LANES; i++) most = most_of[i] > most ? most_of[i] : most;
        if (most > largest) {
            float shrink = largest == -INFINITY ? 0 : expf(largest - most);
            total *= shrink;
            for (int64_t i = 0; i < parts; i++) mixed[i] *= shrink;
            largest = most;
        }
        for (int64_t i = 0; i < blocks * BLOCK; i += LANES) {
            vec weight = exp_vec(load_f32(scores + i) - largest);
            total += weight;
            store_f32(scores + i, weight);
        }
        for (int64_t b = 0; b < blocks; b++) {
            int64_t head = (int64_t)table[first / BLOCK + b] * kv_heads + kv_head, at = head * width * BLOCK;
            int64_t ahead = place_ahead(next, first / BLOCK + b, kv_heads) * width * BLOCK;
            int64_t last = here - b * BLOCK < BLOCK ? here - b * BLOCK : BLOCK;
            float *weights = scores + b * BLOCK;
            if (ahead >= 0) fetch(c->values, ahead, width * BLOCK, format);
            if (format == BYTES)
                for (int64_t j = 0; j < BLOCK; j += LANES)
                    store_f32(weights + j, load_f32(weights + j) * load_f32(c->value_steps + head * BLOCK + j));
            for (int64_t place = 0; place < last; place++)
                for (int64_t i = 0; i < parts; i++)
                    mixed[i] += weights[place] * load_cached(c->values, at + place * width + i * LANES, format);
        }
    }
    float sum = sum_of(total);
    for (int64_t i = 0; i < parts; i++) store(out, i * LANES, mixed[i] / sum, q_is_bf16);
}

static void attend_any(const void *query, void *out, int q_is_bf16, const cached *c, sequence_head of, sequence_head next,
                       int64_t kv_heads, int64_t width, int format, float scale) {
#define OF(WIDTH, FORMAT) \
    if (width == WIDTH && format == FORMAT) \
        return attend_head(query, out, q_is_bf16, c, of, next, kv_heads, WIDTH, FORMAT, scale);
#define OF_WIDTH(WIDTH) OF(WIDTH, FP32) OF(WIDTH, BF16) OF(WIDTH, BYTES)
    OF_WIDTH(48) OF_WIDTH(64) OF_WIDTH(128) /* the embedded base, GPT-2, Llama and many more */
    attend_head(query, out, q_is_bf16, c, of, next, kv_heads, width, format, scale);
}

/* For row r of `rows`: queries q + rows[r] * q_row + head * q_head, over the first seen[r] places of the sequence whose
 * blocks are tables[table_of_row[r]]; results likewise in out. head_width is a multiple of 16, 256 at most. */
void attend(const void *q, void *out, int q_is_bf16, int64_t q_row, int64_t q_head, int64_t out_row, int64_t out_head,
            const void *keys, const void *values, const float *key_steps, const float *value_steps, int format,
            const int64_t *rows, const int64_t *seen, const int64_t *table_of_row, const int32_t *tables,
            int64_t table_width, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t width, float scale) {
    const int64_t size = q_is_bf16 ? 2 : 4;
    const cached cache = {keys, values, key_steps, value_steps};
    const int64_t group = heads / kv_heads, at_once = num_rows >= 32 ? 2 * heads : num_rows > 1 ? 8 : 3;
#pragma omp parallel for schedule(dynamic, at_once) if (num_rows * heads > 8)
    for (int64_t i = 0; i < num_rows * heads; i++) {
        int64_t r = i / heads, head = i % heads, next = i + 1 < num_rows * heads ? i + 1 : i;
        sequence_head of = {tables + table_of_row[r] * table_width, seen[r], head / group};
        sequence_head then = {tables + table_of_row[next / heads] * table_width, seen[next / heads], next % heads / group};
        const char *query = (const char *)q + (rows[r] * q_row + head * q_head) * size;
        char *result = (char *)out + (rows[r] * out_row + head * out_head) * size;
        attend_any(query, result, q_is_bf16, &cache, of, then, kv_heads, width, format, scale);
    }
}

/* Put each row's keys and values into place offsets[r] of blocks[r]. */
void write_cache(const void *k, int64_t k_row, int64_t k_head, const void *v, int64_t v_row, int64_t v_head,
                 int from_bf16, void *keys, void *values, float *key_steps, float *value_steps, int format,
                 const int64_t *blocks, const int64_t *offsets, int64_t num_rows, int64_t kv_heads, int64_t width) {
#pragma omp parallel for if (num_rows > 16)
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t head = 0; head < kv_heads; head++) {
            int64_t key = r * k_row + head * k_head, value = r * v_row + head * v_head;
            int64_t place = (blocks[r] * kv_heads + head) * BLOCK + offsets[r];
            int64_t at = (blocks[r] * kv_heads + head) * width * BLOCK;
            if (head + 1 < kv_heads) { /* a key is scattered over all lines of its block, which come from afar */
                const int64_t bytes = width * BLOCK * size_of(format);
                const char *next = (const char *)keys + at * size_of(format) + bytes;
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 1);
            }
            int64_t to_key = at + offsets[r], to_value = at + offsets[r] * width;
            if (format == BYTES) {
                int8_t bytes[256];
                key_steps[place] = round_to_bytes(bytes, k, key, width, from_bf16, 127, 0);
                for (int64_t i = 0; i < width; i += 4) memcpy((int8_t *)keys + at + i * BLOCK + 4 * offsets[r], bytes + i, 4);
                value_steps[place] = round_to_bytes((int8_t *)values + to_value, v, value, width, from_bf16, 127, 0);
                continue;
            }
            for (int64_t i = 0; i < width; i += LANES)
                store(values, to_value + i, load(v, value + i, from_bf16), format == BF16);
            if (format == FP32)
                for (int64_t i = 0; i < width; i++) ((float *)keys)[to_key + i * BLOCK] = one(k, key + i, from_bf16);
            else if (from_bf16)
                for (int64_t i = 0; i < width; i++) ((uint16_t *)keys)[to_key + i * BLOCK] = ((uint16_t *)k)[key + i];
            else
                for (int64_t i = 0; i < width; i++) ((uint16_t *)keys)[to_key + i * BLOCK] = to_bf16(((float *)k)[key + i]);
        }
}

/* `count` numbers of x from `at` on, in fp32. */
INLINE void copy_f32(float *to, const void *x, int64_t at, int64_t count, int is_bf16) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_f32(to + i, load(x, at + i, is_bf16));
    for (; i < count; i++) to[i] = one(x, at + i, is_bf16);
}

/* y += scale * B (A x) for each row, by the LoRA of its group: A [rank, in], B transposed [rank, out], both fp32; x and
 * y fp32 or bf16. `room` holds `in + out` floats for each row. */
void add_lora(const void *x, int64_t in, void *y, int64_t out, int is_bf16, float *room, const int64_t *group_of_row,
              int64_t num_rows, const int64_t *a, const int64_t *b, const int64_t *ranks, const float *scales) {
#pragma omp parallel for schedule(static) if (num_rows > 1) /* a group's rows, neighbours, find its factors in the cache */
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t group = group_of_row[r];
        if (group < 0) continue;
        const float *xr = (const float *)x + r * in, *low_to_out = (const float *)b[group];
        float *yr = (float *)y + r * out;
        if (is_bf16) {
            float *mine = room + r * (in + out);
            copy_f32(mine, x, r * in, in, 1);
            copy_f32(mine + in, y, r * out, out, 1);
            xr = mine, yr = mine + in;
        }
        for (int64_t j = 0; j < ranks[group]; j += 4) { /* four at once: x and y are read once for them */
            const float *rows[4], *directions[4];
            float lows[4];
            vec sums[4];
            for (int u = 0; u < 4; u++) {
                int64_t rank = j + u < ranks[group] ? j + u : j;
                rows[u] = (const float *)a[group] + rank * in;
                directions[u] = low_to_out + rank * out;
                sums[u] = all(0);
            }
            int64_t i = 0;
            for (; i + LANES <= in; i += LANES) {
                vec part = load_f32(xr + i);
                for (int u = 0; u < 4; u++) sums[u] += load_f32(rows[u] + i) * part;
            }
            for (int u = 0; u < 4; u++) {
                lows[u] = sum_of(sums[u]);
                for (int64_t k = i; k < in; k++) lows[u] += rows[u][k] * xr[k];
                lows[u] *= j + u < ranks[group] ? scales[group] : 0;
            }
            for (i = 0; i + LANES <= out; i += LANES) {
                vec sum = load_f32(yr + i);
                for (int u = 0; u < 4; u++) sum += lows[u] * load_f32(directions[u] + i);
                store_f32(yr + i, sum);
            }
            for (; i < out; i++)
                for (int u = 0; u < 4; u++) yr[i] += lows[u] * directions[u][i];
        }
        if (is_bf16) {
            int64_t i = 0;
            for (; i + LANES <= out; i += LANES) store(y, r * out + i, load_f32(yr + i), 1);
            for (; i < out; i++) ((uint16_t *)y)[r * out + i] = to_bf16(yr[i]);
        }
    }
}

/* y = W x + bias for one row, all fp32: W [out, in] as it is, read once; bias may be null. */
void multiply_row(const float *restrict x, int64_t in, const float *restrict w, const float *bias, float *y, int64_t out) {
    const int64_t whole = in / (2 * LANES) * (2 * LANES);
#pragma omp parallel for schedule(static) if (in * out > 65536)
    for (int64_t group = 0; group < (out + 3) / 4; group++) {
        int64_t first = group * 4, count = out - first < 4 ? out - first : 4;
        vec sums[4][2];
        const float *rows[4];
        for (int r = 0; r < 4; r++) sums[r][0] = sums[r][1] = all(0), rows[r] = w + (first + (r < count ? r : 0)) * in;
        /* The next group is asked for in its own order: to the processor four rows at once look like no stream. */
        const char *ahead = (const char *)(w + (first + 4) * in);
        for (int64_t i = 0; i < whole; i += 2 * LANES) {
            vec low = load_f32(x + i), high = load_f32(x + i + LANES);
            for (int r = 0; r < 4; r++, ahead += 8 * LANES) {
                for (int byte = 0; byte < 8 * LANES; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
                sums[r][0] += low * load_f32(rows[r] + i);
                sums[r][1] += high * load_f32(rows[r] + i + LANES);
            }
        }
        for (int r = 0; r < count; r++) {
            float sum = sum_of(sums[r][0] + sums[r][1]);
            for (int64_t i = whole; i < in; i++) sum += x[i] * rows[r][i];
            y[first + r] = bias ? sum + bias[first + r] : sum;
        }
    }
}

enum { AS_IT_IS, LAYER_NORM, RMS_NORM, WITH_GELU }; /* what a row goes through before a product */

/* One row of `prepare_rows`, of which `row` keeps the numbers, with zeros behind up to a whole vector. */
INLINE void prepare_row(int kind, void *x, const void *added, int is_bf16, const void *weight, const void *bias,
                        float epsilon, void *out, uint8_t *integers, float *step, int64_t at, int64_t width,
                        int32_t levels, float *row) {
    const int64_t whole = width / LANES * LANES, rest = width - whole;
    vec sums = all(0), squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = i < whole ? load(x, at + i, is_bf16) : load_some(x, at + i, rest, is_bf16);
        if (added) {
            v += i < whole ? load(added, at + i, is_bf16) : load_some(added, at + i, rest, is_bf16);
            v = as_stored(v, is_bf16);
            if (i < whole) store(x, at + i, v, is_bf16);
            else store_some(x, at + i, rest, v, is_bf16);
        }
        if (kind == WITH_GELU) v = as_stored(gelu_vec(v), is_bf16);
        if (kind == LAYER_NORM) sums += v;
        if (kind == RMS_NORM) squares += v * v;
        store_f32(row + i, v);
    }
    if (kind == LAYER_NORM || kind == RMS_NORM) {
        float mean = 0, of_zeros = 0;
        if (kind == LAYER_NORM) {
            mean = sum_of(sums) / width;
            for (int64_t i = 0; i < width; i += LANES) {
                vec v = load_f32(row + i) - mean;
                squares += v * v;
            }
            of_zeros = rest ? (LANES - rest) * mean * mean : 0;
        }
        const float scale = 1 / sqrtf((sum_of(squares) - of_zeros) / width + epsilon);
        for (int64_t i = 0; i < width; i += LANES) {
            vec v = (load_f32(row + i) - mean) * scale;
            if (weight) v *= i < whole ? load(weight, i, is_bf16) : load_some(weight, i, rest, is_bf16);
            if (bias) v += i < whole ? load(bias, i, is_bf16) : load_some(bias, i, rest, is_bf16);
            if (i == whole) /* behind the last number */
                for (int64_t j = rest; j < LANES; j++) v[j] = 0;
            store_f32(row + i, as_stored(v, is_bf16));
        }
    }
    if (out) {
        for (int64_t i = 0; i < whole; i += LANES) store(out, at + i, load_f32(row + i), is_bf16);
        if (rest) store_some(out, at + whole, rest, load_f32(row + whole), is_bf16);
    }
    if (integers) *step = round_to_bytes(integers + at, row, 0, width, 0, levels, levels + 1);
}

/* Rows of x [rows, width], to which `added` is added first, if it is not null, in place: through what `kind` says into
 * `out`, in their format, and rounded to integers from -levels to levels, stored with `levels + 1` added, each row by a
 * step of its own, its largest absolute value / levels. `out` or `integers` may be null, and weight and bias of a norm. */
void prepare_rows(int kind, void *x, const void *added, int is_bf16, const void *weight, const void *bias, float epsilon,
                  void *out, uint8_t *integers, float *steps, int64_t num_rows, int64_t width, int32_t levels) {
#pragma omp parallel if (num_rows * width > 16384)
    {
        float *row = malloc((width + LANES) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++) {
#define OF_KIND(KIND, IS_BF16) \
    if (kind == KIND && is_bf16 == IS_BF16) \
        prepare_row(KIND, x, added, IS_BF16, weight, bias, epsilon, out, integers, steps + r, r * width, width, levels, row);
            OF_KIND(AS_IT_IS, 0) OF_KIND(LAYER_NORM, 0) OF_KIND(RMS_NORM, 0) OF_KIND(WITH_GELU, 0)
            OF_KIND(AS_IT_IS, 1) OF_KIND(LAYER_NORM, 1) OF_KIND(RMS_NORM, 1) OF_KIND(WITH_GELU, 1)
        }
        free(row);
    }
}

/* out = y * steps + bias, y and bias fp32 [rows, width] and [width], out fp32 or bf16; out may be y, bias may be null. */
void scale_rows(const float *y, const float *steps, const float *bias, void *out, int is_bf16, int64_t num_rows,
                int64_t width) {
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for if (num_rows * width > 16384)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t at = r * width;
        for (int64_t i = 0; i < whole; i += LANES) {
            vec scaled = load_f32(y + at + i) * steps[r];
            store(out, at + i, bias ? scaled + load_f32(bias + i) : scaled, is_bf16);
        }
        for (int64_t i = whole; i < width; i++) put(out, at + i, y[at + i] * steps[r] + (bias ? bias[i] : 0), is_bf16);
    }
}

/* The place of the largest value of each row of x [rows, width], the first of equals. */
void largest_of_rows(const void *x, int is_bf16, int64_t *places, int64_t num_rows, int64_t width) {
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for schedule(static) if (num_rows > 1)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t at = r * width;
        vec most = all(-INFINITY);
        ivec where = {0}; /* of each lane's largest, the first of equals */
        for (int64_t i = 0; i < whole; i += LANES) {
            vec v = load(x, at + i, is_bf16);
            ivec is_larger = v > most;
            most = either(is_larger, v, most);
            where = ((int32_t)i & is_larger) | (where & ~is_larger);
        }
        float largest = -INFINITY;
        int64_t place = 0;
        for (int i = 0; i < LANES; i++)
            if (most[i] > largest || (most[i] == largest && where[i] + i < place)) largest = most[i], place = where[i] + i;
        for (int64_t i = whole; i < width; i++) {
            float v = one(x, at + i, is_bf16);
            if (v > largest) largest = v, place = i;
        }
        places[r] = place;
    }
}
