/* From a directory to an archive. The current directory follows the walk, so that every name that the kernel is given is a
 * single component, which nobody can turn into a way out: a link is never followed. What vanishes meanwhile is left out. */
#include "parts.h"

struct linux_dirent64 { /* linux/dirent.h of the kernel, not of its headers for us */
    uint64_t d_ino;
    int64_t d_off;
    unsigned short d_reclen;
    unsigned char d_type;
    char d_name[];
};

static void sift(char **at, size_t root, size_t count) {
    for (size_t child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && strcmp(at[child], at[child + 1]) < 0)
            child++;
        if (strcmp(at[root], at[child]) >= 0)
            return;
        char *swap = at[root];
        at[root] = at[child];
        at[child] = swap;
    }
}

static void sort(char **at, size_t count) {
    for (size_t i = count / 2; i--;)
        sift(at, i, count);
    for (size_t i = count; i-- > 1;) {
        char *swap = at[0];
        at[0] = at[i];
        at[i] = swap;
        sift(at, 0, i);
    }
}

struct names names_of(int fd) {
    static char buffer[32768] __attribute__((aligned(8)));
    struct names found = {0};
    char *first = arena_mark();
    long n;
    while ((n = SYS3(getdents64, fd, buffer, sizeof(buffer))) > 0)
        for (long at = 0; at < n;) {
            struct linux_dirent64 *entry = (void *)(buffer + at);
            at += entry->d_reclen;
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
                continue;
            size_t length = strlen(entry->d_name) + 1;
            memcpy(arena_take(length), entry->d_name, length);
            found.count++;
        }
    if (n < 0 && n != -ENOENT)
        give_up_on("cannot list", path_text, n);
    found.at = (char **)arena_take(found.count * sizeof(char *));
    for (size_t i = 0; i < found.count; i++) {
        found.at[i] = first;
        first += (strlen(first) + 1 + 7) & ~(size_t)7;
    }
    sort(found.at, found.count);
    return found;
}

static bool archive_file(const char *name, const struct records *extra) {
    struct statx st;
    int fd = open_path(HERE, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, RESOLVE_BENEATH);
    if (fd == -ENOENT || fd == -ELOOP || fd == -ENXIO)
        return false;
    if (fd < 0)
        give_up_on("cannot open", path_text, fd);
    bool is_file = stat_of(fd, "", &st) == 0 && is_kind(&st, S_IFREG);
    if (is_file)
        write_regular(fd, path_text, &st, extra);
    SYS1(close, fd);
    return is_file;
}

static char type_of(const struct statx *st) {
    switch (st->stx_mode & S_IFMT) {
    case S_IFLNK:
        return '2';
    case S_IFCHR:
        return '3';
    case S_IFBLK:
        return '4';
    case S_IFDIR:
        return '5';
    case S_IFIFO:
        return '6';
    default:
        return 0; /* a socket is of no use without its process */
    }
}

bool archive_one(const char *name, const struct statx *st) {
    static struct records extra;
    static char target[PATH_LIMIT];
    extra.length = 0;
    target[0] = 0;
    char type = type_of(st);
    bool several = st->stx_nlink > 1 && !is_kind(st, S_IFDIR);
    if (!type && !is_kind(st, S_IFREG))
        return false;
    const char *before = several ? links_seen(st) : NULL;
    if (before) {
        write_member(path_text, before, '1', st, NULL, 0);
        return true;
    }
    xattrs_collect(&extra, name);
    if (type == '2') {
        long n = SYS4(readlinkat, HERE, name, target, sizeof(target) - 1);
        if (n < 0)
            return false;
        target[n] = 0;
    }
    if (type)
        write_member(path_text, target, type, st, &extra, 0);
    else if (!archive_file(name, &extra))
        return false;
    if (several)
        links_remember(st, path_text);
    return true;
}

void archive_children(int fd) {
    char *mark = arena_mark();
    struct names names = names_of(fd);
    for (size_t i = 0; i < names.count; i++) {
        size_t before = path_push(names.at[i]);
        archive_entry(fd, names.at[i]);
        path_pop(before);
    }
    arena_release(mark);
}

/* A directory's name ends with a slash, but not while it is a part of its children's. */
static void archive_directory(const char *name, const struct statx *st) {
    size_t before = path_length;
    if (!path_length || path_text[path_length - 1] != '/') {
        path_text[path_length++] = '/';
        path_text[path_length] = 0;
    }
    archive_one(name, st);
    path_pop(before);
}

bool archive_entry(int here, const char *name) {
    struct statx st;
    int result = stat_of(HERE, name, &st);
    if (result == -ENOENT)
        return false;
    if (result < 0)
        give_up_on("cannot look at", path_text, result);
    if (!is_kind(&st, S_IFDIR))
        return archive_one(name, &st);
    int fd = open_path(HERE, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, RESOLVE_BENEATH);
    if (fd == -ENOENT || fd == -ENOTDIR || fd == -ELOOP)
        return false;
    if (fd < 0)
        give_up_on("cannot open", path_text, fd);
    result = (int)SYS1(fchdir, fd);
    if (result < 0)
        give_up_on("cannot enter", path_text, result);
    if (stat_of(fd, "", &st) == 0)
        archive_directory(".", &st);
    if (!is_kernel_file_system(fd))
        archive_children(fd);
    SYS1(close, fd);
    SYS1(fchdir, here);
    return true;
}
