/* Ranges of a file read, hashed while they are in the processor's cache, and put to their places in memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

/* What lies between neighbours that are read by one call, at most. */
#define GAP 4096

/* For this processor: the bytes that one call may read, neighbours and what lies between them, and how many of them are
   hashed and then put to their place before the next are, whose hash is taken while the stores wait in the processor.
   What is read stays in a cache until then: the second, but on an AMD (seen on Zen 4) the kernel copies a quarter slower
   into that than into the third. */
void amounts(int64_t *together, int64_t *piece) {
    *together = 320 << 10;
    *piece = 1 << 10;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) {
        *together = 2 << 20;
        *piece = 4 << 10;
    }
#endif
}

/* xxhash's own functions for XXH3 of 64 bits in pieces. */
struct xxh3 {
    void *(*create)(void);
    int (*release)(void *);
    int (*reset)(void *);
    int (*update)(void *, const void *, size_t);
    uint64_t (*digest)(const void *);
};

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

/* Copies past the caches: what a batch will be is not needed soon, and need not be read before it is written. A store
   of 64 bytes fills a line of them at once. */
#ifdef __x86_64__
__attribute__((target("avx512f"))) static int64_t put_64(char *to, const char *from, int64_t size) {
    int64_t done = 0;
    if (((uintptr_t)to & 63) == 0)
        for (; done + 64 <= size; done += 64)
            _mm512_stream_si512((__m512i *)(to + done), _mm512_loadu_si512(from + done));
    return done;
}

static int64_t put_16(char *to, const char *from, int64_t size) {
    int64_t done = 0;
    if (((uintptr_t)to & 15) == 0)
        for (; done + 16 <= size; done += 16)
            _mm_stream_si128((__m128i *)(to + done), _mm_loadu_si128((const __m128i *)(from + done)));
    return done;
}
#endif

static void put(char *to, const char *from, int64_t size) {
    int64_t done = 0;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) done = put_64(to, from, size);
    done += put_16(to + done, from + done, size - done);
#endif
    memcpy(to + done, from + done, size - done);
}

/* The hash of `size` bytes; they are put to their place too, but where that is where they are. */
static uint64_t hashed(const struct xxh3 *xxh3, void *hash, char *to, const char *from, int64_t size, int64_t piece) {
    xxh3->reset(hash);
    for (int64_t done = 0, more; done < size; done += more) {
        more = to == from || size - done < piece ? size - done : piece;
        xxh3->update(hash, from + done, more);
        if (to != from) put(to + done, from + done, more);
    }
    return xxh3->digest(hash);
}

/* Reads by way of `buffer`, of `together` bytes, and takes turns by the `piece`, as `amounts` says.
   For each of `count` ranges: 0 in `state` where it is whole, 1 where the file ends in it, 2 where it differs from its
   hash; what is not whole is in its place as far as it goes. Returns 0, or the errno of a read that failed. */
int read_checked(int file, int64_t count, const int64_t *start, const int64_t *size, const uint64_t *to,
                 const uint64_t *expected, const struct xxh3 *xxh3, char *buffer, int64_t together, int64_t piece,
                 uint8_t *state) {
    void *hash = xxh3->create();
    int failed = hash ? 0 : ENOMEM;
    for (int64_t first = 0, last; first < count && !failed; first = last) {
        int64_t end = start[first] + size[first];
        for (last = first + 1; last < count; last++) {
            int64_t gap = start[last] - end;
            if (gap < 0 || gap > GAP || start[last] + size[last] - start[first] > together) break;
            end = start[last] + size[last];
        }
        char *place = size[first] > together ? (char *)(uintptr_t)to[first] : buffer;
        int64_t got = read_all(file, place, end - start[first], start[first]);
        if (got < 0) failed = errno;
        for (int64_t i = first; i < last && !failed; i++) {
            const char *from = place + (start[i] - start[first]);
            char *its = (char *)(uintptr_t)to[i];
            int64_t left = got - (start[i] - start[first]);
            if (left >= size[i]) {
                state[i] = hashed(xxh3, hash, its, from, size[i], piece) == expected[i] ? 0 : 2;
            } else {
                state[i] = 1;
                if (its != from && left > 0) put(its, from, left);
            }
        }
    }
    if (hash) xxh3->release(hash);
#ifdef __x86_64__
    _mm_sfence(); /* before another thread is told that they are there */
#endif
    return failed;
}
