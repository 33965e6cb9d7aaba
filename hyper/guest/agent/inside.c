#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_DEPTH = 128, MAX_LINKS = 40 };

int inside_open(int root, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve};
    long fd;
    do
        fd = syscall(SYS_openat2, root, path, &how, sizeof(how));
    while (fd < 0 && (errno == EAGAIN || errno == EINTR));
    return (int)fd;
}

/* When `name` in `parent` is a symbolic link: the path behind it, as seen from where `path` is. Images have links to what only
 * a running system has, such as /etc/resolv.conf, and a mount on one makes its target, as in a container. */
static bool behind_link(int parent, const char *name, const char *path, char target[PATH_MAX]) {
    char link[PATH_MAX];
    ssize_t length = readlinkat(parent, name, link, sizeof(link) - 1);
    if (length <= 0)
        return false;
    link[length] = 0;
    int directory = link[0] == '/' ? 0 : (int)(strlen(path) - strlen(name));
    return snprintf(target, PATH_MAX, "%.*s%s", directory, path, link) < PATH_MAX;
}

static int make_directories(int root, const char *path, mode_t mode, int depth) {
    int fd = inside_open(root, path, O_PATH | O_DIRECTORY, 0);
    if (fd >= 0 || errno != ENOENT)
        return fd;
    if (depth > MAX_DEPTH) {
        errno = ENAMETOOLONG;
        return -1;
    }
    char parent[PATH_MAX];
    if (snprintf(parent, sizeof(parent), "%s", path) >= (int)sizeof(parent)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    size_t length = strlen(parent);
    while (length > 1 && parent[length - 1] == '/')
        parent[--length] = 0;
    char *slash = strrchr(parent, '/');
    if (!slash || slash[1] == 0)
        return -1;
    *slash = 0;
    int above = make_directories(root, *parent ? parent : "/", 0755, depth + 1);
    if (above < 0)
        return -1;
    *slash = '/';
    char target[PATH_MAX];
    int made = mkdirat(above, slash + 1, mode);
    int saved = errno;
    bool link = made < 0 && saved == EEXIST && behind_link(above, slash + 1, parent, target);
    close(above);
    if (link)
        return make_directories(root, target, mode, depth + MAX_DEPTH / MAX_LINKS);
    if (made < 0 && saved != EEXIST) {
        errno = saved;
        return -1;
    }
    return inside_open(root, path, O_PATH | O_DIRECTORY, 0);
}

int inside_make_directory(int root, const char *path, mode_t mode) {
    return make_directories(root, path, mode, 0);
}

int inside_parent(int root, const char *path, char name[256]) {
    char parent[PATH_MAX];
    if (snprintf(parent, sizeof(parent), "%s", path) >= (int)sizeof(parent)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    char *slash = strrchr(parent, '/');
    const char *last = slash ? slash + 1 : parent;
    if (!slash || !*last || strlen(last) > NAME_MAX || strcmp(last, ".") == 0 || strcmp(last, "..") == 0) {
        errno = EINVAL;
        return -1;
    }
    memcpy(name, last, strlen(last) + 1);
    *slash = 0;
    return inside_make_directory(root, *parent ? parent : "/", 0755);
}

static int make_file(int root, const char *path, mode_t mode, int links) {
    int fd = inside_open(root, path, O_PATH, 0);
    if (fd >= 0 || errno != ENOENT)
        return fd;
    char name[256], target[PATH_MAX];
    int parent = inside_parent(root, path, name);
    if (parent < 0)
        return -1;
    int made = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    int saved = errno;
    bool link = made < 0 && saved == EEXIST && links < MAX_LINKS && behind_link(parent, name, path, target);
    close(parent);
    if (link)
        return make_file(root, target, mode, links + 1);
    if (made >= 0)
        close(made);
    else if (saved != EEXIST) {
        errno = saved;
        return -1;
    }
    return inside_open(root, path, O_PATH, 0);
}

int inside_make_file(int root, const char *path, mode_t mode) {
    return make_file(root, path, mode, 0);
}
