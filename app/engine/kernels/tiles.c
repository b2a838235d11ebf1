/* Products of a few hundred rows at most with packed weights, in the tile registers of Intel's AMX. Compiled at first use.
 *
 * Such a product takes as long as its weights take from memory, if nothing else waits for them: so while the processor
 * multiplies with one panel of weights, it asks for the next. oneDNN does not, and takes the sum of both times.
 *
 * Packed weights: panels of 32 outputs; in each, for every 64 bytes of an input row two tiles of 16 outputs; in a tile 16
 * lines, each of 4 bytes (two bf16 or four int8, neighbours in the input) of 16 outputs. `app/engine/kernels/tiles.py`
 * packs them.
 */
#include "vectors.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512F__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

#define TILE 1024 /* bytes */
#define PANEL 32  /* outputs */

/* Whether the processor has tiles, and the system lets this process use them. */
int can_use_tiles(void) {
#if HAS_TILES
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
#else
    return 0;
#endif
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

/* y [rows, out] of x [rows, in] and packed weights. Bytes: scales and steps as of `multiply_row_of_bytes`, whose `zero`
 * times the sums of the weights' rows is in `shifts`. bias, scales and shifts are filled up to whole panels; steps are
 * one a row. `room` is of 64 * (depth + 1) bytes for each of the rows, filled up to 32. */
INLINE void multiply(const void *x, int64_t num_rows, int64_t row_bytes, const char *packed, int is_bytes,
                     const float *bias, const float *scales, const int32_t *shifts, const float *steps, void *y,
                     int64_t out, int is_bf16, char *room) {
    const int64_t depth = (row_bytes + 63) / 64, pairs = (num_rows + 31) / 32, panels = (out + PANEL - 1) / PANEL;
    const int64_t lines = (2 * TILE / 64 + pairs - 1) / pairs, panel_bytes = 2 * depth * TILE;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < 32 * pairs; r++) { /* x in tiles, rows of zeros behind */
            char *to = room + r / 16 * depth * TILE + r % 16 * 64;
            const char *from = (const char *)x + r * row_bytes;
            for (int64_t k = 0; k < depth; k++, to += TILE) {
                int64_t count = r >= num_rows ? 0 : row_bytes - 64 * k < 64 ? row_bytes - 64 * k : 64;
                if (count < 64) memset(to, 0, 64);
                memcpy(to, from + 64 * k, count);
            }
        }
        tile_config before = configure_tiles();
        int32_t sums[32 * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++) {
            const char *panel = packed + p * panel_bytes, *ahead = panel + panel_bytes;
            const char *end = p + 1 < panels ? ahead + panel_bytes : ahead;
            const int64_t column = p * PANEL, columns = out - column < PANEL ? out - column : PANEL;
            for (int64_t pair = 0; pair < pairs; pair++) {
                const char *upper = room + 2 * pair * depth * TILE;
                if (num_rows - 32 * pair > 16)
                    multiply_tiles(upper, upper + depth * TILE, panel, depth, is_bytes, sums, &ahead, end, lines);
                else multiply_tiles(upper, 0, panel, depth, is_bytes, sums, &ahead, end, lines);
                for (int64_t r = 32 * pair; r < num_rows && r < 32 * pair + 32; r++) {
                    const int32_t *of_row = sums + (r - 32 * pair) * PANEL;
                    float results[PANEL];
                    for (int64_t i = 0; i < PANEL; i += LANES) {
                        vec value;
                        if (is_bytes) {
                            ivec dots, shift;
                            memcpy(&dots, of_row + i, sizeof dots);
                            memcpy(&shift, shifts + column + i, sizeof shift);
                            value = __builtin_convertvector(dots - shift, vec) * (load_f32(scales + column + i) * steps[r]);
                        } else
                            value = load_f32((const float *)of_row + i);
                        if (bias) value += load_f32(bias + column + i);
                        if (columns == PANEL) store(y, r * out + column + i, value, is_bf16);
                        else store_f32(results + i, value);
                    }
                    if (columns < PANEL)
                        for (int64_t i = 0; i < columns; i++) {
                            if (is_bf16) ((uint16_t *)y)[r * out + column + i] = to_bf16(results[i]);
                            else ((float *)y)[r * out + column + i] = results[i];
                        }
                }
            }
        }
        restore_tiles(&before);
    }
}
#endif

/* x and y bf16, bias fp32 or null. */
void multiply_bf16(const void *x, int64_t num_rows, int64_t in, const void *packed, const float *bias, void *y, int64_t out,
                   void *room) {
#if HAS_TILES
    multiply(x, num_rows, 2 * in, packed, 0, bias, 0, 0, 0, y, out, 1, room);
#endif
}

/* x uint8, y fp32 or bf16. */
void multiply_bytes(const uint8_t *x, int64_t num_rows, int64_t in, const void *packed, const float *bias,
                    const float *scales, const int32_t *shifts, const float *steps, void *y, int64_t out, int is_bf16,
                    void *room) {
#if HAS_TILES
    multiply(x, num_rows, in, packed, 1, bias, scales, shifts, steps, y, out, is_bf16, room);
#endif
}
