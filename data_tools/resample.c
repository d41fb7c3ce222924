/* Pillow's resampling of 8-bit RGB images, in its own fixed point: the same bytes, and only those asked for.

An output is (half + sum of taps * coefficients) >> PRECISION, clamped to a byte; columns first, then rows. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PRECISION 22
#define HALF (1 << (PRECISION - 1))
#define CHUNK 64
#if defined(__x86_64__) && !defined(__clang__)
#if __GNUC__ >= 11
#define CLONES "arch=x86-64-v4",
#else
#define CLONES
#endif
#define WIDE __attribute__((target_clones(CLONES "avx2", "default")))
#else
#define WIDE
#endif

typedef int32_t pixel __attribute__((vector_size(16)));

static inline uint8_t byte_of(int32_t sum) {
    sum >>= PRECISION;
    sum = sum < 0 ? 0 : sum;
    return sum > 255 ? 255 : sum;
}

#if defined(__GNUC__) && !defined(__clang__)
typedef uint8_t sixteen __attribute__((vector_size(16)));
#define FOUR_PIXELS(out, in, ...)                                                                                      \
    do {                                                                                                               \
        sixteen four;                                                                                                  \
        memcpy(&four, in, 16);                                                                                         \
        four = __builtin_shuffle(four, (sixteen){__VA_ARGS__});                                                        \
        memcpy(out, &four, 16);                                                                                        \
    } while (0)
#endif

/* `count` pixels of three bytes as such of four, the fourth without meaning, and the other way round. Nothing is read
   or written past the last, four at a time where 16 bytes are left. */
static inline __attribute__((always_inline)) void widen(const uint8_t *in, int count, uint8_t *out) {
    int x = 0;
#ifdef FOUR_PIXELS
    for (; x + 6 <= count; x += 4)
        FOUR_PIXELS(out + 4 * x, in + 3 * x, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
#endif
    for (; x < count - 1; x++) memcpy(out + 4 * x, in + 3 * x, 4);
    for (; x < count; x++) memcpy(out + 4 * x, in + 3 * x, 3);
}

static inline __attribute__((always_inline)) void narrow(const uint8_t *in, int count, uint8_t *out) {
    int x = 0;
#ifdef FOUR_PIXELS
    for (; x + 6 <= count; x += 4)
        FOUR_PIXELS(out + 3 * x, in + 4 * x, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
#endif
    for (; x < count - 1; x++) memcpy(out + 3 * x, in + 4 * x, 4);
    for (; x < count; x++) memcpy(out + 3 * x, in + 4 * x, 3);
}

/* The first three of every six bytes, `count` times. */
static inline void every_other(const uint8_t *in, int count, uint8_t *out) {
    for (int x = 0; x < count - 1; x++) memcpy(out + 3 * x, in + (int64_t)6 * x, 4);
    memcpy(out + 3 * (count - 1), in + (int64_t)6 * (count - 1), 3);
}

static inline __attribute__((always_inline)) void sum_up(const pixel *row, int columns, int taps, const int32_t *first,
                                                        const int32_t *k, pixel *sums) {
    for (int x = 0; x < columns; x++, k += taps) {
        pixel sum = {HALF, HALF, HALF, HALF};
        for (int t = 0; t < taps; t++) sum += row[first[x] + t] * k[t];
        sums[x] = sum;
    }
}

/* rows x columns pixels, each from `taps` pixels of its row, from first[column] on; those past `width` count nothing.
row_bytes: between rows of `in`. Returns 0, or 1 where there is no memory. */
WIDE int resample_columns(const uint8_t *in, int64_t row_bytes, int width, int rows, int columns, int taps,
                          const int32_t *first, const int32_t *coefficients, uint8_t *out) {
    int longest = width + taps > columns ? width + taps : columns;
    pixel *row = aligned_alloc(64, ((size_t)longest * (2 * sizeof(pixel) + 4) + 63) / 64 * 64);
    if (!row) return 1;
    pixel *sums = row + longest;
    uint8_t *bytes = (uint8_t *)(sums + longest); /* of pixels of four, the fourth without meaning */
    memset(row, 0, sizeof(pixel) * (size_t)longest);
    int begin = first[0], end = first[columns - 1] + taps;
    if (end > width) end = width;
    for (int y = 0; y < rows; y++, in += row_bytes, out += 3 * (int64_t)columns) {
        widen(in + 3 * begin, end - begin, bytes + 4 * begin);
        for (int i = 4 * begin; i < 4 * end; i++) ((int32_t *)row)[i] = bytes[i];
        switch (taps) { /* the loops of few taps, which nearly all images have, unrolled */
            case 2: sum_up(row, columns, 2, first, coefficients, sums); break;
            case 3: sum_up(row, columns, 3, first, coefficients, sums); break;
            case 4: sum_up(row, columns, 4, first, coefficients, sums); break;
            case 5: sum_up(row, columns, 5, first, coefficients, sums); break;
            case 6: sum_up(row, columns, 6, first, coefficients, sums); break;
            case 7: sum_up(row, columns, 7, first, coefficients, sums); break;
            case 8: sum_up(row, columns, 8, first, coefficients, sums); break;
            default: sum_up(row, columns, taps, first, coefficients, sums);
        }
        for (int i = 0; i < 4 * columns; i++) bytes[i] = byte_of(((int32_t *)sums)[i]);
        narrow(bytes, columns, out);
    }
    free(row);
    return 0;
}

/* rows of row_bytes bytes, each from `taps` rows of `in`, from first[row] on; those past `height` are not read. */
WIDE void resample_rows(const uint8_t *in, int64_t row_bytes, int height, int rows, int taps, const int32_t *first,
                        const int32_t *coefficients, uint8_t *out) {
    for (int y = 0; y < rows; y++, out += row_bytes) {
        const int32_t *k = coefficients + (int64_t)y * taps;
        const uint8_t *from = in + first[y] * row_bytes;
        int count = height - first[y] < taps ? height - first[y] : taps;
        int64_t x = 0;
        for (; x + CHUNK <= row_bytes; x += CHUNK) {
            int32_t sum[CHUNK];
            for (int i = 0; i < CHUNK; i++) sum[i] = HALF;
            for (int t = 0; t < count; t++) {
                const uint8_t *source = from + t * row_bytes + x;
                for (int i = 0; i < CHUNK; i++) sum[i] += source[i] * k[t];
            }
            for (int i = 0; i < CHUNK; i++) out[x + i] = byte_of(sum[i]);
        }
        for (; x < row_bytes; x++) {
            int32_t sum = HALF;
            for (int t = 0; t < count; t++) sum += from[t * row_bytes + x] * k[t];
            out[x] = byte_of(sum);
        }
    }
}

/* Both passes for rows x columns pixels of two by two each: BOX, whose coefficients are a half. Returns as above. */
WIDE int halve(const uint8_t *in, int64_t row_bytes, int rows, int columns, uint8_t *out) {
    int64_t bytes = 6 * (int64_t)columns - 3;
    uint8_t *means = malloc(bytes + 4);
    if (!means) return 1;
    for (int y = 0; y < rows; y++, in += 2 * row_bytes, out += 3 * (int64_t)columns) {
        const uint8_t *below = in + row_bytes;
        for (int64_t i = 0; i < bytes; i++) {
            uint8_t upper = (in[i] + in[i + 3] + 1) >> 1, lower = (below[i] + below[i + 3] + 1) >> 1;
            means[i] = (upper + lower + 1) >> 1;
        }
        every_other(means, columns, out);
    }
    free(means);
    return 0;
}
