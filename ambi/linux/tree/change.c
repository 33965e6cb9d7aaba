/* What an overlay's upper directory changes in what lies below it, which is the root of this process. Whiteouts are devices
 * 0:0, a directory with the attribute `opaque` hides what is below it. Redirects and metadata-only copies are never mounted.
 * A directory that only leads to something, or that has changed nothing but its time, is no change by itself. */
#include "parts.h"

enum { OPAQUE_SIZE = 2, MAX_EXCLUDED = 512 };

/* A directory on the way, told of when something below it is. */
struct frame {
    struct frame *up;
    int fd;
    size_t length; /* of path_text */
    struct statx st;
    bool told, is_new;
};

static bool as_layer;
static char *excluded[MAX_EXCLUDED];
static size_t excluded_count;

static void exclude(const char *const *paths) {
    static char path[PATH_LIMIT];
    for (; *paths && excluded_count < MAX_EXCLUDED; paths++) {
        path_follow(*paths, path);
        excluded[excluded_count] = arena_take(strlen(path) + 1);
        memcpy(excluded[excluded_count++], path, strlen(path) + 1);
    }
}

static bool is_excluded(void) {
    for (size_t i = 0; i < excluded_count; i++)
        if (strcmp(excluded[i] + 1, path_text) == 0)
            return true;
    return false;
}

static void enter(int fd) {
    long result = SYS1(fchdir, fd);
    if (result < 0)
        give_up_on("cannot enter", path_text, result);
}

static void record(char kind) {
    write_bytes(&kind, 1);
    write_bytes("/", 1);
    write_bytes(path_text, path_length + 1);
}

/* Tell of `f` and of what leads to it; the current directory is any. */
static void tell(struct frame *f) {
    if (!f || f->told)
        return;
    tell(f->up);
    f->told = true;
    if (!f->length)
        return; /* of the root itself nothing is said, as in Docker */
    char after[2];
    size_t before = path_length;
    memcpy(after, path_text + f->length, 2);
    path_pop(f->length);
    if (as_layer) {
        path_text[path_length++] = '/';
        path_text[path_length] = 0;
        enter(f->fd);
        archive_one(".", &f->st);
    } else {
        record(f->is_new ? 'A' : 'C');
    }
    memcpy(path_text + f->length, after, 2);
    path_length = before;
}

static void write_marker(const char *prefix, const char *name) {
    static char marker[NAME_LIMIT * 2];
    struct statx nothing;
    memset(&nothing, 0, sizeof(nothing));
    memcpy(marker, prefix, strlen(prefix));
    memcpy(marker + strlen(prefix), name, strlen(name) + 1);
    size_t before = path_push(marker);
    write_member(path_text, "", '0', &nothing, NULL, 0);
    path_pop(before);
}

static void tell_deleted(struct frame *above, const char *name) {
    tell(above);
    if (as_layer) {
        write_marker(".wh.", name);
        return;
    }
    size_t before = path_push(name);
    record('D');
    path_pop(before);
}

static bool same_attributes(int upper, int lower, const char *upper_name, const char *lower_name) {
    static struct records ours, theirs;
    ours.length = theirs.length = 0;
    enter(lower);
    xattrs_collect(&theirs, lower_name);
    enter(upper);
    xattrs_collect(&ours, upper_name);
    return ours.length == theirs.length && memcmp(ours.at, theirs.at, ours.length) == 0;
}

static bool same_metadata(const struct statx *a, const struct statx *b) {
    return a->stx_mode == b->stx_mode && a->stx_uid == b->stx_uid && a->stx_gid == b->stx_gid &&
           a->stx_rdev_major == b->stx_rdev_major && a->stx_rdev_minor == b->stx_rdev_minor;
}

static bool same_file(const struct statx *a, const struct statx *b) {
    return same_metadata(a, b) && a->stx_size == b->stx_size && a->stx_mtime.tv_sec == b->stx_mtime.tv_sec &&
           a->stx_mtime.tv_nsec == b->stx_mtime.tv_nsec;
}

static bool is_whiteout(const struct statx *st) {
    return is_kind(st, S_IFCHR) && st->stx_rdev_major == 0 && st->stx_rdev_minor == 0;
}

static bool is_opaque(void) {
    char value[OPAQUE_SIZE];
    long n = SYS4(lgetxattr, ".", "trusted.overlay.opaque", value, sizeof(value));
    if (n < 0 && n != -ENODATA && n != -EOPNOTSUPP)
        give_up_on("cannot read how the directory hides what is below it:", path_text, n);
    return n == 1 && value[0] == 'y';
}

static void changes_below(struct frame *f, int lower, bool hides);

/* `below`: what is known of it in `lower`, NULL when it is not there. The current directory is that of `above`. */
static void directory(struct frame *above, const char *name, int lower, const struct statx *below) {
    struct frame f = {.up = above, .length = path_length, .is_new = !below};
    f.fd = open_path(HERE, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, RESOLVE_BENEATH);
    if (f.fd == -ENOENT || f.fd == -ENOTDIR || f.fd == -ELOOP)
        return;
    if (f.fd < 0 || stat_of(f.fd, "", &f.st) < 0)
        give_up_on("cannot open", path_text, f.fd);
    int under = -1;
    if (below && is_kind(below, S_IFDIR))
        under = open_path(lower, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, RESOLVE_BENEATH);
    enter(f.fd);
    bool hides = is_opaque();
    if (under < 0 || !same_metadata(&f.st, below) || !same_attributes(f.fd, under, ".", "."))
        tell(&f);
    if (hides && under >= 0 && as_layer) {
        tell(&f);
        write_marker(".wh..wh..opq", "");
        SYS1(close, under);
        under = -1;
    }
    changes_below(&f, under, hides);
    if (under >= 0)
        SYS1(close, under);
    SYS1(close, f.fd);
    enter(above->fd);
}

static void entry(struct frame *above, const char *name, int lower) {
    struct statx st, below;
    if (stat_of(HERE, name, &st) < 0)
        return;
    bool known = lower >= 0 && stat_of(lower, name, &below) == 0;
    if (is_kind(&st, S_IFDIR)) {
        directory(above, name, lower, known ? &below : NULL);
    } else if (!as_layer) {
        if (known && same_file(&st, &below) && same_attributes(above->fd, lower, name, name))
            return;
        tell(above);
        record(known ? 'C' : 'A');
    } else {
        if (starts_with(name, ".wh."))
            give_up("InvalidRequest", "a layer cannot have a file whose name means that another is gone:", path_text, 0);
        tell(above);
        enter(above->fd);
        archive_one(name, &st);
    }
}

static bool has_name(const struct names *names, const char *name) {
    size_t low = 0, high = names->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = strcmp(names->at[middle], name);
        if (order == 0)
            return true;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return false;
}

/* What is hidden by a directory that hides all of `lower`, and is not there again. */
static void hidden(struct frame *f, const struct names *shown, int lower) {
    struct names names = names_of(lower);
    for (size_t i = 0; i < names.count; i++) {
        size_t before = path_push(names.at[i]);
        bool skip = is_excluded();
        path_pop(before);
        if (!skip && !has_name(shown, names.at[i]))
            tell_deleted(f, names.at[i]);
    }
}

static void changes_below(struct frame *f, int lower, bool hides) {
    char *mark = arena_mark();
    struct names names = names_of(f->fd);
    for (size_t i = 0; i < names.count; i++) {
        struct statx st, below;
        char *name = names.at[i];
        size_t before = path_push(name);
        enter(f->fd);
        bool skip = is_excluded() || stat_of(HERE, name, &st) < 0;
        if (!skip && !is_whiteout(&st))
            entry(f, name, lower);
        path_pop(before);
        if (!skip && is_whiteout(&st) && lower >= 0 && stat_of(lower, name, &below) == 0)
            tell_deleted(f, name);
    }
    if (hides && lower >= 0)
        hidden(f, &names, lower);
    arena_release(mark);
}

static void changes(const struct tree_request *request) {
    struct frame root = {.fd = TREE_UPPER, .told = true};
    int lower = open_path(HERE, "/", O_RDONLY | O_DIRECTORY, 0);
    if (lower < 0)
        give_up_on("cannot open the image's root", NULL, lower);
    exclude(request->excluded);
    enter(root.fd);
    changes_below(&root, lower, false);
}

void change_diff(const struct tree_request *request) {
    changes(request);
    write_flush();
}

void change_layer(const struct tree_request *request) {
    as_layer = true;
    changes(request);
    write_end();
}
