/* Images in bytes, channels last, to planes of floats, and to those of their mirror images in the same pass. */
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <emmintrin.h>
#endif

/* Pixels that are turned in the first cache, at most. */
#define PART 512

/* Copies past the caches: a batch is larger than these, and what is written so need not be read before. */
static void put(float *to, const float *from, int64_t count) {
    int64_t done = 0;
#ifdef __x86_64__
    if (((uintptr_t)to & 15) == 0)
        for (; done + 4 <= count; done += 4) _mm_stream_ps(to + done, _mm_loadu_ps(from + done));
#endif
    memcpy(to + done, from + done, (count - done) * sizeof(float));
}

/* rows x columns pixels of three bytes; values: the float of each byte; plain, mirrored: three planes each, mirrored
   may be null. */
void planes(const uint8_t *in, const float *values, int64_t rows, int64_t columns, float *plain, float *mirrored) {
    float part[3][PART], back[3][PART];
    for (int64_t y = 0; y < rows; y++)
        for (int64_t begin = 0, count; begin < columns; begin += count, in += 3 * count) {
            count = columns - begin < PART ? columns - begin : PART;
            for (int64_t x = 0; x < count; x++)
                for (int channel = 0; channel < 3; channel++) part[channel][x] = values[in[3 * x + channel]];
            for (int channel = 0; mirrored && channel < 3; channel++)
                for (int64_t x = 0; x < count; x++) back[channel][x] = part[channel][count - 1 - x];
            for (int channel = 0; channel < 3; channel++) {
                int64_t row = (channel * rows + y) * columns;
                put(plain + row + begin, part[channel], count);
                if (mirrored) put(mirrored + row + columns - begin - count, back[channel], count);
            }
        }
#ifdef __x86_64__
    _mm_sfence(); /* before another thread is told that they are there */
#endif
}
