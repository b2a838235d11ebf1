/* What eager torch is slow at in a generation step on a CPU: attention that reads the KV cache where it lies, writing
 * new keys and values there, the low-rank updates of many LoRAs at once, products with one row, rounding activations to
 * bytes and scaling the products back, and the largest logit. Compiled at first use for the processor at hand.
 *
 * Activations are fp32 or bf16, as flags say; sums are always fp32, or exact in int32.
 * Cache: keys [blocks, kv_heads, head_width, 16], values [blocks, kv_heads, 16, head_width], in one of three formats.
 * Bytes are multiples of a step, one for each place and head: fp32 [blocks, kv_heads, 16] for keys, and for values. As
 * sums of four products are taken, keys are [blocks, kv_heads, head_width / 4, 16, 4] then, and values
 * [blocks, kv_heads, 4, head_width, 4].
 */
#include "vectors.h"
#include <omp.h>
#include <stdlib.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_BYTE_DOTS 1 /* products of unsigned and signed bytes, summed in 32 bits without saturation */
#else
#define HAS_BYTE_DOTS 0
#endif
#define BLOCK 16
#define CHUNK 8 /* blocks whose scores are computed before their weights: their sums and maxima are found once */
#define AT_ONCE 16 /* heads of a row that go through a block together, at most */
#define PARTS (BLOCK / LANES) /* vectors that hold a value for each place of a block */

enum { FP32, BF16, BYTES }; /* formats of the cache */

INLINE int64_t size_of(int format) { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }

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

/* `sums` of products of a query's bytes, whose sum is `of_query`, with the keys' of a block, [PARTS] vectors of places. */
INLINE void multiply_bytes_of_block(const int8_t *query, int32_t of_query, const int8_t *keys, int64_t width, ivec *sums) {
#if HAS_BYTE_DOTS
    __m512i dots[4], negated = _mm512_set1_epi8((char)0x80); /* to unsigned: 128 more, of which the query's sum is taken */
    for (int u = 0; u < 4; u++) dots[u] = _mm512_setzero_si512();
    for (int64_t i = 0; i < width; i += 16)
        for (int u = 0; u < 4; u++) {
            int32_t four;
            memcpy(&four, query + i + 4 * u, 4);
            __m512i unsigned_keys = _mm512_xor_si512(_mm512_loadu_si512(keys + (i + 4 * u) * BLOCK), negated);
            dots[u] = _mm512_dpbusd_epi32(dots[u], unsigned_keys, _mm512_set1_epi32(four));
        }
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(dots[0], dots[1]), _mm512_add_epi32(dots[2], dots[3]));
    sums[0] = (ivec)sum - 128 * of_query;
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

INLINE float largest_of(const float *x, int64_t count) {
    vec most_of = load_f32(x);
    for (int64_t i = LANES; i < count; i += LANES) {
        vec other = load_f32(x + i);
        most_of = either(other > most_of, other, most_of);
    }
    float most = most_of[0];
    for (int i = 1; i < LANES; i++) most = most_of[i] > most ? most_of[i] : most;
    return most;
}

/* A chunk's weights, none negative, in 16 bits: the upper and the lower byte of each place's, and the step of which it is
 * a multiple, the largest / 65535. */
typedef struct {
    uint8_t upper[CHUNK * BLOCK], lower[CHUNK * BLOCK];
    float step;
} byte_weights;

INLINE void round_weights(byte_weights *to, const float *weights, int64_t places) {
    const float most = largest_of(weights, places) + 1e-30f;
    to->step = most / 65535;
    for (int64_t i = 0; i < places; i += LANES) {
        ivec rounded = __builtin_convertvector(load_f32(weights + i) * (65535 / most) + 0.5f, ivec);
        bvec upper = __builtin_convertvector(rounded >> 8, bvec), lower = __builtin_convertvector(rounded & 255, bvec);
        memcpy(to->upper + i, &upper, LANES);
        memcpy(to->lower + i, &lower, LANES);
    }
}

/* The values' bytes of a block times its places' weights, added to `sums`, [width / LANES] vectors in 1 / 256 and in 1. A
 * chunk's sums are exact: 128 places * 255 * 127 * 257 is below 2^31. */
INLINE void add_weighted_bytes(ivec (*sums)[2], const byte_weights *weights, int64_t first, const int8_t *values,
                               int64_t width) {
    for (int64_t place = 0; place < BLOCK; place += 4) {
        const int8_t *of_four = values + place * width;
        int32_t upper, lower;
        memcpy(&upper, weights->upper + first + place, 4);
        memcpy(&lower, weights->lower + first + place, 4);
        for (int64_t i = 0; i < width / LANES; i++) {
            ivec fours;
            memcpy(&fours, of_four + 4 * i * LANES, sizeof fours);
#if HAS_BYTE_DOTS
            sums[i][0] = (ivec)_mm512_dpbusd_epi32((__m512i)sums[i][0], _mm512_set1_epi32(upper), (__m512i)fours);
            sums[i][1] = (ivec)_mm512_dpbusd_epi32((__m512i)sums[i][1], _mm512_set1_epi32(lower), (__m512i)fours);
#else
            for (int u = 0; u < 4; u++) {
                ivec value = fours << (24 - 8 * u) >> 24;
                sums[i][0] += value * (upper >> 8 * u & 255);
                sums[i][1] += value * (lower >> 8 * u & 255);
            }
#endif
        }
    }
}

/* The cache of one layer; steps are null unless it holds bytes. */
typedef struct {
    const void *keys, *values;
    const float *key_steps, *value_steps;
} cached;

/* A query head on its way through a chunk: `q` is scaled, or bytes, multiples of `q_step`, whose sum is `sum_of_q`;
 * `scores` of the chunk's places become their weights, for values that are bytes `rounded` ones. */
typedef struct {
    float q[256], scores[CHUNK * BLOCK];
    int8_t q_bytes[256];
    byte_weights rounded;
    float q_step, largest;
    int32_t sum_of_q;
    vec total;
} query_head;

INLINE void begin_head(query_head *of, const void *query, int q_is_bf16, int64_t width, int format, float scale) {
    of->largest = -INFINITY;
    of->total = all(0);
    if (format == BYTES) {
        of->q_step = scale * round_to_bytes(of->q_bytes, query, 0, width, q_is_bf16, 127, 0);
        of->sum_of_q = 0;
        for (int64_t i = 0; i < width; i++) of->sum_of_q += of->q_bytes[i];
    } else
        for (int64_t i = 0; i < width; i += LANES) store_f32(of->q + i, load(query, i, q_is_bf16) * scale);
}

/* The scores of a block, `head` among the cache's, as the chunk's from place `first` on. */
INLINE void score_block(query_head *of, const cached *c, int64_t head, int64_t first, int64_t width, int format) {
    const int64_t at = head * width * BLOCK;
    if (format == BYTES) {
        ivec sums[PARTS];
        multiply_bytes_of_block(of->q_bytes, of->sum_of_q, (const int8_t *)c->keys + at, width, sums);
        for (int j = 0; j < PARTS; j++) {
            vec steps = load_f32(c->key_steps + head * BLOCK + j * LANES) * of->q_step;
            store_f32(of->scores + first + j * LANES, __builtin_convertvector(sums[j], vec) * steps);
        }
        return;
    }
    vec sums[4][PARTS]; /* of every fourth part of the width: additions need not wait for each other */
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < PARTS; j++) sums[i][j] = all(0);
    for (int64_t i = 0; i < width; i += 4)
        for (int u = 0; u < 4; u++)
            for (int j = 0; j < PARTS; j++)
                sums[u][j] += of->q[i + u] * load(c->keys, at + (i + u) * BLOCK + j * LANES, format == BF16);
    for (int j = 0; j < PARTS; j++)
        store_f32(of->scores + first + j * LANES, (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]));
}

/* The scores of a chunk's first `here` places become weights; returns by what all that was summed before is to be
 * multiplied, as the largest score may be a new one. */
INLINE float weigh_chunk(query_head *of, int64_t here) {
    float *scores = of->scores, shrink = 1;
    const int64_t places = (here + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t i = here; i < places; i++) scores[i] = -INFINITY;
    const float most = largest_of(scores, places);
    if (most > of->largest) {
        shrink = of->largest == -INFINITY ? 0 : expf(of->largest - most);
        of->total *= shrink;
        of->largest = most;
    }
    for (int64_t i = 0; i < places; i += LANES) {
        vec weight = exp_vec(load_f32(scores + i) - of->largest);
        of->total += weight;
        store_f32(scores + i, weight);
    }
    return shrink;
}

/* Query heads `first_head` to `first_head + num_heads`, AT_ONCE at most, of one row over the first `seen` places of its
 * sequence, with a running maximum as in FlashAttention. They go through each block together, as the heads of a block are
 * neighbours in memory, and what comes next is asked for meanwhile. Called with `width` and `format` known to the
 * compiler. `then` is the first block of whatever is computed after this. */
INLINE void attend_heads(const char *query, int64_t q_head, char *out, int64_t out_head, int q_is_bf16, const cached *c,
                         const int32_t *table, int64_t seen, int64_t then, int64_t first_head, int64_t num_heads,
                         int64_t group, int64_t kv_heads, int64_t width, int format, float scale) {
    query_head heads[AT_ONCE];
    vec mixed[AT_ONCE * 256 / LANES];
    ivec of_bytes[AT_ONCE * 256 / LANES][2];
    const int64_t parts = width / LANES, size = width * BLOCK;
    for (int64_t h = 0; h < num_heads; h++) begin_head(heads + h, query + h * q_head, q_is_bf16, width, format, scale);
    for (int64_t i = 0; i < num_heads * parts; i++) mixed[i] = all(0);
    for (int64_t first = 0; first < seen; first += CHUNK * BLOCK) {
        const int64_t here = seen - first < CHUNK * BLOCK ? seen - first : CHUNK * BLOCK, blocks = (here + BLOCK - 1) / BLOCK;
        const int32_t *mine = table + first / BLOCK;
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t h = 0; h < num_heads; h++) {
                const int64_t kv_head = (first_head + h) / group;
                if (b + 1 < blocks) fetch(c->keys, (mine[b + 1] * kv_heads + kv_head) * size, size, format);
                else fetch(c->values, (mine[0] * kv_heads + kv_head) * size, size, format);
                score_block(heads + h, c, mine[b] * kv_heads + kv_head, b * BLOCK, width, format);
            }
        for (int64_t h = 0; h < num_heads; h++) {
            const float shrink = weigh_chunk(heads + h, here);
            for (int64_t i = 0; i < parts; i++) mixed[h * parts + i] *= shrink;
            if (format != BYTES) continue;
            float *weights = heads[h].scores;
            for (int64_t i = 0; i < blocks * BLOCK; i += LANES) {
                int64_t head = mine[i / BLOCK] * kv_heads + (first_head + h) / group;
                store_f32(weights + i, load_f32(weights + i) * load_f32(c->value_steps + head * BLOCK + i % BLOCK));
            }
            for (int64_t i = here; i < blocks * BLOCK; i++) weights[i] = 0; /* whoever had this block may have left NaN */
            round_weights(&heads[h].rounded, weights, blocks * BLOCK);
            for (int64_t i = 0; i < parts; i++) of_bytes[h * parts + i][0] = of_bytes[h * parts + i][1] = (ivec){0};
        }
        const int64_t after = first + CHUNK * BLOCK < seen ? mine[CHUNK] : then;
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t h = 0; h < num_heads; h++) {
                const int64_t kv_head = (first_head + h) / group, at = (mine[b] * kv_heads + kv_head) * size;
                if (b + 1 < blocks) fetch(c->values, (mine[b + 1] * kv_heads + kv_head) * size, size, format);
                else fetch(c->keys, (after * kv_heads + kv_head) * size, size, format);
                if (format == BYTES) {
                    const int8_t *values = (const int8_t *)c->values + at;
                    add_weighted_bytes(of_bytes + h * parts, &heads[h].rounded, b * BLOCK, values, width);
                    continue;
                }
                const int64_t last = here - b * BLOCK < BLOCK ? here - b * BLOCK : BLOCK;
                for (int64_t place = 0; place < last; place++)
                    for (int64_t i = 0; i < parts; i++)
                        mixed[h * parts + i] += heads[h].scores[b * BLOCK + place] *
                                                load(c->values, at + place * width + i * LANES, format == BF16);
            }
        if (format == BYTES)
            for (int64_t i = 0; i < num_heads * parts; i++) {
                const ivec sums = of_bytes[i][0] * 256 + of_bytes[i][1];
                mixed[i] += heads[i / parts].rounded.step * __builtin_convertvector(sums, vec);
            }
    }
    for (int64_t h = 0; h < num_heads; h++) {
        const float sum = sum_of(heads[h].total);
        for (int64_t i = 0; i < parts; i++) store(out + h * out_head, i * LANES, mixed[h * parts + i] / sum, q_is_bf16);
    }
}

static void attend_any(const char *query, int64_t q_head, char *out, int64_t out_head, int q_is_bf16, const cached *c,
                       const int32_t *table, int64_t seen, int64_t then, int64_t first_head, int64_t num_heads,
                       int64_t group, int64_t kv_heads, int64_t width, int format, float scale) {
#define WITH(WIDTH, FORMAT) \
    attend_heads(query, q_head, out, out_head, q_is_bf16, c, table, seen, then, first_head, num_heads, group, kv_heads, \
                 WIDTH, FORMAT, scale)
#define OF(WIDTH, FORMAT) \
    if (width == WIDTH && format == FORMAT) return WITH(WIDTH, FORMAT);
#define OF_WIDTH(WIDTH) OF(WIDTH, FP32) OF(WIDTH, BF16) OF(WIDTH, BYTES)
    OF_WIDTH(48) OF_WIDTH(64) OF_WIDTH(128) /* the embedded base, GPT-2, Llama and many more */
    WITH(width, format);
}

/* For row r of `rows`: queries q + rows[r] * q_row + head * q_head, over the first seen[r] places of the sequence whose
 * blocks are tables[table_of_row[r]]; results likewise in out. head_width is a multiple of 16, 256 at most. */
void attend(const void *q, void *out, int q_is_bf16, int64_t q_row, int64_t q_head, int64_t out_row, int64_t out_head,
            const void *keys, const void *values, const float *key_steps, const float *value_steps, int format,
            const int64_t *rows, const int64_t *seen, const int64_t *table_of_row, const int32_t *tables,
            int64_t table_width, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t width, float scale) {
    const int64_t size = q_is_bf16 ? 2 : 4;
    const cached cache = {keys, values, key_steps, value_steps};
    int64_t most = num_rows * heads / (8 * omp_get_max_threads()); /* heads at once that leave each thread its share */
    most = most > AT_ONCE ? AT_ONCE : most < 3 ? 3 : most;
    const int64_t pieces = (heads + most - 1) / most; /* of a row */
    most = (heads + pieces - 1) / pieces;
#pragma omp parallel for schedule(dynamic) if (num_rows * heads > 8)
    for (int64_t i = 0; i < num_rows * pieces; i++) {
        const int64_t r = i / pieces, head = i % pieces * most, next = i + 1 < num_rows * pieces ? (i + 1) / pieces : r;
        const char *query = (const char *)q + (rows[r] * q_row + head * q_head) * size;
        char *result = (char *)out + (rows[r] * out_row + head * out_head) * size;
        attend_any(query, q_head * size, result, out_head * size, q_is_bf16, &cache, tables + table_of_row[r] * table_width,
                   seen[r], tables[table_of_row[next] * table_width], head, heads - head < most ? heads - head : most,
                   heads / kv_heads, kv_heads, width, format, scale);
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
                const int64_t size = size_of(format), next = at + width * BLOCK, places = format == BYTES ? 4 : 1;
                for (int64_t i = 0; i < width * BLOCK * size; i += 64) __builtin_prefetch((char *)keys + next * size + i, 1);
                const char *to = (char *)values + (next + offsets[r] / places * places * width) * size;
                for (int64_t i = 0; i < places * width * size; i += 64) __builtin_prefetch(to + i, 1);
            }
            int64_t to_key = at + offsets[r], to_value = at + offsets[r] * width;
            if (format == BYTES) {
                int8_t bytes[256];
                key_steps[place] = round_to_bytes(bytes, k, key, width, from_bf16, 127, 0);
                for (int64_t i = 0; i < width; i += 4) memcpy((int8_t *)keys + at + i * BLOCK + 4 * offsets[r], bytes + i, 4);
                value_steps[place] = round_to_bytes(bytes, v, value, width, from_bf16, 127, 0);
                int8_t *of_four = (int8_t *)values + at + offsets[r] / 4 * 4 * width + offsets[r] % 4;
                for (int64_t i = 0; i < width; i++) of_four[4 * i] = bytes[i];
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
        if (group < 0 || !ranks[group]) continue;
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

/* The sums [rows, width] of two tables' lines of each row, all fp32 or all bf16. */
void embed_rows(const int64_t *ids, const void *embedding, const int64_t *places, const void *embedding_of_places, int is_bf16,
                void *x, int64_t num_rows, int64_t width) {
    const int64_t whole = width / LANES * LANES, rest = width - whole;
#pragma omp parallel for schedule(static) if (num_rows * width > 16384)
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t of_id = ids[r] * width, of_place = places[r] * width;
        for (int64_t i = 0; i < whole; i += LANES) {
            vec sum = load(embedding, of_id + i, is_bf16) + load(embedding_of_places, of_place + i, is_bf16);
            store(x, r * width + i, sum, is_bf16);
        }
        if (!rest) continue;
        vec sum = load_some(embedding, of_id + whole, rest, is_bf16);
        sum += load_some(embedding_of_places, of_place + whole, rest, is_bf16);
        store_some(x, r * width + whole, rest, sum, is_bf16);
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
