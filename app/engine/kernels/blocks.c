/* Blocks of a decoder, one after the other in one call: what calling their kernels one by one from Python costs is half of
 * a step with few rows. It computes nothing itself. Compiled at first use.
 */
#include <stdint.h>

/* Of `cpu.c` and `products.c`, which say what they do. */
typedef struct {
    void (*embed_rows)(const int64_t *, const void *, const int64_t *, const void *, int, void *, int64_t, int64_t);
    void (*prepare_rows)(int, void *, const void *, int, const void *, const void *, float, void *, uint8_t *, float *, int64_t,
                         int64_t, int32_t);
    void (*write_cache)(const void *, int64_t, int64_t, const void *, int64_t, int64_t, int, void *, void *, float *, float *,
                        int, const int64_t *, const int64_t *, int64_t, int64_t, int64_t);
    void (*attend)(const void *, void *, int, int64_t, int64_t, int64_t, int64_t, const void *, const void *, const float *,
                   const float *, int, const int64_t *, const int64_t *, const int64_t *, const int32_t *, int64_t, int64_t,
                   int64_t, int64_t, int64_t, float);
    void (*multiply_row)(const float *, int64_t, const float *, const float *, float *, int64_t);
    void (*multiply_bf16)(const void *, int64_t, int64_t, const void *, const float *, void *, int64_t, void *);
    void (*multiply_bytes)(const uint8_t *, int64_t, int64_t, const void *, const float *, const float *, const int32_t *,
                           const float *, void *, int64_t, int, void *);
    void (*multiply_nf4)(const void *, int64_t, int64_t, const void *, const float *, const float *, void *, int64_t, int,
                         void *);
    void (*add_lora)(const void *, int64_t, void *, int64_t, int, float *, const int64_t *, int64_t, const int64_t *,
                     const int64_t *, const int64_t *, const float *);
} kernels;

enum { ONE_ROW, BF16, BYTES, NF4 }; /* what a product's weights are */

/* A norm, or what else rows go through before a product. */
typedef struct {
    int64_t kind;
    const void *weight, *bias;
    double epsilon;
} passage;

/* A linear layer and what its rows go through before. */
typedef struct {
    passage before;
    int64_t kind, in, out, levels;
    const void *weights;
    const float *bias, *scales;
    const int32_t *shifts;
} product;

typedef struct {
    product qkv, out, up, down;
    void *keys, *values;
    float *key_steps, *value_steps;
} block;

/* The low-rank updates of a linear layer, of which each has some of the first num_rows rows; none, of no rows. */
typedef struct {
    int64_t num_rows;
    const int64_t *group_of_row, *a, *b, *ranks;
    const float *scales;
} update;

/* What is before all blocks and behind them. */
typedef struct {
    const void *tokens, *places; /* embeddings */
    int64_t width;
    passage norm;
} ends;

/* The rows of a step: their tokens and the places of these, room for x [rows, width] and for what it is at the end, if all
 * blocks and the norm are run, else null; the updates of each block's qkv, out, up and down, or null where there are none,
 * and room for what is computed between. */
typedef struct {
    int64_t num_rows, is_bf16, heads, kv_heads, head_width, cache_format, table_width;
    double scale;
    const int64_t *ids, *places, *blocks, *offsets, *rows, *seen, *table_of_row;
    const int32_t *tables;
    char *x, *normed, *qkv, *mixed, *hidden, *added, *prepared;
    uint8_t *integers;
    float *steps;
    void *room;
    const update *updates;
    float *of_updates;
} step;

/* y = the layer of x, to which `added` is added first, in place, if it is not null; and then its updates. */
static void multiply(const kernels *k, const product *p, const update *u, const step *s, void *x, const void *added, void *y) {
    const int is_bytes = p->kind == BYTES, is_updated = u && u->num_rows;
    const void *from = x;
    if (p->before.kind || added || is_bytes) {
        k->prepare_rows(p->before.kind, x, added, s->is_bf16, p->before.weight, p->before.bias, p->before.epsilon,
                        is_bytes && !is_updated ? 0 : s->prepared, is_bytes ? s->integers : 0, s->steps, s->num_rows, p->in,
                        p->levels);
        from = s->prepared;
    }
    if (p->kind == ONE_ROW) k->multiply_row(from, p->in, p->weights, p->bias, y, p->out);
    if (p->kind == BF16) k->multiply_bf16(from, s->num_rows, p->in, p->weights, p->bias, y, p->out, s->room);
    if (is_bytes)
        k->multiply_bytes(s->integers, s->num_rows, p->in, p->weights, p->bias, p->scales, p->shifts, s->steps, y, p->out,
                          s->is_bf16, s->room);
    if (p->kind == NF4)
        k->multiply_nf4(from, s->num_rows, p->in, p->weights, p->bias, p->scales, y, p->out, s->is_bf16, s->room);
    if (is_updated)
        k->add_lora(from, p->in, y, p->out, s->is_bf16, s->of_updates, u->group_of_row, u->num_rows, u->a, u->b, u->ranks,
                    u->scales);
}

void run_blocks(const kernels *k, const ends *e, const block *blocks, int64_t count, const step *s) {
    const int64_t size = s->is_bf16 ? 2 : 4, head = s->head_width, row = (s->heads + 2 * s->kv_heads) * head;
    const char *keys = s->qkv + s->heads * head * size, *values = keys + s->kv_heads * head * size;
    const update *u = s->updates;
    k->embed_rows(s->ids, e->tokens, s->places, e->places, s->is_bf16, s->x, s->num_rows, e->width);
    for (const block *b = blocks; b < blocks + count; b++, u = u ? u + 4 : 0) {
        multiply(k, &b->qkv, u, s, s->x, 0, s->qkv);
        k->write_cache(keys, row, head, values, row, head, s->is_bf16, b->keys, b->values, b->key_steps, b->value_steps,
                       s->cache_format, s->blocks, s->offsets, s->num_rows, s->kv_heads, head);
        k->attend(s->qkv, s->mixed, s->is_bf16, row, head, s->heads * head, head, b->keys, b->values, b->key_steps,
                  b->value_steps, s->cache_format, s->rows, s->seen, s->table_of_row, s->tables, s->table_width, s->num_rows,
                  s->heads, s->kv_heads, head, s->scale);
        multiply(k, &b->out, u ? u + 1 : 0, s, s->mixed, 0, s->added);
        multiply(k, &b->up, u ? u + 2 : 0, s, s->x, s->added, s->hidden);
        multiply(k, &b->down, u ? u + 3 : 0, s, s->hidden, 0, s->added);
        const int is_last = s->normed && b == blocks + count - 1;
        const passage then = is_last ? e->norm : (passage){0};
        k->prepare_rows(then.kind, s->x, s->added, s->is_bf16, then.weight, then.bias, then.epsilon, is_last ? s->normed : 0, 0,
                        0, s->num_rows, e->width, 0);
    }
}
