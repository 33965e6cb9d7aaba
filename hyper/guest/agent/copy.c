#include "copy.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

/* While this is there the copy has not ended, whatever else is. Only an empty volume gets one. */
#define STAGING ".ambi-copy"
#define MKFS_DIRECTORY "lost+found"
enum { MAX_DEPTH = 512, CHUNK = 1 << 20, MAX_ATTRIBUTES = 65536 };

/* Where a file with several names was copied to first: a path below the staging directory. */
struct seen {
    dev_t device;
    ino_t inode;
    char *path;
};

struct copier {
    int top; /* the staging directory */
    struct seen *seen;
    size_t count;
    char path[PATH_MAX]; /* of what is being copied, below the top */
};

static bool is_dots(const char *name) {
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

static DIR *list(int directory) {
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    if (fd >= 0 && !entries)
        close(fd);
    return entries;
}

/* -1 and errno; `keep` may be NULL. */
static int remove_all(int directory, const char *keep, int depth) {
    DIR *entries = depth > MAX_DEPTH ? NULL : list(directory);
    int result = entries ? 0 : -1;
    for (struct dirent *entry; result == 0 && (entry = readdir(entries));) {
        const char *name = entry->d_name;
        if (is_dots(name) || (keep && strcmp(name, keep) == 0))
            continue;
        if (unlinkat(directory, name, 0) == 0)
            continue;
        int below = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        result = below < 0 || remove_all(below, NULL, depth + 1) < 0 ? -1 : unlinkat(directory, name, AT_REMOVEDIR);
        if (below >= 0)
            close(below);
    }
    if (entries)
        closedir(entries);
    return result;
}

/* Attributes that mean something elsewhere; file systems without them are as good as volumes can be there. */
static bool carried(const char *name) {
    return strncmp(name, "user.", 5) == 0 || strcmp(name, "security.capability") == 0 ||
           strcmp(name, "system.posix_acl_access") == 0 || strcmp(name, "system.posix_acl_default") == 0;
}

static int copy_attributes(int from, int to) {
    char names[MAX_ATTRIBUTES];
    static char value[MAX_ATTRIBUTES];
    ssize_t length = flistxattr(from, names, sizeof(names));
    for (char *name = names; name < names + (length > 0 ? length : 0); name += strlen(name) + 1) {
        ssize_t size = carried(name) ? fgetxattr(from, name, value, sizeof(value)) : -1;
        if (size >= 0 && fsetxattr(to, name, value, (size_t)size, 0) < 0 && errno != EOPNOTSUPP && errno != EPERM)
            return -1;
    }
    return 0;
}

/* Owner, mode, attributes, times of an open file or directory; the owner first, because it takes bits of the others away. */
static int copy_metadata(int from, int to, const struct stat *st) {
    const struct timespec times[] = {st->st_atim, st->st_mtim};
    if (fchown(to, st->st_uid, st->st_gid) < 0 || fchmod(to, st->st_mode & 07777) < 0 || copy_attributes(from, to) < 0)
        return -1;
    return futimens(to, times);
}

static int copy_data(int from, int to) {
    static char buffer[CHUNK];
    for (;;) {
        ssize_t n = copy_file_range(from, NULL, to, NULL, 1 << 30, 0);
        if (n == 0)
            break; /* the end, or a kernel file that has no size: read on */
        if (n < 0)
            break;
    }
    for (;;) {
        ssize_t n = read(from, buffer, sizeof(buffer));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return (int)n;
        if (write_all(to, buffer, (size_t)n) < 0)
            return -1;
    }
}

static int copy_file(int source, int target, const char *name, const struct stat *st) {
    int from = openat(source, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    int to = from < 0 ? -1 : openat(target, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    int result = to < 0 || copy_data(from, to) < 0 ? -1 : copy_metadata(from, to, st);
    int saved = errno;
    if (from >= 0)
        close(from);
    if (to >= 0)
        close(to);
    errno = saved;
    return result;
}

static int copy_link(int source, int target, const char *name, const struct stat *st) {
    char text[PATH_MAX];
    const struct timespec times[] = {st->st_atim, st->st_mtim};
    ssize_t length = readlinkat(source, name, text, sizeof(text) - 1);
    if (length < 0)
        return -1;
    text[length] = 0;
    if (symlinkat(text, target, name) < 0 || fchownat(target, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    return utimensat(target, name, times, AT_SYMLINK_NOFOLLOW);
}

/* Devices, FIFOs and sockets. */
static int copy_node(int target, const char *name, const struct stat *st) {
    const struct timespec times[] = {st->st_atim, st->st_mtim};
    if (mknodat(target, name, st->st_mode & (S_IFMT | 0600), st->st_rdev) < 0 ||
        fchownat(target, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0 ||
        fchmodat(target, name, st->st_mode & 07777, 0) < 0)
        return -1;
    return utimensat(target, name, times, AT_SYMLINK_NOFOLLOW);
}

/* 1: `name` is one more name of a file that is there already; 0: it is not; -1 and errno. */
static int copy_name(struct copier *c, int target, const char *name, const struct stat *st) {
    if (st->st_nlink < 2)
        return 0;
    for (size_t i = 0; i < c->count; i++)
        if (c->seen[i].device == st->st_dev && c->seen[i].inode == st->st_ino)
            return linkat(c->top, c->seen[i].path, target, name, 0) < 0 ? -1 : 1;
    struct seen *grown = realloc(c->seen, (c->count + 1) * sizeof(*grown));
    if (!grown)
        return -1;
    c->seen = grown;
    if (!(grown[c->count].path = strdup(c->path)))
        return -1;
    grown[c->count].device = st->st_dev;
    grown[c->count++].inode = st->st_ino;
    return 0;
}

static int copy_tree(struct copier *c, int source, int target, int depth);

static int copy_directory(struct copier *c, int source, int target, const char *name, const struct stat *st, int depth) {
    int from = openat(source, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int to = from < 0 || mkdirat(target, name, 0700) < 0 ? -1
                                                           : openat(target, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result = to < 0 || copy_tree(c, from, to, depth + 1) < 0 ? -1 : copy_metadata(from, to, st);
    int saved = errno;
    if (from >= 0)
        close(from);
    if (to >= 0)
        close(to);
    errno = saved;
    return result;
}

static int copy_entry(struct copier *c, int source, int target, const char *name, int depth) {
    struct stat st;
    if (fstatat(source, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    if (S_ISDIR(st.st_mode))
        return copy_directory(c, source, target, name, &st, depth);
    int known = copy_name(c, target, name, &st);
    if (known)
        return known < 0 ? -1 : 0;
    if (S_ISREG(st.st_mode))
        return copy_file(source, target, name, &st);
    return S_ISLNK(st.st_mode) ? copy_link(source, target, name, &st) : copy_node(target, name, &st);
}

/* On failure `c->path` is what it could not copy. */
static int copy_tree(struct copier *c, int source, int target, int depth) {
    size_t length = strlen(c->path);
    DIR *entries = depth > MAX_DEPTH ? NULL : list(source);
    int result = entries ? 0 : -1;
    if (depth > MAX_DEPTH)
        errno = ENAMETOOLONG;
    for (struct dirent *entry; result == 0 && (entry = readdir(entries));) {
        if (is_dots(entry->d_name))
            continue;
        if (snprintf(c->path + length, PATH_MAX - length, "%s%s", length ? "/" : "", entry->d_name) >= (int)(PATH_MAX - length)) {
            errno = ENAMETOOLONG;
            result = -1;
        } else if ((result = copy_entry(c, source, target, entry->d_name, depth)) == 0) {
            c->path[length] = 0;
        }
    }
    int saved = errno;
    if (entries)
        closedir(entries);
    errno = saved;
    return result;
}

/* Whether there is nothing of anybody's, or only a copy that did not end; -1 and errno. */
static int is_empty(int target) {
    DIR *entries = list(target);
    bool empty = true;
    if (!entries)
        return -1;
    for (struct dirent *entry; (entry = readdir(entries));)
        empty &= is_dots(entry->d_name) || strcmp(entry->d_name, MKFS_DIRECTORY) == 0;
    closedir(entries);
    return empty || faccessat(target, STAGING, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

/* Out of the staging directory into the volume; an image's own lost+found stays where mkfs has one. */
static int publish(int staging, int target) {
    DIR *entries = list(staging);
    int result = entries ? 0 : -1;
    for (struct dirent *entry; result == 0 && (entry = readdir(entries));)
        if (!is_dots(entry->d_name) && strcmp(entry->d_name, MKFS_DIRECTORY) != 0)
            result = renameat(staging, entry->d_name, target, entry->d_name);
    if (entries)
        closedir(entries);
    return result;
}

static int copy_staged(struct copier *c, int source, int target, struct error *e) {
    struct stat st;
    c->path[0] = 0;
    if (fstat(source, &st) < 0 || remove_all(target, MKFS_DIRECTORY, 0) < 0 || mkdirat(target, STAGING, 0700) < 0)
        return fail_errno(e, errno, "cannot copy the image's content into a volume");
    c->top = openat(target, STAGING, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result = c->top < 0 ? -1 : copy_tree(c, source, c->top, 0);
    if (result == 0 && (result = publish(c->top, target)) == 0)
        result = remove_all(c->top, NULL, 0);
    if (result < 0)
        fail_errno(e, errno, "cannot copy the image's %s into a volume", c->path[0] ? c->path : "content");
    if (c->top >= 0)
        close(c->top);
    if (result < 0) {
        remove_all(target, MKFS_DIRECTORY, 0);
        return -1;
    }
    if (copy_metadata(source, target, &st) < 0 || unlinkat(target, STAGING, AT_REMOVEDIR) < 0)
        return fail_errno(e, errno, "cannot finish the copy of the image's content into a volume");
    return 0;
}

int copy_into_empty(int source, int target, struct error *e) {
    static struct copier c;
    int empty = is_empty(target);
    if (empty <= 0)
        return empty < 0 ? fail_errno(e, errno, "cannot read a volume") : 0;
    memset(&c, 0, sizeof(c));
    int result = copy_staged(&c, source, target, e);
    for (size_t i = 0; i < c.count; i++)
        free(c.seen[i].path);
    free(c.seen);
    return result;
}
