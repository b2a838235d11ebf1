/* Products of a few hundred rows at most with packed weights: in the tile registers of Intel's AMX, or by AVX-512's dot
 * products (BF16, VNNI). Compiled at first use.
 *
 * Such a product takes as long as its weights take from memory, or as the multiplications take, if nothing else waits for
 * either: so while the processor multiplies with one panel of weights, it asks for the next, and it multiplies the rows
 * that there are, and no others. oneDNN does neither.
 *
 * Packed weights: panels of 32 outputs; in each, for every 64 bytes of an input row two tiles of 16 outputs; in a tile 16
 * lines, each of 4 bytes (two bf16 or four int8, neighbours in the input) of 16 outputs. `app/engine/kernels/products.py`
 * packs them.
 *
 * Packed NF4: likewise, for every 32 inputs 512 bytes of codes and 64 of scales. A tile's codes are four lines of 32 words;
 * of each word's four codes the lowest is the bf16 that the first line of a tile of bf16 has in its place, the others those
 * of the next three. Then fp16 scales of the 32 outputs, by which the sum of 32 products is multiplied. Such products take
 * AVX-512's way, with tiles or without: a tile would sum over all inputs before anything could be scaled.
 */
#include <omp.h>

#include "vectors.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512F__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_PAIRS 1 /* products of two bf16 */
#else
#define HAS_PAIRS 0
#endif
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define HAS_BYTES 1 /* products of four bytes, summed in 32 bits without saturation */
#else
#define HAS_BYTES 0
#endif

#define TILE 1024      /* bytes: 16 rows of 64 */
#define PANEL 32       /* outputs */
#define DOT_ROWS 9     /* whose sums of a panel are kept in registers; with more, GCC keeps some in memory */
#define MANY_PANELS 48 /* above which rows are copied, to lie end to end for all of them */
#define FEW_ROWS 1     /* for so few, tiles are not worth it */
#define NF4_CODES 512  /* bytes of a panel's codes for 32 inputs */
#define NF4_STEP 576   /* bytes of codes and scales */
#define AHEAD 8192     /* bytes that are asked for ahead of what is read once */
#define NF4_FEW_ROWS 12 /* for so few, codes are looked up again for each block of rows */
#define NF4_VALUES \
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, \
        -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, \
        0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

static int can_use_tiles = 0;

/* What can be multiplied here: 1 for bf16, 2 for bytes, 3 for both. Called once, before all else. */
int prepare_products(int use_tiles) {
#if HAS_TILES
    can_use_tiles = use_tiles && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
#endif
    return HAS_PAIRS + 2 * HAS_BYTES;
}

int uses_tiles(void) { return can_use_tiles; }

INLINE int64_t filled_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes that `room` below needs for x; with NF4's weights also for x in bf16 and for a panel of each thread. */
int64_t bytes_of_room(int64_t num_rows, int64_t row_bytes, int is_nf4) {
    const int64_t of_rows = (can_use_tiles ? (num_rows + 31) / 32 * 32 : num_rows) * filled_up(row_bytes);
    return is_nf4 ? 2 * of_rows + omp_get_max_threads() * PANEL * filled_up(row_bytes) : of_rows;
}

/* What is multiplied, and where its results go. Of bytes: y = scales * steps * (W x - shifts) + bias, where `shifts` is what
 * stands for 0 in x, times the sums of the weights' rows; of NF4: y = scales * W x + bias. bias, which may be null, scales and
 * shifts are filled up to whole panels; steps are one a row. */
typedef struct {
    const char *x, *packed;
    int64_t num_rows, row_bytes, depth, panels, out;
    int is_bytes, is_bf16;
    const float *bias, *scales, *steps;
    const int32_t *shifts;
    void *y;
    char *room; /* for x in tiles */
} product;

/* Rows from `first` on, `count` of them, to where a block of `filled` rows begins in `room`, [depth, filled, 64 bytes];
 * zeros behind what there is. */
INLINE void copy_block(const product *p, int64_t first, int64_t count, int64_t filled) {
    for (int64_t r = 0; r < filled; r++) {
        char *to = p->room + (first * p->depth + r) * 64;
        const char *from = p->x + (first + r) * p->row_bytes;
        for (int64_t k = 0; k < p->depth; k++, to += 64 * filled) {
            if (r < count && p->row_bytes - 64 * k >= 64) {
                memcpy(to, from + 64 * k, 64);
                continue;
            }
            memset(to, 0, 64);
            if (r < count) memcpy(to, from + 64 * k, p->row_bytes - 64 * k);
        }
    }
}

/* The sums [count, 32] of rows from `first` on and a panel to where they belong. */
INLINE void store_sums(const product *p, const int32_t *sums, int64_t first, int64_t count, int64_t panel) {
    const int64_t column = panel * PANEL, columns = p->out - column < PANEL ? p->out - column : PANEL;
    for (int64_t r = first; r < first + count; r++, sums += PANEL) {
        float results[PANEL];
        for (int64_t i = 0; i < PANEL; i += LANES) {
            vec value;
            if (p->is_bytes) {
                ivec dots, shift;
                memcpy(&dots, sums + i, sizeof dots);
                memcpy(&shift, p->shifts + column + i, sizeof shift);
                value = __builtin_convertvector(dots - shift, vec) * (load_f32(p->scales + column + i) * p->steps[r]);
            } else {
                value = load_f32((const float *)sums + i);
                if (p->scales) value *= load_f32(p->scales + column + i);
            }
            if (p->bias) value += load_f32(p->bias + column + i);
            if (columns == PANEL) store(p->y, r * p->out + column + i, value, p->is_bf16);
            else store_f32(results + i, value);
        }
        if (columns < PANEL)
            for (int64_t i = 0; i < columns; i++) put(p->y, r * p->out + column + i, results[i], p->is_bf16);
    }
}

#if HAS_TILES
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
} tile_config;

/* Eight tiles of 16 rows of 64 bytes; returns what was there before: oneDNN counts on finding its own again. */
INLINE tile_config configure_tiles(void) {
    tile_config before, ours = {.palette = 1};
    for (int i = 0; i < 8; i++) ours.bytes_a_row[i] = 64, ours.rows[i] = 16;
    _tile_storeconfig(&before);
    _tile_loadconfig(&ours);
    return before;
}

INLINE void restore_tiles(const tile_config *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* 32 rows of a panel's sums [32, 32]: of two tiles of rows `upper` and `lower` and a panel, each `depth` tiles deep;
 * `lower` may be null. At every depth `lines` cache lines more from *ahead on, up to `end`, are asked for. */
INLINE void multiply_tiles(const char *upper, const char *lower, const char *panel, int64_t depth, int is_bytes,
                           int32_t *sums, const char **ahead, const char *end, int64_t lines) {
    _tile_zero(0);
    _tile_zero(1);
    if (lower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k++) {
        for (int64_t i = 0; i < lines && *ahead < end; i++, *ahead += 64) __builtin_prefetch(*ahead, 0, 2);
        _tile_loadd(6, panel + 2 * k * TILE, 64);
        _tile_loadd(4, upper + k * TILE, 64);
        _tile_loadd(7, panel + (2 * k + 1) * TILE, 64);
        if (is_bytes) {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!lower) continue;
        _tile_loadd(5, lower + k * TILE, 64);
        if (is_bytes) {
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        } else {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + 16, 4 * PANEL);
    if (!lower) return;
    _tile_stored(2, sums + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, sums + 16 * PANEL + 16, 4 * PANEL);
}

INLINE void multiply_by_tiles(const product *p) {
    const int64_t pairs = (p->num_rows + 31) / 32, panel_bytes = 2 * p->depth * TILE;
    const int64_t lines = (2 * TILE / 64 + pairs - 1) / pairs;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < 2 * pairs; block++) copy_block(p, 16 * block, p->num_rows - 16 * block, 16);
        tile_config before = configure_tiles();
        int32_t sums[32 * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < p->panels; i++) {
            const char *panel = p->packed + i * panel_bytes, *ahead = panel + panel_bytes;
            const char *end = i + 1 < p->panels ? ahead + panel_bytes : ahead;
            for (int64_t pair = 0; pair < pairs; pair++) {
                const int64_t first = 32 * pair, count = p->num_rows - first < 32 ? p->num_rows - first : 32;
                const char *upper = p->room + 2 * pair * p->depth * TILE;
                const char *lower = count > 16 ? upper + p->depth * TILE : 0;
                multiply_tiles(upper, lower, panel, p->depth, p->is_bytes, sums, &ahead, end, lines);
                store_sums(p, sums, first, count, i);
            }
        }
        restore_tiles(&before);
    }
}
#endif

#if HAS_PAIRS || HAS_BYTES
/* sums + the products of four bytes of a row, the same in all lanes, with those of 16 outputs. */
INLINE __m512i add_dots(__m512i sums, __m512i row, __m512i outputs, int is_bytes) {
#if HAS_BYTES
    if (is_bytes) return _mm512_dpbusd_epi32(sums, row, outputs);
#endif
#if HAS_PAIRS
    return (__m512i)_mm512_dpbf16_ps((__m512)sums, (__m512bh)row, (__m512bh)outputs);
#endif
    return sums;
}

/* The sums [count, 32] of a block of `count` rows and a panel; from row to row it is `stride` bytes, from 64 bytes of a row
 * to the next `step`. One line of every `1 << spread` asks for `lines` more from *ahead on, up to `end`. Called with `count`
 * known to the compiler, which then keeps the sums in registers. */
INLINE void dots_of_block(const int count, const char *rows, int64_t stride, int64_t step, const char *panel, int64_t depth,
                          int is_bytes, int32_t *to, const char **ahead, const char *end, int lines, int spread) {
    __m512i sums[DOT_ROWS][2];
#pragma GCC unroll 9
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    const char *asked = *ahead;
    for (int64_t k = 0; k < depth; k++, panel += 2 * TILE, rows += step)
        for (int64_t line = 0; line < 16; line++) {
            const char *thirds[3] = {rows + 4 * line, rows + 4 * line + 3 * stride, rows + 4 * line + 6 * stride};
            if (asked < end && line % (1 << spread) == 0) {
                __builtin_prefetch(asked, 0, 2);
                if (lines > 1) __builtin_prefetch(asked + 64, 0, 2);
                asked += 64 * lines;
            }
            const __m512i left = _mm512_loadu_si512(panel + 64 * line), right = _mm512_loadu_si512(panel + TILE + 64 * line);
#pragma GCC unroll 9
            for (int r = 0; r < count; r++) {
                int32_t four;
                memcpy(&four, thirds[r / 3] + r % 3 * stride, 4);
                const __m512i row = _mm512_set1_epi32(four);
                sums[r][0] = add_dots(sums[r][0], row, left, is_bytes);
                sums[r][1] = add_dots(sums[r][1], row, right, is_bytes);
            }
        }
    *ahead = asked;
#pragma GCC unroll 9
    for (int r = 0; r < count; r++) {
        _mm512_storeu_si512(to + r * PANEL, sums[r][0]);
        _mm512_storeu_si512(to + r * PANEL + 16, sums[r][1]);
    }
}

/* Rows are taken in blocks, as large as each other or one row larger: `count` rows from `first` on; from row to row it is
 * `stride` bytes, from 64 bytes of a row to the next `step`. */
typedef struct {
    int64_t first, count, stride, step;
    const char *rows;
} row_block;

INLINE row_block block_of(const product *p, int64_t block, int64_t blocks, int is_copied) {
    const int64_t first = p->num_rows * block / blocks, count = p->num_rows * (block + 1) / blocks - first;
    if (!is_copied) return (row_block){first, count, p->row_bytes, 64, p->x + first * p->row_bytes};
    return (row_block){first, count, 64, 64 * count, p->room + first * p->depth * 64};
}

/* All blocks to `room`, by all threads of the region that it is called in. */
INLINE void copy_blocks(const product *p, int64_t blocks) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; i++) {
        const row_block b = block_of(p, i, blocks, 1);
        copy_block(p, b.first, b.count, b.count);
    }
}

INLINE void multiply_by_dots(const product *p, const int is_bytes) {
    const int64_t blocks = (p->num_rows + DOT_ROWS - 1) / DOT_ROWS, panel_bytes = 2 * p->depth * TILE;
    /* Rows end to end are read faster, but have to be met by many panels to be worth the copy. In place, rows of whole pages
     * would push each other out of the cache. */
    const int is_copied = p->panels > MANY_PANELS || p->row_bytes % 64 || p->row_bytes % 4096 == 0;
    const int lines = blocks == 1 ? 2 : 1, spread = blocks < 4 ? 0 : blocks < 8 ? 1 : 2;
    const int64_t distance = blocks == 1 && panel_bytes > AHEAD ? AHEAD : panel_bytes;
#pragma omp parallel if (p->num_rows * p->row_bytes * p->out > 131072)
    {
        if (is_copied) copy_blocks(p, blocks);
        int32_t sums[DOT_ROWS * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < p->panels; i++) {
            const char *panel = p->packed + i * panel_bytes, *ahead = panel + distance;
            const char *end = panel + (i + 1 < p->panels ? 2 : 1) * panel_bytes;
            for (int64_t block = 0; block < blocks; block++) {
                const row_block b = block_of(p, block, blocks, is_copied);
#define OF(COUNT) \
    case COUNT: \
        dots_of_block(COUNT, b.rows, b.stride, b.step, panel, p->depth, is_bytes, sums, &ahead, end, lines, spread); \
        break;
                switch (b.count) { OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) }
#undef OF
                store_sums(p, sums, b.first, b.count, i);
            }
        }
    }
}
#endif

#if HAS_PAIRS
/* Each of the 16 values twice, in bf16: the fifth bit of an index may be anything. */
INLINE __m512i nf4_values(void) {
    static const float values[16] = {NF4_VALUES};
    uint16_t table[32];
    for (int i = 0; i < 32; i += LANES) store_bf16(table + i, load_f32(values));
    return _mm512_loadu_si512(table);
}

/* Four lines' codes to the bf16 that those of the `line`-th stand for. */
INLINE __m512i nf4_line(__m512i codes, int line, __m512i values) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * line), values);
}

/* A panel's values as a panel of bf16, without its scales. */
INLINE void expand_nf4(const char *panel, int64_t depth, __m512i values, char *to) {
    for (int64_t k = 0; k < depth; k++, panel += NF4_STEP)
        for (int64_t four = 0; four < 8; four++) {
            const __m512i codes = _mm512_loadu_si512(panel + 64 * four);
#pragma GCC unroll 4
            for (int line = 0; line < 4; line++, to += 64) _mm512_storeu_si512(to, nf4_line(codes, line, values));
        }
}

/* As `dots_of_block`, of a panel of NF4, which is also there as `expanded`, if that is not null: 32 inputs are summed by
 * themselves, then scaled. */
INLINE void nf4_dots_of_block(const int count, const char *rows, int64_t stride, int64_t step, const char *panel,
                              const char *expanded, int64_t depth, __m512i values, float *to) {
    memset(to, 0, 4 * PANEL * count);
    for (int64_t k = 0; k < depth; k++, panel += NF4_STEP, rows += step) {
        __m512i sums[DOT_ROWS][2];
#pragma GCC unroll 9
        for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 9
        for (int64_t line = 0; line < (expanded ? 0 : NF4_STEP); line += 64) __builtin_prefetch(panel + AHEAD + line, 0, 2);
#pragma GCC unroll 16
        for (int64_t line = 0; line < 16; line++) {
            const char *thirds[3] = {rows + 4 * line, rows + 4 * line + 3 * stride, rows + 4 * line + 6 * stride};
            __m512i left, right;
            if (expanded) {
                left = _mm512_loadu_si512(expanded + 2 * k * TILE + 64 * line);
                right = _mm512_loadu_si512(expanded + (2 * k + 1) * TILE + 64 * line);
            } else {
                const char *codes = panel + 64 * (line / 4);
                left = nf4_line(_mm512_loadu_si512(codes), line % 4, values);
                right = nf4_line(_mm512_loadu_si512(codes + NF4_CODES / 2), line % 4, values);
            }
#pragma GCC unroll 9
            for (int r = 0; r < count; r++) {
                int32_t two;
                memcpy(&two, thirds[r / 3] + r % 3 * stride, 4);
                const __m512i row = _mm512_set1_epi32(two);
                sums[r][0] = add_dots(sums[r][0], row, left, 0);
                sums[r][1] = add_dots(sums[r][1], row, right, 0);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(panel + NF4_CODES + 32 * half)));
#pragma GCC unroll 9
            for (int r = 0; r < count; r++) {
                float *sum = to + r * PANEL + 16 * half;
                _mm512_storeu_ps(sum, _mm512_fmadd_ps((__m512)sums[r][half], scales, _mm512_loadu_ps(sum)));
            }
        }
    }
}

INLINE void multiply_by_nf4(const product *p, char *panels) {
    const int64_t blocks = (p->num_rows + DOT_ROWS - 1) / DOT_ROWS;
    const int is_copied = p->num_rows > 1 && (p->panels > MANY_PANELS || p->row_bytes % 4096 == 0);
#pragma omp parallel if (p->num_rows * p->row_bytes * p->out > 131072)
    {
        if (is_copied) copy_blocks(p, blocks);
        float sums[DOT_ROWS * PANEL] __attribute__((aligned(64)));
        const __m512i values = nf4_values();
        char *room = p->num_rows > NF4_FEW_ROWS ? panels + omp_get_thread_num() * 2 * p->depth * TILE : 0;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < p->panels; i++) {
            const char *panel = p->packed + i * p->depth * NF4_STEP;
            if (room) expand_nf4(panel, p->depth, values, room);
            for (int64_t block = 0; block < blocks; block++) {
                const row_block b = block_of(p, block, blocks, is_copied);
#define OF(COUNT) \
    case COUNT: \
        if (room) nf4_dots_of_block(COUNT, b.rows, b.stride, b.step, panel, room, p->depth, values, sums); \
        else nf4_dots_of_block(COUNT, b.rows, b.stride, b.step, panel, 0, p->depth, values, sums); \
        break;
                switch (b.count) { OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) }
#undef OF
                store_sums(p, (const int32_t *)sums, b.first, b.count, i);
            }
        }
    }
}
#endif

static void multiply(const product *p) {
#if HAS_TILES
    if (can_use_tiles && p->num_rows > FEW_ROWS) {
        multiply_by_tiles(p);
        return;
    }
#endif
#if HAS_BYTES
    if (p->is_bytes) multiply_by_dots(p, 1);
#endif
#if HAS_PAIRS
    if (!p->is_bytes) multiply_by_dots(p, 0);
#endif
}

/* y [rows, out] of x [rows, in] and packed weights; x and y bf16, bias fp32 or null. `room` has
 * `bytes_of_room`. */
void multiply_bf16(const void *x, int64_t num_rows, int64_t in, const void *packed, const float *bias, void *y, int64_t out,
                   void *room) {
    const product p = {.x = x, .packed = packed, .num_rows = num_rows, .row_bytes = 2 * in, .depth = (2 * in + 63) / 64,
                       .panels = (out + PANEL - 1) / PANEL, .out = out, .is_bf16 = 1, .bias = bias, .y = y, .room = room};
    multiply(&p);
}

/* Likewise of x uint8, y fp32 or bf16. */
void multiply_bytes(const uint8_t *x, int64_t num_rows, int64_t in, const void *packed, const float *bias,
                    const float *scales, const int32_t *shifts, const float *steps, void *y, int64_t out, int is_bf16,
                    void *room) {
    const product p = {.x = (const char *)x, .packed = packed, .num_rows = num_rows, .row_bytes = in,
                       .depth = (in + 63) / 64, .panels = (out + PANEL - 1) / PANEL, .out = out, .is_bytes = 1,
                       .is_bf16 = is_bf16, .bias = bias, .scales = scales, .steps = steps, .shifts = shifts, .y = y,
                       .room = room};
    multiply(&p);
}

/* Likewise of x [rows, in] in fp32, which is rounded to bf16, or in bf16, and NF4's packed weights; `in` is a multiple of 32,
 * y like x. */
void multiply_nf4(const void *x, int64_t num_rows, int64_t in, const void *packed, const float *bias, const float *scales,
                  void *y, int64_t out, int is_bf16, void *room) {
#if HAS_PAIRS
    product p = {.x = x, .packed = packed, .num_rows = num_rows, .row_bytes = 2 * in, .depth = in / 32,
                 .panels = (out + PANEL - 1) / PANEL, .out = out, .is_bf16 = is_bf16, .bias = bias, .scales = scales, .y = y,
                 .room = room};
    char *rounded = p.room + num_rows * p.row_bytes, *panels = rounded + num_rows * p.row_bytes;
    if (!is_bf16) {
        for (int64_t i = 0; i < num_rows * in; i += LANES)
            store_bf16((uint16_t *)rounded + i, load_f32((const float *)x + i));
        p.x = rounded;
    }
    multiply_by_nf4(&p, panels);
#endif
}
