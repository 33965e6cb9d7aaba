/* Hard links: which files have been archived already, of those that have more than one name. */
#include "parts.h"

enum { BUCKETS = 1 << 14, CHUNK = 1 << 20 };

struct known {
    struct known *next;
    uint64_t inode;
    uint32_t major, minor;
    char path[];
};

static struct known *buckets[BUCKETS];
static char *chunk;
static size_t chunk_left;

/* Not of the arena, which is given back on the way up. */
static void *keep(size_t length) {
    length = (length + 7) & ~(size_t)7;
    if (length > chunk_left) {
        size_t size = length > CHUNK ? length : CHUNK;
        long got = SYS6(mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got < 0 && got > -4096)
            give_up_on("cannot remember the files with several names", NULL, got);
        chunk = (char *)got;
        chunk_left = size;
    }
    void *kept = chunk;
    chunk += length;
    chunk_left -= length;
    return kept;
}

static struct known **bucket_of(const struct statx *st) {
    return &buckets[(st->stx_ino ^ st->stx_ino >> 14) % BUCKETS];
}

const char *links_seen(const struct statx *st) {
    for (struct known *k = *bucket_of(st); k; k = k->next)
        if (k->inode == st->stx_ino && k->major == st->stx_dev_major && k->minor == st->stx_dev_minor)
            return k->path;
    return NULL;
}

void links_remember(const struct statx *st, const char *path) {
    size_t length = strlen(path) + 1;
    struct known **bucket = bucket_of(st), *made = keep(sizeof(*made) + length);
    *made = (struct known){*bucket, st->stx_ino, st->stx_dev_major, st->stx_dev_minor};
    memcpy(made->path, path, length);
    *bucket = made;
}
