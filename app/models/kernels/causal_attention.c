/* Causal attention of whole documents and its gradient, for training on a CPU. Compiled at first use.
 *
 * A thread takes a document's head from memory once, in fp32, and goes through its queries in blocks, whose scores with all
 * keys that they may see are held at once: for a thousand tokens that is less than the cache holds, and no score is computed
 * twice or with a document's neighbour. Data are fp32 or bf16, as a flag says; all else is fp32.
 */
#include <omp.h>

#include "vectors.h"

#define ROWS 6 /* of a tile of sums, which is kept in registers */
#if LANES == 8
#define WIDE 2 /* vectors of a tile's columns; AVX2 has half as many registers */
#else
#define WIDE 4
#endif
#define COLUMNS (WIDE * LANES)
#define BLOCK (4 * ROWS) /* queries */

/* Numbers [batch, heads, time, width] of any strides but the last, which is 1. */
typedef struct {
    void *at;
    int64_t batch, head, token;
} place;

typedef struct {
    place q, k, v;
    int64_t batch, time, heads, kv_heads, width, is_bf16, num_documents;
    const int64_t *starts, *lengths; /* of documents, the longest first; tokens are counted through all rows */
    float *log_sums;                 /* [heads, batch * time]: of each query's e^score */
    float *room;                     /* of as many bytes as `bytes_of_attention` says */
    double scale;
} attention;

INLINE int64_t filled_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

/* Of one document's head in fp32. Columns are filled up to whole vectors, with zeros. `keys_across` and `values_across` lie in
 * panels of COLUMNS tokens, [panels, width, COLUMNS]. */
typedef struct {
    int64_t columns, padded; /* of `width`, and of tokens */
    float *keys, *values, *keys_across, *values_across, *grad_keys, *grad_values, *queries, *grads, *scores, *grad_scores, *results;
} document;

static int64_t padded_tokens(int64_t length) { return filled_up(filled_up(length, BLOCK), COLUMNS); }

static int64_t lay_out(document *d, int64_t length, int64_t width, float *room) {
    d->columns = filled_up(width, LANES), d->padded = padded_tokens(length);
    float **of_tokens[] = {&d->keys, &d->values, &d->keys_across, &d->values_across, &d->grad_keys, &d->grad_values};
    float **of_blocks[] = {&d->queries, &d->grads, &d->results}, **of_scores[] = {&d->scores, &d->grad_scores};
    float *next = room;
    for (int i = 0; i < 6; i++, next += d->padded * d->columns) *of_tokens[i] = next;
    for (int i = 0; i < 3; i++, next += BLOCK * d->columns) *of_blocks[i] = next;
    for (int i = 0; i < 2; i++, next += BLOCK * d->padded) *of_scores[i] = next;
    return next - room;
}

int64_t bytes_of_attention(int64_t longest, int64_t width) {
    document d;
    return omp_get_max_threads() * lay_out(&d, longest, width, 0) * sizeof(float);
}

/* Where a token's numbers begin. */
INLINE int64_t index_of(const attention *a, const place *p, int64_t head, int64_t token) {
    return token / a->time * p->batch + head * p->head + token % a->time * p->token;
}

/* c [ROWS, wide * LANES] = a [ROWS, depth] b [depth, wide * LANES], to c's numbers if `adds`. Called with `wide` and `adds`
 * known to the compiler. */
INLINE void tile(const int wide, const int adds, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step,
                 int64_t depth, float *c, int64_t c_row) {
    vec sums[ROWS][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) sums[r][w] = adds ? load_f32(c + r * c_row + w * LANES) : all(0);
    for (int64_t k = 0; k < depth; k++, a += a_step, b += b_step) {
        vec line[WIDE];
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) line[w] = load_f32(b + w * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const vec x = all(a[r * a_row]);
#pragma GCC unroll 4
            for (int w = 0; w < wide; w++) sums[r][w] += x * line[w];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) store_f32(c + r * c_row + w * LANES, sums[r][w]);
}

/* As a tile, of any whole number of tiles of rows and of vectors of columns; from COLUMNS of b to the next it is `b_panel`. */
INLINE void multiply(const int adds, int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                     const float *b, int64_t b_step, int64_t b_panel, float *c, int64_t c_row) {
    for (int64_t column = 0; column < columns; column += COLUMNS, b += b_panel)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const float *from = a + row * a_row;
            float *to = c + row * c_row + column;
            switch (columns - column < COLUMNS ? (columns - column) / LANES : WIDE) {
                case 1: tile(1, adds, from, a_row, a_step, b, b_step, depth, to, c_row); break;
                case 2: tile(2, adds, from, a_row, a_step, b, b_step, depth, to, c_row); break;
#if WIDE == 4
                case 3: tile(3, adds, from, a_row, a_step, b, b_step, depth, to, c_row); break;
                case 4: tile(4, adds, from, a_row, a_step, b, b_step, depth, to, c_row); break;
#endif
            }
        }
}

/* `count` tokens of a head times `factor`, in fp32, to `to` [rows, columns], which zeros fill up. */
INLINE void take(const attention *a, const place *from, int64_t head, int64_t first, int64_t count, int64_t rows, float factor,
                 int64_t columns, float *to) {
    int64_t at = index_of(a, from, head, first);
    for (int64_t r = 0; r < rows; r++, to += columns, at += from->token) {
        const int64_t whole = r < count ? a->width / LANES * LANES : 0;
        for (int64_t i = 0; i < whole; i += LANES) store_f32(to + i, load(from->at, at + i, a->is_bf16) * factor);
        for (int64_t i = whole; i < columns; i++)
            to[i] = r < count && i < a->width ? one(from->at, at + i, a->is_bf16) * factor : 0;
    }
}

INLINE void give(const attention *a, const place *to, int64_t head, int64_t first, int64_t count, float factor, int64_t columns,
                 const float *from) {
    int64_t at = index_of(a, to, head, first);
    for (int64_t r = 0; r < count; r++, from += columns, at += to->token) {
        const int64_t whole = a->width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) store(to->at, at + i, load_f32(from + i) * factor, a->is_bf16);
        for (int64_t i = whole; i < a->width; i++) put(to->at, at + i, from[i] * factor, a->is_bf16);
    }
}

/* `rows` [padded, columns] in panels of COLUMNS rows, [panels, columns, COLUMNS]. */
static void turn(const document *d, const float *rows, float *across) {
    for (int64_t panel = 0; panel < d->padded; panel += COLUMNS, across += d->columns * COLUMNS)
        for (int64_t i = 0; i < d->columns; i++)
            for (int64_t j = 0; j < COLUMNS; j++) across[i * COLUMNS + j] = rows[(panel + j) * d->columns + i];
}

/* Keys and values, in the room of the thread that calls. */
INLINE document read_document(const attention *a, int64_t kv, int64_t start, int64_t length) {
    document d;
    const int64_t of_thread = lay_out(&d, a->lengths[0], a->width, 0);
    lay_out(&d, length, a->width, a->room + omp_get_thread_num() * of_thread);
    take(a, &a->k, kv, start, length, d.padded, 1, d.columns, d.keys);
    take(a, &a->v, kv, start, length, d.padded, 1, d.columns, d.values);
    turn(&d, d.keys, d.keys_across);
    return d;
}

/* To 0 what a query may not see: of a row of scores from `seen` on, up to `end`. */
INLINE void hide(float *row, int64_t seen, int64_t end) {
    for (int64_t j = seen; j < end; j++) row[j] = 0;
}

/* A row of scores to its e^(score - largest) of the first `seen`, and 0 up to `end`; returns their sum, and the largest. */
INLINE float exponentials(float *row, int64_t seen, int64_t end, float *largest) {
    const int64_t whole = seen / LANES * LANES;
    float most = -INFINITY, total = 0;
    vec mosts = all(-INFINITY), totals = all(0);
    for (int64_t j = 0; j < whole; j += LANES) {
        const vec x = load_f32(row + j);
        mosts = either(x > mosts, x, mosts);
    }
    for (int i = 0; i < LANES; i++) most = mosts[i] > most ? mosts[i] : most;
    for (int64_t j = whole; j < seen; j++) most = row[j] > most ? row[j] : most;
    for (int64_t j = 0; j < whole; j += LANES) {
        const vec e = exp_vec(load_f32(row + j) - most);
        store_f32(row + j, e);
        totals += e;
    }
    if (seen > whole) {
        const vec e = exp_vec(load_f32(row + whole) - most);
        for (int i = 0; i < seen - whole; i++) total += e[i];
        store_f32(row + whole, e);
    }
    hide(row, seen, end);
    *largest = most;
    return total + sum_of(totals);
}

/* out [batch, heads, time, width], and `log_sums`. */
void attend_forward(const attention *a, place out) {
    const int64_t group = a->heads / a->kv_heads;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < a->num_documents * a->kv_heads; task++) {
        const int64_t start = a->starts[task / a->kv_heads], length = a->lengths[task / a->kv_heads], kv = task % a->kv_heads;
        document d = read_document(a, kv, start, length);
        for (int64_t head = kv * group; head < (kv + 1) * group; head++)
            for (int64_t first = 0; first < length; first += BLOCK) {
                const int64_t count = length - first < BLOCK ? length - first : BLOCK;
                const int64_t rows = filled_up(count, ROWS), seen = filled_up(first + count, LANES);
                float factors[BLOCK];
                take(a, &a->q, head, start + first, count, rows, a->scale, d.columns, d.queries);
                multiply(0, rows, seen, d.columns, d.queries, d.columns, 1, d.keys_across, COLUMNS, d.columns * COLUMNS, d.scores,
                         d.padded);
                for (int64_t r = 0; r < count; r++) {
                    float largest, sum = exponentials(d.scores + r * d.padded, first + r + 1, seen, &largest);
                    a->log_sums[head * a->batch * a->time + start + first + r] = largest + logf(sum);
                    factors[r] = 1 / sum;
                }
                multiply(0, rows, d.columns, first + count, d.scores, d.padded, 1, d.values, d.columns, COLUMNS, d.results,
                         d.columns);
                for (int64_t r = 0; r < count; r++)
                    give(a, &out, head, start + first + r, 1, factors[r], d.columns, d.results + r * d.columns);
            }
    }
}

/* The gradients of q, k and v of that of `attend_forward`'s `out`, with its `log_sums`. */
void attend_backward(const attention *a, place grad_out, place grad_q, place grad_k, place grad_v) {
    const int64_t group = a->heads / a->kv_heads;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < a->num_documents * a->kv_heads; task++) {
        const int64_t start = a->starts[task / a->kv_heads], length = a->lengths[task / a->kv_heads], kv = task % a->kv_heads;
        document d = read_document(a, kv, start, length);
        turn(&d, d.values, d.values_across);
        memset(d.grad_keys, 0, 4 * d.padded * d.columns);
        memset(d.grad_values, 0, 4 * d.padded * d.columns);
        for (int64_t head = kv * group; head < (kv + 1) * group; head++)
            for (int64_t first = 0; first < length; first += BLOCK) {
                const int64_t count = length - first < BLOCK ? length - first : BLOCK;
                const int64_t rows = filled_up(count, ROWS), seen = filled_up(first + count, LANES);
                take(a, &a->q, head, start + first, count, rows, a->scale, d.columns, d.queries);
                take(a, &grad_out, head, start + first, count, rows, 1, d.columns, d.grads);
                multiply(0, rows, seen, d.columns, d.queries, d.columns, 1, d.keys_across, COLUMNS, d.columns * COLUMNS, d.scores,
                         d.padded);
                multiply(0, rows, seen, d.columns, d.grads, d.columns, 1, d.values_across, COLUMNS, d.columns * COLUMNS,
                         d.grad_scores, d.padded);
                for (int64_t r = 0; r < rows; r++) {
                    float *p = d.scores + r * d.padded, *of_p = d.grad_scores + r * d.padded;
                    const int64_t visible = r < count ? first + r + 1 : 0, end = filled_up(visible, LANES);
                    const float log_sum = r < count ? a->log_sums[head * a->batch * a->time + start + first + r] : 0;
                    for (int64_t j = 0; j < end; j += LANES) store_f32(p + j, exp_vec(load_f32(p + j) - log_sum));
                    hide(p, visible, seen);
                    vec means = all(0);
                    for (int64_t j = 0; j < end; j += LANES) means += load_f32(p + j) * load_f32(of_p + j);
                    const float mean = sum_of(means);
                    for (int64_t j = 0; j < seen; j += LANES)
                        store_f32(of_p + j, load_f32(p + j) * (load_f32(of_p + j) - mean));
                }
                /* of the queries; and of keys and values, which gather from block to block */
                multiply(0, rows, d.columns, first + count, d.grad_scores, d.padded, 1, d.keys, d.columns, COLUMNS, d.results,
                         d.columns);
                give(a, &grad_q, head, start + first, count, a->scale, d.columns, d.results);
                const int64_t keys = filled_up(first + count, ROWS);
                multiply(1, keys, d.columns, rows, d.grad_scores, 1, d.padded, d.queries, d.columns, COLUMNS, d.grad_keys,
                         d.columns);
                multiply(1, keys, d.columns, rows, d.scores, 1, d.padded, d.grads, d.columns, COLUMNS, d.grad_values, d.columns);
            }
        give(a, &grad_k, kv, start, length, 1, d.columns, d.grad_keys);
        give(a, &grad_v, kv, start, length, 1, d.columns, d.grad_values);
    }
}
