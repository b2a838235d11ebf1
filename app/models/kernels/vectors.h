/* Vectors of fp32, as wide as the processor's: loading and storing them as fp32 or bf16, e^x and GELU. For the kernels
 * that are compiled at first use for the processor at hand. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

/* GCC's and clang's own vectors, as wide as the processor's; wider ones would be taken apart in memory. */
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint8_t bvec __attribute__((vector_size(LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec load_f32(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store_f32(float *p, vec x) { memcpy(p, &x, sizeof x); }

INLINE vec load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) && defined(__AVX512BW__) /* GCC takes the conversion apart */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
    hvec halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, uvec) << 16);
#endif
}

INLINE vec load(const void *p, int64_t at, int is_bf16) {
    return is_bf16 ? load_bf16((const uint16_t *)p + at) : load_f32((const float *)p + at);
}

/* Bits whose upper halves are x in bf16: to the nearest, ties to even. */
INLINE uvec bf16_bits(vec x) {
    uvec bits = (uvec)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

INLINE void store_bf16(uint16_t *p, vec x) {
    hvec halves = __builtin_convertvector(bf16_bits(x) >> 16, hvec);
    memcpy(p, &halves, sizeof halves);
}

/* x as `store` and `load` would give it back. */
INLINE vec as_stored(vec x, int is_bf16) { return is_bf16 ? (vec)(bf16_bits(x) & 0xffff0000) : x; }

INLINE void store(void *p, int64_t at, vec x, int is_bf16) {
    if (is_bf16) store_bf16((uint16_t *)p + at, x);
    else store_f32((float *)p + at, x);
}

INLINE vec either(ivec condition, vec yes, vec no) { return (vec)(((ivec)yes & condition) | ((ivec)no & ~condition)); }

INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

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

INLINE float one(const void *p, int64_t at, int is_bf16) {
    if (!is_bf16) return ((const float *)p)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[at] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE void put(void *p, int64_t at, float x, int is_bf16) {
    if (is_bf16) ((uint16_t *)p)[at] = to_bf16(x);
    else ((float *)p)[at] = x;
}

/* GELU in its approximation by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415) is x * sigmoid(t), where
 * t = x * (FIRST + THIRD * x * x). */
#define FIRST 1.5957691216057308f
#define THIRD 0.0713548162726f

INLINE vec sigmoid_vec(vec t) {
    vec e = exp_vec(-absolute(t));
    return either(t > 0.0f, all(1), e) / (1.0f + e);
}

INLINE vec gelu_vec(vec x) { return x * sigmoid_vec(x * (all(FIRST) + THIRD * x * x)); }

/* The numbers behind the last whole vector are computed as one too: where a number stands changes nothing. */
INLINE vec load_some(const void *p, int64_t at, int64_t count, int is_bf16) {
    vec x = all(0);
    for (int64_t i = 0; i < count; i++) x[i] = one(p, at + i, is_bf16);
    return x;
}

INLINE void store_some(void *p, int64_t at, int64_t count, vec x, int is_bf16) {
    for (int64_t i = 0; i < count; i++) put(p, at + i, x[i], is_bf16);
}
