/* An archive: ustar headers, and PAX ones before them for what does not fit. Sparse files are in GNU's PAX format 1.0. */
#include "parts.h"

enum { OUT_BYTES = 128 << 10, MAX_EXTENTS = 65536, SPARSE_WORTH = 64 << 10, MANY_AT_ONCE = 1 << 30 };

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], type, link[100], magic[8], user[32], group[32], major[8],
        minor[8], prefix[155], rest[12];
};

struct extent {
    uint64_t at, length;
};

static char out[OUT_BYTES];
static size_t out_length;
static struct records pax;

static void write_now(const char *data, size_t length) {
    while (length) {
        long n = SYS3(write, TREE_OUT, data, length);
        if (n == -EINTR)
            continue;
        if (n < 0)
            give_up_on("cannot write the archive", NULL, n);
        data += n;
        length -= (size_t)n;
    }
}

void write_flush(void) {
    write_now(out, out_length);
    out_length = 0;
}

void write_bytes(const void *data, size_t length) {
    if (out_length + length > OUT_BYTES)
        write_flush();
    if (length > OUT_BYTES) {
        write_now(data, length);
        return;
    }
    memcpy(out + out_length, data, length);
    out_length += length;
}

static void write_zeros(uint64_t length) {
    static const char zeros[4096];
    for (; length; length -= length < sizeof(zeros) ? length : sizeof(zeros))
        write_bytes(zeros, length < sizeof(zeros) ? length : sizeof(zeros));
}

static void octal(char *field, size_t size, uint64_t value) {
    field[size - 1] = 0;
    for (size_t i = size - 1; i--; value >>= 3)
        field[i] = (char)('0' + (value & 7));
}

static size_t decimal(char *into, uint64_t value) {
    char digits[24];
    size_t count = 0, length = 0;
    do
        digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    while (count)
        into[length++] = digits[--count];
    into[length] = 0;
    return length;
}

static void pax_number(const char *key, uint64_t value) {
    char text[24];
    record_add(&pax, key, "", text, decimal(text, value));
}

/* Seconds and nine digits; a time before 1970 is a negative number with a fraction. */
static void pax_time(int64_t seconds, uint32_t ns) {
    char text[48];
    size_t length = 0;
    if (seconds < 0) {
        text[length++] = '-';
        seconds = -seconds - (ns ? 1 : 0);
        ns = ns ? 1000000000 - ns : 0;
    }
    length += decimal(text + length, (uint64_t)seconds);
    if (ns) {
        text[length++] = '.';
        for (uint32_t unit = 100000000; unit; unit /= 10)
            text[length++] = (char)('0' + ns / unit % 10);
    }
    record_add(&pax, "mtime", "", text, length);
}

static void finish_header(struct header *h) {
    unsigned sum = 0;
    memcpy(h->magic, "ustar\00000", 8);
    memset(h->sum, ' ', sizeof(h->sum));
    for (size_t i = 0; i < sizeof(*h); i++)
        sum += ((const unsigned char *)h)[i];
    octal(h->sum, 7, sum);
    write_bytes(h, sizeof(*h));
}

static void write_extensions(void) {
    struct header h;
    if (!pax.length)
        return;
    memset(&h, 0, sizeof(h));
    memcpy(h.name, "PaxHeaders.0/x", 14);
    h.type = 'x';
    octal(h.mode, 8, 0644);
    octal(h.uid, 8, 0);
    octal(h.gid, 8, 0);
    octal(h.size, 12, pax.length);
    octal(h.mtime, 12, 0);
    finish_header(&h);
    write_bytes(pax.at, pax.length);
    write_zeros(-pax.length % BLOCK);
}

static void name_field(char *field, const char *key, const char *text) {
    size_t length = strlen(text);
    if (length > 100)
        record_add(&pax, key, "", text, length);
    memcpy(field, text, length < 100 ? length : 100);
}

static void id_field(char *field, const char *key, uint32_t id) {
    if (id > 07777777)
        pax_number(key, id);
    octal(field, 8, id > 07777777 ? 0 : id);
}

/* `stored` bytes follow; the records in `pax` so far go along. */
static void write_header(const char *path, const char *link, char type, const struct statx *st, uint64_t stored) {
    struct header h;
    memset(&h, 0, sizeof(h));
    name_field(h.name, "path", path);
    name_field(h.link, "linkpath", link);
    octal(h.mode, 8, st->stx_mode & 07777);
    id_field(h.uid, "uid", st->stx_uid);
    id_field(h.gid, "gid", st->stx_gid);
    if (stored >> 33)
        pax_number("size", stored);
    octal(h.size, 12, stored >> 33 ? 0 : stored);
    int64_t seconds = st->stx_mtime.tv_sec;
    if (seconds < 0 || seconds >> 33 || st->stx_mtime.tv_nsec)
        pax_time(seconds, st->stx_mtime.tv_nsec);
    octal(h.mtime, 12, seconds < 0 || seconds >> 33 ? 0 : (uint64_t)seconds);
    h.type = type;
    if (type == '3' || type == '4') {
        octal(h.major, 8, st->stx_rdev_major);
        octal(h.minor, 8, st->stx_rdev_minor);
    }
    write_extensions();
    finish_header(&h);
    pax.length = 0;
}

static void start_records(const struct records *extra) {
    pax.length = extra ? extra->length : 0;
    if (extra)
        memcpy(pax.at, extra->at, extra->length);
}

void write_member(const char *path, const char *link, char type, const struct statx *st, const struct records *extra,
                  uint64_t size) {
    start_records(extra);
    write_header(path, link, type, st, size);
}

/* What a file lost while it was read is written as zeros: its header has promised them. */
static void copy_data(int fd, const char *path, uint64_t length) {
    write_flush();
    uint64_t left = length;
    while (left) {
        long n = SYS4(sendfile, TREE_OUT, fd, 0, left < MANY_AT_ONCE ? left : MANY_AT_ONCE);
        if (n == -EINVAL || n == -ENOSYS) {
            n = SYS3(read, fd, out, left < OUT_BYTES ? left : OUT_BYTES);
            if (n > 0)
                write_now(out, (size_t)n);
        }
        if (n == -EINTR)
            continue;
        if (n < 0)
            give_up_on(n == -EPIPE ? "cannot write the archive" : "cannot read", n == -EPIPE ? NULL : path, n);
        if (n == 0)
            break;
        left -= (uint64_t)n;
    }
    write_zeros(left);
    if (length % BLOCK)
        write_zeros(BLOCK - length % BLOCK);
}

/* The pieces that are no holes, in the arena; false when there are too many, or none worth it. */
static bool find_extents(int fd, uint64_t size, struct extent **found, size_t *count, uint64_t *stored) {
    *found = (struct extent *)arena_mark();
    *count = 0;
    *stored = 0;
    for (uint64_t at = 0; at < size;) {
        long data = SYS3(lseek, fd, at, SEEK_TO_DATA);
        if (data == -ENXIO)
            break;
        long hole = data < 0 ? data : SYS3(lseek, fd, data, SEEK_TO_HOLE);
        if (hole < 0 || *count == MAX_EXTENTS)
            return false;
        if ((uint64_t)hole > size)
            hole = (long)size;
        if ((uint64_t)data >= size)
            break;
        *(struct extent *)arena_take(sizeof(struct extent)) = (struct extent){(uint64_t)data, (uint64_t)(hole - data)};
        ++*count;
        *stored += (uint64_t)(hole - data);
        at = (uint64_t)hole;
    }
    return *stored + SPARSE_WORTH <= size;
}

static void write_sparse(int fd, const char *path, const struct statx *st, const struct extent *extents, size_t count,
                         uint64_t stored) {
    static char map[MAX_EXTENTS * 24];
    size_t length = decimal(map, count + 1);
    map[length++] = '\n';
    for (size_t i = 0; i <= count; i++) { /* an empty piece at the end tells the size to readers that ignore the record */
        bool last = i == count;
        length += decimal(map + length, last ? st->stx_size : extents[i].at);
        map[length++] = '\n';
        length += decimal(map + length, last ? 0 : extents[i].length);
        map[length++] = '\n';
    }
    size_t padding = -length % BLOCK;
    record_add(&pax, "GNU.sparse.major", "", "1", 1);
    record_add(&pax, "GNU.sparse.minor", "", "0", 1);
    record_add(&pax, "GNU.sparse.name", "", path, strlen(path));
    pax_number("GNU.sparse.realsize", st->stx_size);
    write_header("GNUSparseFile.0/x", "", '0', st, length + padding + stored);
    write_bytes(map, length);
    write_zeros(padding);
    for (size_t i = 0; i < count; i++) {
        long at = SYS3(lseek, fd, extents[i].at, SEEK_FROM_START);
        if (at < 0)
            give_up_on("cannot read", path, at);
        write_flush();
        uint64_t whole = extents[i].length & ~(uint64_t)(BLOCK - 1);
        copy_data(fd, path, whole);
        static char tail[BLOCK];
        size_t rest = (size_t)(extents[i].length - whole);
        if (rest) { /* no padding between pieces */
            memset(tail, 0, sizeof(tail));
            for (size_t done = 0; done < rest;) {
                long n = SYS3(read, fd, tail + done, rest - done);
                if (n <= 0)
                    break;
                done += (size_t)n;
            }
            write_bytes(tail, rest);
        }
    }
    write_zeros(-stored % BLOCK);
}

void write_regular(int fd, const char *path, const struct statx *st, const struct records *extra) {
    char *mark = arena_mark();
    struct extent *extents;
    size_t count;
    uint64_t stored;
    bool holes = st->stx_size >= SPARSE_WORTH && st->stx_blocks * 512 + SPARSE_WORTH <= st->stx_size;
    start_records(extra);
    if (holes && find_extents(fd, st->stx_size, &extents, &count, &stored)) {
        write_sparse(fd, path, st, extents, count, stored);
    } else {
        if (holes)
            SYS3(lseek, fd, 0, SEEK_FROM_START);
        write_header(path, "", '0', st, st->stx_size);
        copy_data(fd, path, st->stx_size);
    }
    arena_release(mark);
}

void write_end(void) {
    write_zeros(2 * BLOCK);
    write_flush();
}
