/* Ranges of a file read, hashed while they are in the processor's cache, and put to their places in memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* Bytes that one call may read: neighbours, and what lies between them where that is little. They stay in the second
   cache until they are hashed and put in their places. */
#define TOGETHER_BYTES (160 << 10)
#define GAP 4096

/* Reads `size` bytes. Returns how many there were, or -1. */
static int64_t read_all(int file, char *place, int64_t size, int64_t start) {
    int64_t done = 0;
    while (done < size) {
        ssize_t got = pread(file, place + done, size - done, start + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += got;
    }
    return done;
}

/* Copies past the caches: what a batch will be is not needed soon, and need not be read before it is written. */
static void put(char *to, const char *from, int64_t size) {
    int64_t done = 0;
#ifdef __SSE2__
    if (((uintptr_t)to & 15) == 0)
        for (; done + 64 <= size; done += 64) {
            const __m128i *source = (const __m128i *)(from + done);
            __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
            __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
            __m128i *place = (__m128i *)(to + done);
            _mm_stream_si128(place, a), _mm_stream_si128(place + 1, b);
            _mm_stream_si128(place + 2, c), _mm_stream_si128(place + 3, d);
        }
#endif
    memcpy(to + done, from + done, size - done);
}

/* For each of `count` ranges: 0 in `state` where it is whole, 1 where the file ends in it, 2 where it differs from its
   hash; what is not whole is in its place as far as it goes. Returns 0, or the errno of a read that failed. */
int read_checked(int file, int64_t count, const int64_t *start, const int64_t *size, const uint64_t *to,
                 const uint64_t *expected, uint64_t (*hash)(const void *, size_t), uint8_t *state) {
    char buffer[TOGETHER_BYTES] __attribute__((aligned(64)));
    int failed = 0;
    for (int64_t first = 0, last; first < count && !failed; first = last) {
        int64_t end = start[first] + size[first];
        for (last = first + 1; last < count; last++) {
            int64_t gap = start[last] - end;
            if (gap < 0 || gap > GAP || start[last] + size[last] - start[first] > TOGETHER_BYTES) break;
            end = start[last] + size[last];
        }
        int large = size[first] > TOGETHER_BYTES;
        int64_t got = read_all(file, large ? (char *)(uintptr_t)to[first] : buffer, end - start[first], start[first]);
        if (got < 0) failed = errno;
        for (int64_t i = first; i < last && !failed; i++) {
            const char *from = large ? (char *)(uintptr_t)to[i] : buffer + (start[i] - start[first]);
            int64_t left = got - (start[i] - start[first]);
            state[i] = left < size[i] ? 1 : hash(from, size[i]) == expected[i] ? 0 : 2;
            if (!large && left > 0) put((char *)(uintptr_t)to[i], from, left < size[i] ? left : size[i]);
        }
    }
#ifdef __SSE2__
    _mm_sfence(); /* before another thread is told that they are there */
#endif
    return failed;
}
