/* Print every entry below a directory, one line each, for comparison: the same program runs on the host over a reference
 * tree, in a container and in a VM.
 *
 *   PATH TYPE MODE UID GID SIZE MTIME.NS RDEV LINKS TARGET XATTRS CRC32
 *
 * PATH and TARGET are escaped (\xNN for blanks, backslashes and bytes outside ASCII). SIZE is 0 for directories, LINKS is the
 * first path seen of a hard-linked inode, "-" else. What is mounted below the directory (another mount id) is left out.
 * Lines come in readdir order: sort them. Exit status 1 when something cannot be read.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

struct seen {
    struct seen *next;
    uint64_t dev, ino;
    char *path;
};

static struct seen *table[4096];
static uint32_t crc_table[256];
static uint64_t root_mount;
static int failed;

static void fail(const char *what, const char *path)
{
    fprintf(stderr, "%s %s: %s\n", what, path, strerror(errno));
    failed = 1;
}

static void escaped(const char *text)
{
    for (const unsigned char *p = (const unsigned char *)text; *p; p++)
        if (*p > ' ' && *p < 127 && *p != '\\')
            putchar(*p);
        else
            printf("\\x%02x", *p);
}

static void crc_init(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        crc_table[n] = c;
    }
}

static uint32_t crc_of(int dir, const char *name, const char *path)
{
    static unsigned char buffer[1 << 18];
    uint32_t crc = ~0u;
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        fail("open", path);
        return 0;
    }
    ssize_t got;
    while ((got = read(fd, buffer, sizeof buffer)) > 0)
        for (ssize_t i = 0; i < got; i++)
            crc = crc_table[(crc ^ buffer[i]) & 255] ^ (crc >> 8);
    if (got < 0)
        fail("read", path);
    close(fd);
    return ~crc;
}

static const char *first_of(const struct statx *s, const char *path)
{
    uint64_t dev = makedev(s->stx_dev_major, s->stx_dev_minor);
    struct seen **slot = &table[(s->stx_ino ^ dev) % 4096];
    for (struct seen *e = *slot; e; e = e->next)
        if (e->dev == dev && e->ino == s->stx_ino)
            return e->path;
    struct seen *e = malloc(sizeof *e);
    *e = (struct seen){*slot, dev, s->stx_ino, strdup(path)};
    *slot = e;
    return path;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* NAME=crc32(value) of each extended attribute, sorted, joined by commas. overlay's own are bookkeeping, not content. */
static void xattrs(const char *path)
{
    static char names[65536], value[65536];
    char *sorted[256];
    int count = 0;
    ssize_t size = llistxattr(path, names, sizeof names);
    for (char *n = names; size > 0 && n < names + size && count < 256; n += strlen(n) + 1)
        if (strncmp(n, "trusted.overlay.", 16) && strncmp(n, "user.overlay.", 13))
            sorted[count++] = n;
    qsort(sorted, count, sizeof *sorted, by_name);
    if (!count)
        putchar('-');
    for (int i = 0; i < count; i++) {
        ssize_t length = lgetxattr(path, sorted[i], value, sizeof value);
        uint32_t crc = ~0u;
        for (ssize_t k = 0; k < length; k++)
            crc = crc_table[(crc ^ (unsigned char)value[k]) & 255] ^ (crc >> 8);
        printf("%s%s=%08x", i ? "," : "", sorted[i], ~crc);
    }
}

static void entry(int dir, const char *name, const char *path, const struct statx *s)
{
    static const char kinds[] = "?pc?d?b?-?l?s???";
    char target[8192] = "";
    escaped(path);
    printf(" %c %04o %u %u %llu", kinds[(s->stx_mode >> 12) & 15], s->stx_mode & 07777, s->stx_uid, s->stx_gid,
           S_ISDIR(s->stx_mode) ? 0ull : (unsigned long long)s->stx_size);
    printf(" %lld.%09u %u:%u ", (long long)s->stx_mtime.tv_sec, s->stx_mtime.tv_nsec, s->stx_rdev_major, s->stx_rdev_minor);
    if (!S_ISDIR(s->stx_mode) && s->stx_nlink > 1)
        escaped(first_of(s, path));
    else
        putchar('-');
    putchar(' ');
    if (S_ISLNK(s->stx_mode)) {
        ssize_t length = readlinkat(dir, name, target, sizeof target - 1);
        if (length < 0)
            fail("readlink", path);
        escaped(target);
    } else {
        putchar('-');
    }
    putchar(' ');
    xattrs(path);
    printf(" %08x\n", S_ISREG(s->stx_mode) ? crc_of(dir, name, path) : 0);
}

static void walk(const char *path)
{
    struct dirent **list;
    int count = scandir(path, &list, NULL, alphasort);
    if (count < 0) {
        fail("list", path);
        return;
    }
    int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int i = 0; i < count; i++) {
        const char *name = list[i]->d_name;
        struct statx s;
        char *below;
        if (strcmp(name, ".") && strcmp(name, "..") && asprintf(&below, "%s/%s", strcmp(path, ".") ? path : ".", name) > 0) {
            if (statx(dir, name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_MNT_ID, &s))
                fail("stat", below);
            else if (s.stx_mnt_id == root_mount) {
                entry(dir, name, below, &s);
                if (S_ISDIR(s.stx_mode))
                    walk(below);
            }
            free(below);
        }
        free(list[i]);
    }
    free(list);
    close(dir);
}

int main(int argc, char **argv)
{
    struct statx s;
    if (argc != 2 || chdir(argv[1]) || statx(AT_FDCWD, ".", 0, STATX_MNT_ID, &s)) {
        fail("cannot enter", argc > 1 ? argv[1] : "(no directory given)");
        return 1;
    }
    root_mount = s.stx_mnt_id;
    crc_init();
    walk(".");
    return failed || fflush(stdout);
}
