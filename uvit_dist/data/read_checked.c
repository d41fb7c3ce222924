/* Ranges of a file read each to its place in memory, and hashed while it is in the processor's cache. */
#include <errno.h>
#include <stdint.h>
#include <unistd.h>

/* For each of `count` ranges: 0 in `state` where it is whole, 1 where the file ends in it, 2 where it differs from its
   hash. Returns 0, or the errno of a read that failed. */
int read_checked(int file, int64_t count, const int64_t *start, const int64_t *size, const uint64_t *to,
                 const uint64_t *expected, uint64_t (*hash)(const void *, size_t), uint8_t *state) {
    for (int64_t i = 0; i < count; i++) {
        char *place = (char *)(uintptr_t)to[i];
        int64_t done = 0;
        while (done < size[i]) {
            ssize_t got = pread(file, place + done, size[i] - done, start[i] + done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return errno;
            if (got == 0) break;
            done += got;
        }
        state[i] = done < size[i] ? 1 : hash(place, size[i]) == expected[i] ? 0 : 2;
    }
    return 0;
}
