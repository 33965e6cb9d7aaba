/* From an archive to a directory. Names of the archive are cleaned and stay below the directory by their text; links that are
 * there already are followed, by the kernel, below the root of this process, as Docker does. */
#include "parts.h"

enum { MAX_NAME = 255, ST_RDONLY = 1, STATFS_FLAGS = 10, WRITE_FLAGS = O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY };

/* Times of directories are set at the end: what is made in them changes them. */
struct late {
    struct late *before;
    int64_t mtime, mtime_ns;
    char path[];
};

static const struct tree_request *request;
static int base = -1; /* the directory */
static struct late *late;
static char clean[PATH_LIMIT];
static char name[MAX_NAME + 1]; /* of the present entry in `parent`, which is the current directory */
static int parent = -1;

static void refuse_read_only(void) {
    long buffer[32] = {0};
    struct statx ours, root;
    SYS2(fstatfs, base, buffer);
    if (!(buffer[STATFS_FLAGS] & ST_RDONLY))
        return;
    long a = SYS5(statx, base, "", AT_EMPTY_PATH, STATX_MNT_ID, &ours), b = SYS5(statx, HERE, "/", 0, STATX_MNT_ID, &root);
    bool volume = a == 0 && b == 0 && ours.stx_mnt_id != root.stx_mnt_id;
    give_up("InvalidRequest", volume ? "mounted volume is marked read-only" : "container rootfs is marked read-only", NULL, 0);
}

static void open_base(void) {
    base = open_path(HERE, request->path, O_PATH | O_DIRECTORY, 0);
    if (base == -ENOTDIR)
        give_up("InvalidRequest", "extraction point is not a directory", NULL, 0);
    if (base < 0)
        give_up_on("cannot open", request->path, base);
    if (is_kernel_file_system(base))
        give_up("InvalidRequest", "nothing can be copied to where the kernel shows itself:", request->path, 0);
    refuse_read_only();
}

static void failed(const char *what, long result) {
    if (result == -EROFS)
        give_up("InvalidRequest", "a part of the root is marked read-only:", clean, 0);
    give_up_on(what, clean, result);
}

/* A directory of the archive that no entry of it has told of. */
static int make_parent(char *path) {
    int fd = open_path(base, path[0] ? path : ".", O_PATH | O_DIRECTORY, 0);
    if (fd != -ENOENT)
        return fd;
    for (char *slash = path;; slash++) {
        if (*slash && *slash != '/')
            continue;
        char kept = *slash;
        *slash = 0;
        long made = SYS3(mkdirat, base, path, 0755);
        if (made == 0 && request->flags & TREE_COPY_IDS)
            SYS5(fchownat, base, path, request->uid, request->gid, AT_SYMLINK_NOFOLLOW);
        *slash = kept;
        if (made < 0 && made != -EEXIST)
            return (int)made;
        if (!kept)
            break;
    }
    return open_path(base, path, O_PATH | O_DIRECTORY, 0);
}

/* Go to the parent of `clean`, and split off its name. */
static void enter_parent(void) {
    static char above[PATH_LIMIT];
    size_t length = strlen(clean), slash = length;
    while (slash && clean[slash - 1] != '/')
        slash--;
    if (length - slash > MAX_NAME)
        failed("cannot make", -ENAMETOOLONG);
    memcpy(name, clean + slash, length - slash + 1);
    memcpy(above, clean, slash);
    above[slash ? slash - 1 : 0] = 0;
    if (parent >= 0)
        SYS1(close, parent);
    parent = make_parent(above);
    if (parent < 0)
        failed("cannot make", parent);
    if (is_kernel_file_system(parent))
        give_up("InvalidRequest", "nothing can be copied to where the kernel shows itself:", clean, 0);
    SYS1(fchdir, parent);
}

/* Remove `what` of the current directory and all below it. -errno. */
static long remove_all(const char *what, int here) {
    long result = SYS3(unlinkat, HERE, what, 0);
    if (result != -EISDIR)
        return result;
    int fd = open_path(HERE, what, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, RESOLVE_BENEATH | RESOLVE_NO_XDEV);
    if (fd < 0)
        return fd == -EXDEV ? -EBUSY : fd;
    char *mark = arena_mark();
    struct names names = names_of(fd);
    SYS1(fchdir, fd);
    for (size_t i = 0; i < names.count && result; i++) {
        result = remove_all(names.at[i], fd);
        if (result < 0 && result != -ENOENT)
            break;
        result = 1;
    }
    arena_release(mark);
    SYS1(close, fd);
    SYS1(fchdir, here);
    if (result < 0 && result != -EISDIR)
        return result;
    return SYS3(unlinkat, HERE, what, AT_REMOVEDIR);
}

/* Make way for the entry; true when what is there is to be used as it is: a directory for a directory, a mounted file. */
static bool make_way(const struct member *m) {
    struct statx st;
    int result = stat_of(HERE, name, &st);
    if (result == -ENOENT)
        return false;
    if (result < 0)
        failed("cannot look at", result);
    bool is_directory = is_kind(&st, S_IFDIR);
    if (is_directory && m->type == '5')
        return true;
    if (request->flags & TREE_NO_OVERWRITE_DIR_NON_DIR && is_directory != (m->type == '5'))
        give_up("InvalidRequest",
             is_directory ? "cannot overwrite directory with non-directory:" : "cannot overwrite non-directory with directory:",
             clean, 0);
    long removed = remove_all(name, parent);
    if (removed == -EBUSY && m->type == '0' && is_kind(&st, S_IFREG))
        return true;
    if (removed < 0 && removed != -ENOENT)
        failed("cannot replace", removed);
    return false;
}

static void write_whole(int fd, const char *data, size_t length) {
    while (length) {
        long n = SYS3(write, fd, data, length);
        if (n == -EINTR)
            continue;
        if (n < 0)
            failed("cannot write", n);
        data += n;
        length -= (size_t)n;
    }
}

static void write_piece(int fd, uint64_t length) {
    const char *data;
    while (length) {
        size_t n = read_data(&data, length < 1 << 20 ? (size_t)length : 1 << 20);
        if (!n)
            return;
        write_whole(fd, data, n);
        length -= n;
    }
}

static void make_file(const struct member *m, bool in_place) {
    struct statx st;
    struct open_how how = {.flags = WRITE_FLAGS | O_CLOEXEC | O_TRUNC, .resolve = RESOLVE_BENEATH};
    if (!in_place) {
        how.flags ^= O_TRUNC | O_CREAT | O_EXCL;
        how.mode = 0600;
    }
    int fd = (int)SYS4(openat2, HERE, name, &how, sizeof(how));
    if (fd < 0)
        failed("cannot make", fd);
    if (in_place && (stat_of(fd, "", &st) < 0 || !is_kind(&st, S_IFREG)))
        failed("cannot write", -EINVAL);
    for (size_t i = 0; i < m->extent_count; i++) {
        long at = SYS3(lseek, fd, m->extents[2 * i], SEEK_FROM_START);
        if (at < 0)
            failed("cannot write", at);
        write_piece(fd, m->extents[2 * i + 1]);
    }
    if (!m->extents)
        write_piece(fd, m->size);
    long result = m->extents ? SYS2(ftruncate, fd, m->size) : 0;
    if (result < 0)
        failed("cannot write", result);
    SYS1(close, fd);
}

/* The name of a hard link's other end is a name of the archive, too. */
static void make_link(const struct member *m) {
    static char other[PATH_LIMIT];
    if (!path_clean(m->link, other))
        give_up("InvalidRequest", "the archive has a hard link to outside of it:", m->link, 0);
    size_t slash = strlen(other);
    while (other[slash - 1] != '/')
        slash--;
    other[slash - 1] = 0;
    int directory = open_path(base, other[0] ? other + 1 : ".", O_PATH | O_DIRECTORY, 0);
    long result = directory < 0 ? directory : SYS5(linkat, directory, other + slash, HERE, name, 0);
    if (directory >= 0)
        SYS1(close, directory);
    if (result < 0)
        failed("cannot link", result);
}

static void make_other(const struct member *m) {
    static const unsigned KINDS[] = {['3'] = S_IFCHR, ['4'] = S_IFBLK, ['6'] = S_IFIFO};
    long result;
    if (m->type == '2')
        result = SYS3(symlinkat, m->link, HERE, name);
    else if (m->type == '5')
        result = SYS3(mkdirat, HERE, name, 0700);
    else {
        uint64_t number = (m->minor & 0xff) | m->major << 8 | (m->minor & ~0xffu) << 12;
        result = SYS4(mknodat, HERE, name, KINDS[(unsigned)m->type] | 0600, number);
    }
    if (result < 0)
        failed("cannot make", result);
}

static void set_xattrs(const struct member *m) {
    static char key[NAME_LIMIT + 1];
    const char *at = m->xattrs, *end = at + m->xattrs_length, *text, *value;
    const size_t prefix = sizeof("SCHILY.xattr.") - 1;
    size_t key_length, length;
    while (pax_next(&at, end, &text, &key_length, &value, &length)) {
        if (key_length <= prefix || key_length - prefix > NAME_LIMIT || memcmp(text, "SCHILY.xattr.", prefix) != 0)
            continue;
        memcpy(key, text + prefix, key_length - prefix);
        key[key_length - prefix] = 0;
        if (!xattr_may_be_set(key))
            continue;
        long result = SYS5(lsetxattr, name, key, value, length, 0);
        if (result < 0 && result != -EOPNOTSUPP && result != -EPERM)
            failed("cannot set an extended attribute of", result);
    }
}

static void set_metadata(const struct member *m) {
    bool ours = request->flags & TREE_COPY_IDS;
    long result = SYS5(fchownat, HERE, name, ours ? request->uid : m->uid, ours ? request->gid : m->gid, AT_SYMLINK_NOFOLLOW);
    if (result < 0)
        failed("cannot give away", result);
    if (m->type != '2')
        result = SYS3(fchmodat, HERE, name, m->mode);
    if (result < 0)
        failed("cannot set the mode of", result);
    set_xattrs(m);
    int64_t times[4] = {m->mtime, m->mtime_ns, m->mtime, m->mtime_ns};
    if (m->type != '5') {
        SYS4(utimensat, HERE, name, times, AT_SYMLINK_NOFOLLOW);
        return;
    }
    size_t length = strlen(clean) + 1;
    struct late *l = (struct late *)arena_take(sizeof(*l) + length);
    *l = (struct late){late, m->mtime, m->mtime_ns};
    memcpy(l->path, clean, length);
    late = l;
}

static void put_member(const struct member *m) {
    static char absolute[PATH_LIMIT];
    if (!path_clean(m->path, absolute))
        give_up("InvalidRequest", "the archive has a name that leads out of its directory:", m->path, 0);
    memcpy(clean, absolute + 1, strlen(absolute));
    if (!clean[0])
        return; /* the directory itself */
    enter_parent();
    bool stays = make_way(m);
    if (m->type == '0')
        make_file(m, stays);
    else if (m->type == '1')
        make_link(m);
    else if (!stays)
        make_other(m);
    if (m->type != '1')
        set_metadata(m);
}

void put_archive(const struct tree_request *wanted) {
    struct member m;
    request = wanted;
    SYS1(umask, 0);
    open_base();
    while (read_member(&m))
        put_member(&m);
    for (; late; late = late->before) {
        int64_t times[4] = {late->mtime, late->mtime_ns, late->mtime, late->mtime_ns};
        SYS4(utimensat, base, late->path, times, AT_SYMLINK_NOFOLLOW);
    }
}
