/* Pillow's resampling of 8-bit RGB images, in its own fixed point: the same bytes, and only those asked for.

An output is (half + sum of taps * coefficients) >> PRECISION, clamped to a byte; columns first, then rows. Sixteen bytes
are made at once, each of its own byte of `taps` places: of rows, neighbours in a row; of columns, four rows' pixels. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && !defined(PORTABLE)
#define AVX2
#include <immintrin.h>
#endif

#define PRECISION 22
#define HALF (1 << (PRECISION - 1))
#define ROWS 4
#define SIDE (4 * ROWS)
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif
#ifdef __clang__
#define SHUFFLE(kind, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(kind, a, b, ...) __builtin_shuffle(a, b, (kind){__VA_ARGS__})
#endif

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef int32_t pixels4 __attribute__((vector_size(16)));
/* Makes SIDE bytes of `taps` times SIDE, `next` bytes from one to the other. */
typedef void (*summing)(const uint8_t *from, int64_t next, int taps, const int32_t *k, uint8_t *out);

INLINE uint8_t byte_of(int32_t sum) {
    sum >>= PRECISION;
    sum = sum < 0 ? 0 : sum;
    return sum > 255 ? 255 : sum;
}

/* k: `taps` coefficients. */
INLINE void sums_of(const uint8_t *from, int64_t next, int taps, const int32_t *k, uint8_t *out) {
    int32_t sum[SIDE];
    for (int i = 0; i < SIDE; i++) sum[i] = HALF;
    for (int t = 0; t < taps; t++, from += next)
        for (int i = 0; i < SIDE; i++) sum[i] += from[i] * k[t];
    for (int i = 0; i < SIDE; i++) out[i] = byte_of(sum[i]);
}

#ifdef AVX2
/* A multiplication of 32 bits costs as much as two of 16, each of which takes two taps. So a coefficient, of 24 bits at
   most, is an upper part times 256 plus a lower one: for every two taps a number of their upper and one of their lower
   parts. */
static void in_parts(const int32_t *k, int places, int taps, int32_t *pairs) {
    for (int x = 0; x < places; x++, k += taps)
        for (int t = 0; t < taps; t += 2, pairs += 2) {
            int32_t a = k[t], b = t + 1 < taps ? k[t + 1] : 0;
            pairs[0] = (int32_t)(((uint32_t)(a >> 8) & 0xffff) | (uint32_t)(b >> 8) << 16);
            pairs[1] = (a & 0xff) | (b & 0xff) << 16;
        }
}

/* As sums_of; k: as in_parts makes them. */
INLINE __attribute__((target("avx2"))) void sums_of_pairs(const uint8_t *from, int64_t next, int taps, const int32_t *k,
                                                         uint8_t *out) {
    __m256i upper[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i lower[2] = {_mm256_set1_epi32(HALF), _mm256_set1_epi32(HALF)};
    for (int t = 0; t < taps; t += 2, from += 2 * next, k += 2) {
        const uint8_t *other = t + 1 < taps ? from + next : from;
        __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)other);
        __m256i both[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)),
                           _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b))};
        for (int i = 0; i < 2; i++) {
            upper[i] = _mm256_add_epi32(upper[i], _mm256_madd_epi16(both[i], _mm256_set1_epi32(k[0])));
            lower[i] = _mm256_add_epi32(lower[i], _mm256_madd_epi16(both[i], _mm256_set1_epi32(k[1])));
        }
    }
    for (int i = 0; i < 2; i++)
        lower[i] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(upper[i], 8), lower[i]), PRECISION);
    __m256i halves = _mm256_packs_epi32(lower[0], lower[1]);
    halves = _mm256_packus_epi16(halves, halves);
    __m128i made = _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128((__m128i *)out, made);
}
#endif

/* Four vectors of four pixels of four bytes, transposed. */
INLINE void transpose(bytes16 *v) {
    pixels4 in[4], a, b, c, d;
    memcpy(in, v, sizeof in);
    a = SHUFFLE(pixels4, in[0], in[1], 0, 4, 1, 5), b = SHUFFLE(pixels4, in[2], in[3], 0, 4, 1, 5);
    c = SHUFFLE(pixels4, in[0], in[1], 2, 6, 3, 7), d = SHUFFLE(pixels4, in[2], in[3], 2, 6, 3, 7);
    in[0] = SHUFFLE(pixels4, a, b, 0, 1, 4, 5), in[1] = SHUFFLE(pixels4, a, b, 2, 3, 6, 7);
    in[2] = SHUFFLE(pixels4, c, d, 0, 1, 4, 5), in[3] = SHUFFLE(pixels4, c, d, 2, 3, 6, 7);
    memcpy(v, in, sizeof in);
}

/* Columns [begin, end) of four rows, of pixels of `step` bytes, as pixels of four, the fourth without meaning, side by
   side. Nothing is read past a row's last. */
INLINE void gather(const uint8_t *const *rows, int step, int begin, int end, uint8_t *out) {
    int x = begin;
    for (; step * x + 16 <= step * end; x += ROWS) {
        bytes16 v[ROWS];
        for (int r = 0; r < ROWS; r++) {
            memcpy(&v[r], rows[r] + step * x, 16);
            if (step == 3) v[r] = SHUFFLE(bytes16, v[r], v[r], 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
        }
        transpose(v);
        memcpy(out + SIDE * x, v, sizeof v);
    }
    for (; x < end; x++)
        for (int r = 0; r < ROWS; r++) memcpy(out + SIDE * x + 4 * r, rows[r] + step * x, 3);
}

/* The other way round, to rows of pixels of three bytes. Nothing is written past a row's last. */
INLINE void scatter(const uint8_t *in, int count, uint8_t *const *rows) {
    int x = 0;
    for (; 3 * x + 16 <= 3 * count; x += ROWS) {
        bytes16 v[ROWS];
        memcpy(v, in + SIDE * x, sizeof v);
        transpose(v);
        for (int r = 0; r < ROWS; r++) {
            v[r] = SHUFFLE(bytes16, v[r], v[r], 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
            memcpy(rows[r] + 3 * x, &v[r], 16);
        }
    }
    for (; x < count; x++)
        for (int r = 0; r < ROWS; r++) memcpy(rows[r] + 3 * x, in + SIDE * x + 4 * r, 3);
}

/* One of the two directions. count: places, before; places: after; k: `each` numbers for each place. */
typedef struct {
    const uint8_t *in;
    int64_t row_bytes;
    int count, rows, places;
    const int32_t *first, *k;
    int each;
    uint8_t *out, *room;
} work;

INLINE void columns(const work *w, int step, int taps, summing sums) {
    int begin = w->first[0], end = w->first[w->places - 1] + taps;
    if (end > w->count) end = w->count;
    uint8_t *made = w->room + (size_t)SIDE * (w->count + taps);
    for (int y = 0; y < w->rows; y += ROWS) {
        const uint8_t *from[ROWS];
        uint8_t *to[ROWS];
        for (int r = 0; r < ROWS; r++) { /* at the end the last row more than once */
            int row = y + r < w->rows ? y + r : w->rows - 1;
            from[r] = w->in + row * w->row_bytes;
            to[r] = w->out + row * (3 * (int64_t)w->places);
        }
        gather(from, step, begin, end, w->room);
        for (int x = 0; x < w->places; x++)
            sums(w->room + SIDE * w->first[x], SIDE, taps, w->k + x * w->each, made + SIDE * x);
        scatter(made, w->places, to);
    }
}

/* taps: those past the last row are not read. plain: the coefficients, `taps` for each place. */
INLINE void rows(const work *w, int taps, summing sums, const int32_t *plain) {
    for (int y = 0; y < w->places; y++) {
        const uint8_t *from = w->in + w->first[y] * w->row_bytes;
        uint8_t *to = w->out + y * w->row_bytes;
        int left = w->count - w->first[y], here = left < taps ? left : taps;
        int64_t x = 0;
        for (; x + SIDE <= w->row_bytes; x += SIDE)
            if (here == taps) sums(from + x, w->row_bytes, taps, w->k + y * w->each, to + x);
            else sums(from + x, w->row_bytes, here, w->k + y * w->each, to + x);
        for (; x < w->row_bytes; x++) {
            int32_t sum = HALF;
            for (int t = 0; t < here; t++) sum += from[t * w->row_bytes + x] * plain[y * taps + t];
            to[x] = byte_of(sum);
        }
    }
}

#ifdef AVX2
/* Four taps, which nearly all images have, unrolled. */
static __attribute__((target("avx2"))) void columns_avx2(const work *w, int step, int taps) {
    if (step == 3 && taps == 4) columns(w, 3, 4, sums_of_pairs);
    else if (step == 3) columns(w, 3, taps, sums_of_pairs);
    else if (taps == 4) columns(w, 4, 4, sums_of_pairs);
    else columns(w, 4, taps, sums_of_pairs);
}

static __attribute__((target("avx2"))) void rows_avx2(const work *w, int taps, const int32_t *plain) {
    if (taps == 4) rows(w, 4, sums_of_pairs, plain);
    else rows(w, taps, sums_of_pairs, plain);
}
#endif

/* Whether the processor has instructions for `in_parts`; then w's coefficients are in parts, at `pairs`. */
static int has_parts(work *w, int taps, int32_t *pairs) {
#ifdef AVX2
    if (__builtin_cpu_supports("avx2")) {
        in_parts(w->k, w->places, taps, pairs);
        w->k = pairs;
        w->each = (taps + 1) / 2 * 2;
        return 1;
    }
#endif
    (void)w, (void)taps, (void)pairs;
    return 0;
}

/* height x places pixels of three bytes, each from `taps` pixels of its row, from first[place] on; those past `width`
   count nothing. step: bytes of a pixel of `in`, three or four; row_bytes: between its rows. Returns 0, or 1 where
   there is no memory. */
int resample_columns(const uint8_t *in, int64_t row_bytes, int step, int width, int height, int places, int taps,
                     const int32_t *first, const int32_t *coefficients, uint8_t *out) {
    size_t room = (size_t)SIDE * (width + taps + places);
    uint8_t *memory = calloc(room + sizeof(int32_t) * places * (taps + 1), 1);
    if (!memory) return 1;
    work w = {in, row_bytes, width, height, places, first, coefficients, taps, out, memory};
    if (has_parts(&w, taps, (int32_t *)(memory + room))) {
#ifdef AVX2
        columns_avx2(&w, step, taps);
#endif
    } else if (step == 3) columns(&w, 3, taps, sums_of);
    else columns(&w, 4, taps, sums_of);
    free(memory);
    return 0;
}

/* places rows of row_bytes bytes, each from `taps` rows of `in`, from first[place] on; those past `height` are not read.
   Returns as above. */
int resample_rows(const uint8_t *in, int64_t row_bytes, int height, int places, int taps, const int32_t *first,
                  const int32_t *coefficients, uint8_t *out) {
    int32_t *memory = malloc(sizeof(int32_t) * places * (taps + 1));
    if (!memory) return 1;
    work w = {in, row_bytes, height, height, places, first, coefficients, taps, out, 0};
    if (has_parts(&w, taps, memory)) {
#ifdef AVX2
        rows_avx2(&w, taps, coefficients);
#endif
    } else rows(&w, taps, sums_of, coefficients);
    free(memory);
    return 0;
}

/* The first three of every 2 * step bytes, `count` times. */
INLINE void every_other(const uint8_t *in, int step, int count, uint8_t *out) {
    for (int x = 0; x < count - 1; x++) memcpy(out + 3 * x, in + (int64_t)2 * step * x, 4);
    memcpy(out + 3 * (count - 1), in + (int64_t)2 * step * (count - 1), 3);
}

/* Both passes for height x places pixels of two by two each: BOX, whose coefficients are a half. Parameters, and what it
   returns, as above. */
WIDE int halve(const uint8_t *in, int64_t row_bytes, int step, int height, int places, uint8_t *out) {
    int64_t bytes = (2 * (int64_t)places - 1) * step;
    uint8_t *means = malloc(bytes + step);
    if (!means) return 1;
    for (int y = 0; y < height; y++, in += 2 * row_bytes, out += 3 * (int64_t)places) {
        const uint8_t *below = in + row_bytes;
        for (int64_t i = 0; i < bytes; i++) {
            uint8_t upper = (in[i] + in[i + step] + 1) >> 1, lower = (below[i] + below[i + step] + 1) >> 1;
            means[i] = (upper + lower + 1) >> 1;
        }
        every_other(means, step, places, out);
    }
    free(means);
    return 0;
}
