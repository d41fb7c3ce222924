/* Ranges of a file read each to its place in memory, and hashed while it is in the processor's cache. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/uio.h>
#include <unistd.h>

/* Ranges, and bytes of them, that one call may read; and bytes between two of them that are rather read too. */
#define TOGETHER 16
#define TOGETHER_BYTES (1 << 18)
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

/* For each of `count` ranges: 0 in `state` where it is whole, 1 where the file ends in it, 2 where it differs from its
   hash. Returns 0, or the errno of a read that failed. */
int read_checked(int file, int64_t count, const int64_t *start, const int64_t *size, const uint64_t *to,
                 const uint64_t *expected, uint64_t (*hash)(const void *, size_t), uint8_t *state) {
    char between[GAP];
    for (int64_t first = 0, last; first < count; first = last) {
        struct iovec parts[2 * TOGETHER];
        int number = 0;
        int64_t end = start[first];
        for (last = first; last < count && last < first + TOGETHER; last++) {
            int64_t gap = start[last] - end;
            if (gap < 0 || gap > GAP || (last > first && start[last] + size[last] - start[first] > TOGETHER_BYTES)) break;
            if (gap) parts[number++] = (struct iovec){between, gap};
            parts[number++] = (struct iovec){(void *)(uintptr_t)to[last], size[last]};
            end = start[last] + size[last];
        }
        int whole = last > first + 1 && preadv(file, parts, number, start[first]) == end - start[first];
        for (int64_t i = first; i < last; i++) {
            char *place = (char *)(uintptr_t)to[i];
            int64_t got = whole ? size[i] : read_all(file, place, size[i], start[i]);
            if (got < 0) return errno;
            state[i] = got < size[i] ? 1 : hash(place, size[i]) == expected[i] ? 0 : 2;
        }
    }
    return 0;
}
